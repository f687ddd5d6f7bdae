"""The tiny world of the tests: random models, tokenizers and question-answering files, made offline in a second."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_accel.tasks.data_settings import DataSettings

PEOPLE = "ada bruno clara dmitri elena farid greta hugo ines jonas kavita liam mona nadia oscar petra".split()
THINGS = "lamp chair boat clock piano kite drum violin bicycle mirror basket hammer carpet teapot ladder map".split()
COLOURS = "red green blue yellow black white purple orange silver golden".split()
CITIES = "lisbon oslo cairo lima quito dakar hanoi sydney turin kyoto".split()
MONTHS = "january march april june july august october december".split()
GLUE_WORDS = (
    "the a an of in on to and was is has had from with by for who what where which when how many old small bought sold"
    " built found owned painted moved during before after people town market later every buy very color year month did"
).split()
# The labels of `tiny_sentences`, sorted.
TINY_TAGS = ("B-DATE", "B-LOC", "B-PER", "I-DATE", "I-PER", "O")


def tiny_words() -> list[str]:
    """Every whole word that the generator of passages uses, sorted and without repeats."""
    return sorted({*PEOPLE, *THINGS, *COLOURS, *CITIES, *MONTHS, *GLUE_WORDS})


def _passage(rng: random.Random) -> tuple[str, list[tuple[str, str, int]]]:
    """A passage with the questions that it answers: (question, answer text, character offset of the answer)."""
    people = rng.sample(PEOPLE, 4)
    things = rng.sample(THINGS, 4)
    text = ""
    asked = []
    for person, thing in zip(people, things, strict=True):
        colour, city, month = rng.choice(COLOURS), rng.choice(CITIES), rng.choice(MONTHS)
        year = str(rng.randint(1900, 2020))
        parts = [person.title(), f" bought a {colour} {thing} in ", city.title(), f" in {month} ", year, ". "]
        start = len(text)
        offset_of_city = start + len(parts[0]) + len(parts[1])
        offset_of_year = offset_of_city + len(parts[2]) + len(parts[3])
        offset_of_colour = start + len(parts[0]) + len(" bought a ")
        asked.append((f"What color was the {thing} of {person.title()}?", colour, offset_of_colour))
        asked.append((f"Where did {person.title()} buy the {thing}?", city.title(), offset_of_city))
        asked.append((f"In which year was the {thing} bought?", year, offset_of_year))
        text += "".join(parts)
    return text.rstrip(), asked


def tiny_rows(rows: int, seed: int = 0, unanswerable: float = 0.0) -> list[dict[str, Any]]:
    """`rows` flat SQuAD rows with exact answer spans; the share `unanswerable` of them has no answer."""
    rng = random.Random(seed)
    made: list[dict[str, Any]] = []
    while len(made) < rows:
        context, asked = _passage(rng)
        for question, answer, offset in rng.sample(asked, 4):
            answers: dict[str, list[Any]] = {"text": [answer], "answer_start": [offset]}
            if rng.random() < unanswerable:
                question, answers = "Where did Zebedee buy the piano?", {"text": [], "answer_start": []}
            row = {"title": f"passage {len(made) // 4}", "context": context, "question": question, "answers": answers}
            made.append({"id": f"q{seed}-{len(made):05d}", **row})
    return made[:rows]


def tiny_sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` rows of words and their tags, IOB2: people of one or two words, cities, and dates of two."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        person = [name.title() for name in rng.sample(PEOPLE, rng.randint(1, 2))]
        parts = [
            (person, "PER"),
            (["bought", "a", rng.choice(COLOURS), rng.choice(THINGS), "in"], None),
            ([rng.choice(CITIES).title()], "LOC"),
            (["in"], None),
            ([rng.choice(MONTHS), str(rng.randint(1900, 2020))], "DATE"),
            (["."], None),
        ]
        words = [word for part, _ in parts for word in part]
        tags = [
            "O" if label is None else f"{'I' if place else 'B'}-{label}"
            for part, label in parts
            for place in range(len(part))
        ]
        rows.append({"id": f"s{seed}-{number:05d}", "tokens": words, "ner_tags": tags})
    return rows


def tiny_tagged(path: str | Path, rows: int = 64, seed: int = 0) -> Path:
    """Write `tiny_sentences` as JSON lines, or as CoNLL where the name ends so, and return the path."""
    made = tiny_sentences(rows, seed)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".conll":
        sentences = ["\n".join(map("\t".join, zip(row["tokens"], row["ner_tags"], strict=True))) for row in made]
        path.write_text("\n\n".join(sentences) + "\n", encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def nested(rows: list[dict[str, Any]], version: str = "1.1") -> dict[str, Any]:
    """The same rows in SQuAD's nested layout: one article a title, one paragraph a context."""
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        questions = articles.setdefault(row["title"], {}).setdefault(row["context"], [])
        answers = [
            {"text": text, "answer_start": start}
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        ]
        question = {"id": row["id"], "question": row["question"], "answers": answers}
        questions.append(question if version == "1.1" else {**question, "is_impossible": not answers})
    data = [
        {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]
    return {"version": version, "data": data}


def tiny_squad(
    path: str | Path, rows: int = 64, nested_layout: bool = False, seed: int = 0, unanswerable: float = 0.0
) -> Path:
    """Write a SQuAD-like JSON file (flat `{"data": [...]}`, or SQuAD's nested layout) and return its path."""
    made = tiny_rows(rows, seed, unanswerable)
    version = "v2.0" if unanswerable else "1.1"
    content = nested(made, version) if nested_layout else {"version": version, "data": made}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def tiny_tokenizer(path: str | Path, kind: str = "bert", model_max_length: int = 512) -> Any:
    """Save and return a fast tokenizer: byte-level BPE for `roberta`, lower-casing WordPiece for all other kinds."""
    if kind == "roberta":
        tokenizer = _byte_level_tokenizer(model_max_length)
    else:
        from transformers import BertTokenizer

        characters = sorted({*string.ascii_lowercase, *string.digits, *string.punctuation, *"éüñßæøçžшия中文القرآن"})
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        whole = [word for word in tiny_words() if word not in characters]
        vocabulary = [*specials, *characters, *(f"##{character}" for character in characters), *whole]
        names = (
            ["input_ids", "attention_mask"]
            if kind == "distilbert"
            else ["input_ids", "token_type_ids", "attention_mask"]
        )
        tokenizer = BertTokenizer(
            vocab={token: index for index, token in enumerate(vocabulary)},
            do_lower_case=True,
            model_max_length=model_max_length,
            model_input_names=names,
        )
    tokenizer.save_pretrained(str(path))
    return tokenizer


def _byte_level_tokenizer(model_max_length: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    texts = [row[key] for row in tiny_rows(64) for key in ("context", "question")]
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_bert(
    path: str | Path,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    kind: str = "bert",
    dropout: float = 0.1,
    head: str = "QuestionAnswering",
    labels: Sequence[str] | None = None,
) -> Path:
    """Save a random `*For{head}` with its tokenizer into the folder `path`, which is returned.

    `kind` is bert, distilbert, roberta, electra or albert. Weights depend on `seed` alone, and the global random state
    is left as it was. `labels` are the names of its classes.
    """
    import torch
    import transformers

    path = Path(path)
    tokenizer = tiny_tokenizer(path, kind)
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if kind == "distilbert":
        shape |= {"dim": hidden, "hidden_dim": 2 * hidden, "n_layers": layers, "n_heads": 2, "dropout": dropout}
        shape |= {"attention_dropout": dropout, "qa_dropout": dropout, "max_position_embeddings": 512}
    else:
        shape |= {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": 2, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        shape |= {"max_position_embeddings": 514 if kind == "roberta" else 512}
        shape |= {"type_vocab_size": 1 if kind == "roberta" else 2}
        if kind in ("electra", "albert"):
            shape |= {"embedding_size": hidden // 2}
    name = {"bert": "Bert", "distilbert": "DistilBert", "roberta": "Roberta", "electra": "Electra", "albert": "Albert"}[
        kind
    ]
    config = getattr(transformers, f"{name}Config")(initializer_range=0.1, **shape)
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}For{head}")(config)
    model.save_pretrained(path)
    return path


@dataclass(frozen=True, kw_only=True)
class TinyDataOptions(DataSettings):
    """The data options of a run with the defaults that tests want; `replace` changes some."""

    max_seq_length: int | None = 64
    doc_stride: int = 16
