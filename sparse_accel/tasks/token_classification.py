"""Token classification: a label for each word, such as what kind of name it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from sparse_accel.errors import DataError
from sparse_accel.tasks.base import DataOptions, LazyFiles, Scored, Split, TaskData
from sparse_accel.tasks.collating import Collator
from sparse_accel.tasks.conll import SUFFIXES, read_conll
from sparse_accel.tasks.entity_metrics import entity_metrics
from sparse_accel.tasks.feature_cache import cached_features, digest_of
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.reading import Row, read_file
from sparse_accel.tasks.rows import BadRows, KnownColumns
from sparse_accel.tasks.splits import SPLIT_OPTIONS, SplitName, SplitReader, check_data_options, longest_feature
from sparse_accel.tasks.token_labels import Labels, settle_labels
from sparse_accel.tasks.token_rows import Example, check_labels, check_rows, find_columns
from sparse_accel.tasks.word_pieces import NO_LABEL, OUTSIDE, PieceSpec, Sentence, by_word, cut_pieces, piece_spec

MAX_SAMPLES: dict[SplitName, str] = {
    "train": "max_train_samples",
    "validation": "max_eval_samples",
    "test": "max_predict_samples",
}


class TokenClassification:
    """The task: a model gives each token a score for each label; a word has the label of its first token."""

    name = "token_classification"
    output_keys: tuple[str, ...] = ("logits",)
    label_keys: tuple[str, ...] = ("labels",)
    features_are_fixed = True

    @property
    def model_class(self) -> Any:
        """transformers' AutoModelForTokenClassification."""
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def load(
        self,
        options: DataOptions,
        tokenizer: Any,
        *,
        max_positions: int | None = None,
        model_labels: Sequence[str] | None = None,
        model_problem_type: str | None = None,
    ) -> TaskData:
        """See `Task.load`."""
        check_data_options(options)
        loader = _Loader(options, tokenizer, max_positions, model_labels)
        splits = {name: loader.split(name) for name in loader.labels.splits}
        train = splits.get("train")
        pad_values = {"input_ids": tokenizer.pad_token_id}
        if loader.spec.token_types:
            pad_values["token_type_ids"] = tokenizer.pad_token_type_id
        names = loader.labels.names
        return TaskData(
            collate=Collator(
                pad_values,
                loader.spec.max_length,
                bool(options.pad_to_max_length),
                tokenizer.padding_side,
                token_labels={"labels": NO_LABEL},
            ),
            train=train.features if train is not None else None,
            validation=splits.get("validation"),
            test=splits.get("test"),
            head={
                "num_labels": len(names),
                "id2label": dict(enumerate(names)),
                "label2id": {name: index for index, name in enumerate(names)},
            },
            notes=loader.notes,
            num_dropped=loader.num_dropped,
        )

    def num_units(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens with a label: the loss is a mean over them."""
        return int((batch["labels"] != NO_LABEL).sum())

    def loss(
        self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], *, include_padding: bool = False
    ) -> Tensor:
        """The mean cross entropy of the tokens that have a label, 0 where none has one; padding never has."""
        logits, labels = outputs["logits"].float(), batch["labels"]
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum")
        return total / (labels != NO_LABEL).sum().clamp(min=1)

    def distillation_keep(self, key: str, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        """bool [B, S], True on tokens: a teacher knows more than the labels of first pieces."""
        return batch["attention_mask"].bool()

    def for_scoring(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, list[np.ndarray]]:
        """The logits of each feature's tokens, float32 [T, labels]; `outputs` has [B, S, labels]."""
        keep = batch["attention_mask"].bool().cpu().numpy()
        logits = outputs["logits"].detach().float().cpu().numpy()
        return {"logits": [rows[kept] for rows, kept in zip(logits, keep, strict=True)]}

    def score(self, split: Split, outputs: Mapping[str, Sequence[np.ndarray]], options: DataOptions) -> Scored:
        """The tags of all words, and seqeval's scores of them where every sentence has labels.

        A word has the label that its first piece scores highest. Words without a piece are called O and take no part in
        the scores, as in Hugging Face's example. `loss` is the mean over all labelled tokens.
        """
        names: tuple[str, ...] = split.context
        examples: Sequence[Example] = split.examples
        scores = by_word(split.features, outputs["logits"], [len(example.words) for example in examples])
        tags = [[None if word is None else names[int(word.argmax())] for word in row] for row in scores]
        written = [[OUTSIDE if tag is None else tag for tag in row] for row in tags]

        def predictions() -> list[dict[str, Any]]:
            return [
                {**({} if example.id is None else {"id": example.id}), "words": list(example.words), "tags": row}
                for example, row in zip(examples, written, strict=True)
            ]

        metrics: dict[str, float] = {}
        if all(example.tags is not None for example in examples):
            seen = [[tag for tag in row if tag is not None] for row in tags]
            truth = [
                [known for known, tag in zip(example.tags or (), row, strict=True) if tag is not None]
                for example, row in zip(examples, tags, strict=True)
            ]
            metrics = entity_metrics(truth, seen, by_type=options.return_entity_level_metrics)
            metrics["loss"] = mean_loss(outputs["logits"], split.features.extra["labels"])
        return Scored(metrics, LazyFiles({"predictions": predictions}))


def mean_loss(logits: Sequence[np.ndarray], labels: np.ndarray) -> float:
    """The mean cross entropy, in double precision, of the tokens that have a label; `labels` is [T] of all features."""
    scores = np.concatenate(logits).astype(np.float64)
    labelled = labels != NO_LABEL
    if not labelled.any():
        return 0.0
    scores, wanted = scores[labelled], labels[labelled]
    highest = scores.max(-1)
    normalizers = highest + np.log(np.exp(scores - highest[:, None]).sum(-1))
    return float((normalizers - scores[np.arange(len(wanted)), wanted]).mean())


class _Loader:
    """Reads and checks all splits of one run, settles the labels, and makes the features of each."""

    def __init__(
        self, options: DataOptions, tokenizer: Any, max_positions: int | None, model_labels: Sequence[str] | None
    ) -> None:
        self.options = options
        self.notes: list[str] = []
        self.num_dropped = 0
        self._task_name = options.task_name or "ner"
        self._reader = SplitReader(options, self.notes, self._read)
        self._sources: dict[SplitName, str] = {}
        self._bad: dict[SplitName, BadRows] = {}
        self._label_column: str | None = None
        self._known: KnownColumns | None = None
        self._has_conll = False
        wanted = [name for name, (switch, _) in SPLIT_OPTIONS.items() if getattr(options, switch)]
        self.labels: Labels = settle_labels({name: self._examples(name, model_labels) for name in wanted}, model_labels)
        self.notes.extend(self.labels.notes)
        max_length = longest_feature(options, tokenizer, max_positions, self.notes)
        self.spec: PieceSpec = piece_spec(
            tokenizer, max_length=max_length, labels=self.labels.names, label_all_tokens=options.label_all_tokens
        )

    def split(self, name: SplitName) -> Split:
        """One split: `max_..._samples` of its sentences, all of whose labels are known."""
        bad = self._bad[name]
        examples = check_labels(self.labels.splits[name], self.labels.names, self.labels.source, bad)
        if bad.messages:
            self.notes.append(bad.note(self._sources[name]))
            self.num_dropped += len(bad.messages)
        examples = examples[: getattr(self.options, MAX_SAMPLES[name])]
        features = self._features(examples, self._sources[name])
        if not len(features):
            raise DataError(f"{self._sources[name]}: the tokenizer makes no token of any of its words")
        return Split(features, examples, context=self.labels.names)

    def _examples(self, name: SplitName, model_labels: Sequence[str] | None) -> list[Example]:
        rows, self._sources[name] = self._reader.rows(name)
        self._bad[name] = bad = BadRows(self.options.on_bad_rows)
        labels_wanted = name != "test"
        # Test data may have the column that training's labels were found in.
        known = self.options.label_column_name or (None if labels_wanted else self._label_column)
        columns, notes = find_columns(
            rows,
            words=self.options.text_column_name,
            labels=known,
            task_name=self._task_name,
            labels_wanted=labels_wanted,
            known=self._known,
        )
        self.notes.extend(notes)
        self._label_column = columns.labels
        # A CoNLL file has no names but those that it is given here.
        if self._known is None and not self._has_conll:
            found = {"words": columns.words, "labels": columns.labels}
            self._known = KnownColumns({what: name for what, name in found.items() if name}, self._sources[name])
        return check_rows(rows, columns, bad, names=model_labels, labels_wanted=labels_wanted)

    def _read(self, file: str) -> list[Row]:
        """The rows of a file; those of a CoNLL file under the names that are looked for."""
        known = self._known.names if self._known is not None else {}
        words = self.options.text_column_name or known.get("words", "tokens")
        tags = self.options.label_column_name or known.get("labels", f"{self._task_name}_tags")

        def conll(path: Path) -> list[Row]:
            self._has_conll = True
            return read_conll(path, words, tags)

        return read_file(file, dict.fromkeys(SUFFIXES, conll))

    def _features(self, examples: list[Example], source: str) -> Features:
        sentences = [Sentence(example.words, example.tags) for example in examples]
        texts = [text for sentence in sentences for text in (*sentence.words, *(sentence.tags or ()))]
        sizes = [(len(sentence.words), sentence.tags is not None) for sentence in sentences]

        def make() -> Features:
            return cut_pieces(sentences, self.spec, self.options.preprocessing_num_workers)

        features = cached_features(self.options, f"token-{digest_of(texts, sizes, self.spec)}", make, self.notes)
        num_windows = np.bincount(features.facts["example"], minlength=len(examples))
        several, cut_off = int((num_windows > 1).sum()), int(features.facts["cut_words"].sum())
        unseen = sum(size for size, _ in sizes) - int((features.extra["word"] >= 0).sum())
        for count, sentence in (
            (
                several,
                f"of {len(examples)} sentences are longer than {self.spec.max_length} tokens and cut into windows",
            ),
            (cut_off, "words have more tokens than a window holds: the last ones of each are left out"),
            (unseen, "words have no token at all (such as control characters): they are called O and not scored"),
        ):
            if count:
                self.notes.append(f"{source}: {count} {sentence}")
        return features
