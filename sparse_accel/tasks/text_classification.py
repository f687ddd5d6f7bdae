"""Text classification: one label, several or a number for a text or a pair; GLUE and whatever looks like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from sparse_accel.errors import DataError, OptionError
from sparse_accel.tasks import text_metrics
from sparse_accel.tasks.base import DataOptions, LazyFiles, Scored, Split, TaskData
from sparse_accel.tasks.collating import Collator
from sparse_accel.tasks.feature_cache import cached_features, digest_of
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.glue import HUB_NAME, GlueTask, glue_task, mismatched_file, read_glue_file
from sparse_accel.tasks.reading import Row, data_set_splits, read_data_set, read_file
from sparse_accel.tasks.rows import NUM_ROWS_NAMED, BadRows, KnownColumns
from sparse_accel.tasks.splits import SplitName, SplitReader, check_data_options, longest_feature
from sparse_accel.tasks.text_features import Texts, TextSpec, encode_texts, text_spec
from sparse_accel.tasks.text_labels import (
    PROBLEM_TYPES,
    BadLabelError,
    LabelKind,
    LabelSet,
    class_names,
    glue_labels,
    label_kind,
    label_set,
    model_label_set,
)
from sparse_accel.tasks.text_rows import (
    TEXTS,
    TextColumns,
    TextExample,
    named_columns,
    source_of,
    text_columns,
    text_example,
)

# Tokens of a feature where nobody says how many; SparseML's.
_DEFAULT_LENGTH: Final = 384
# How many labels a prediction lists with their probabilities.
_NUM_SCORES: Final = 20
# The part of MNLI that is scored beside the usual one, and what its metrics end in.
_MISMATCHED: Final = "mm"


@dataclass(frozen=True)
class Scoring:
    """What scoring wants beside a split's features: the labels, the GLUE task if it is one, and whether it is test data."""

    labels: LabelSet
    glue: GlueTask | None
    is_test: bool

    def names(self, num_outputs: int) -> tuple[str, ...]:
        """A name for each output of the model. Raises DataError where it has not as many as there are labels."""
        if self.labels.names is None:
            return tuple(f"LABEL_{place}" for place in range(num_outputs))
        if len(self.labels.names) != num_outputs:
            raise DataError(f"the model has {num_outputs} outputs, the data {len(self.labels.names)} labels")
        return self.labels.names


class TextClassification:
    """The task: a model gives each text a score for every label, or (regression) a number."""

    name = "text_classification"
    output_keys: tuple[str, ...] = ("logits",)
    label_keys: tuple[str, ...] = ("labels",)
    features_are_fixed = True

    @property
    def model_class(self) -> Any:
        """transformers' AutoModelForSequenceClassification."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

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
        glue = glue_task(options.task_name) if options.task_name is not None else None
        options = _completed(options, glue)
        check_data_options(options)
        notes: list[str] = []
        max_length = longest_feature(options, tokenizer, max_positions, notes, default=_DEFAULT_LENGTH)
        spec = text_spec(tokenizer, max_length)
        loader = _Loader(options, spec, notes, glue, model_labels, model_problem_type)
        train = loader.split("train", options.max_train_samples) if options.do_train else None
        validation = loader.split("validation", options.max_eval_samples) if options.do_eval else None
        more_validation = loader.mismatched("validation", options.max_eval_samples) if options.do_eval else {}
        test = loader.split("test", options.max_predict_samples) if options.do_predict else None
        more_test = loader.mismatched("test", options.max_predict_samples) if options.do_predict else {}
        pad_values = {"input_ids": tokenizer.pad_token_id}
        if spec.token_types:
            pad_values["token_type_ids"] = tokenizer.pad_token_type_id
        return TaskData(
            collate=Collator(pad_values, max_length, bool(options.pad_to_max_length), tokenizer.padding_side),
            train=train.features if train is not None else None,
            validation=validation,
            test=test,
            more_validation=more_validation,
            more_test=more_test,
            head=head_of(loader.labels),
            notes=notes,
            num_dropped=loader.num_dropped,
        )

    def num_units(self, batch: Mapping[str, Tensor]) -> int:
        """Features: the loss is a mean over them."""
        return len(batch["attention_mask"])

    def loss(
        self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], *, include_padding: bool = False
    ) -> Tensor:
        """By the labels: cross entropy for int64 [N], mean squared error for float32 [N], and for float32 [N, L] the binary
        cross entropy of every label, as transformers' own models have them."""
        logits, labels = outputs["logits"].float(), batch["labels"]
        if not labels.is_floating_point():
            return F.cross_entropy(logits, labels)
        if labels.dim() == 1:
            return F.mse_loss(logits.squeeze(-1), labels)
        return F.binary_cross_entropy_with_logits(logits, labels)

    def distillation_keep(self, key: str, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        """None: logits are [N, C], of features and not of positions."""
        return None

    def for_scoring(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, list[np.ndarray]]:
        """The logits of each feature, float32 [C]."""
        return {"logits": list(outputs["logits"].detach().float().cpu().numpy())}

    def score(self, split: Split, outputs: Mapping[str, Sequence[np.ndarray]], options: DataOptions) -> Scored:
        """The metrics of GLUE's task, or of the kind of labels; predictions with the probability of each label."""
        scoring: Scoring = split.context
        logits = np.stack(outputs["logits"])
        labels = split.features.labels.get("labels")
        is_regression = scoring.labels.kind == "regression" or logits.shape[1] == 1
        names = () if is_regression else scoring.names(logits.shape[1])
        metrics: dict[str, float] = {}
        if labels is not None:
            metrics = _metrics(logits, labels, scoring, is_regression=is_regression)
        kind: LabelKind = "regression" if is_regression else scoring.labels.kind
        files: dict[str, Callable[[], Any]] = {"predictions": lambda: predictions_of(logits, kind, names)}
        if labels is not None and not is_regression:
            files["label_metrics"] = lambda: text_metrics.metrics_by_label(logits, labels, names)
        if scoring.is_test:
            name = "results.txt" if scoring.glue is None else f"results_{scoring.glue.name}.txt"
            files[name] = lambda: results_text(logits, kind, names)
        return Scored(metrics, LazyFiles(files))


def head_of(labels: LabelSet | None) -> dict[str, Any]:
    """What a model's config says of labels; nothing where they are the model's and not known by name."""
    if labels is None or (labels.names is None and labels.kind != "regression"):
        return {}
    names = labels.names if labels.names is not None else ("LABEL_0",)
    # `num_labels` first: setting it makes transformers forget the names.
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: place for place, name in enumerate(names)},
        "problem_type": PROBLEM_TYPES[labels.kind],
    }


def predictions_of(logits: np.ndarray, kind: LabelKind, names: Sequence[str]) -> list[dict[str, Any]]:
    """A JSON object for each row of logits [N, C]: `value` for a regression, else `label` (`labels`, where several may apply)
    and `scores`, the probabilities by label, highest first and at most 20 of them."""
    if kind == "regression":
        return [{"index": index, "value": float(value)} for index, value in enumerate(logits[:, 0])]
    found = []
    shares = text_metrics.softmax(logits) if kind == "classes" else text_metrics.probabilities(logits)
    for index, (row, raw) in enumerate(zip(shares, logits, strict=True)):
        best = np.argsort(-raw, kind="stable")
        scores = {names[place]: float(row[place]) for place in best[:_NUM_SCORES]}
        if kind == "classes":
            found.append({"index": index, "label": names[best[0]], "scores": scores})
        else:
            applying = [names[place] for place in best if row[place] > text_metrics.THRESHOLD]
            found.append({"index": index, "labels": applying, "scores": scores})
    return found


def results_text(logits: np.ndarray, kind: LabelKind, names: Sequence[str]) -> str:
    """The table `index TAB prediction` that SparseML and Hugging Face's example write for test data."""
    lines = ["index\tprediction"]
    for entry in predictions_of(logits, kind, names):
        if kind == "regression":
            lines.append(f"{entry['index']}\t{entry['value']:3.3f}")
        else:
            lines.append(f"{entry['index']}\t{entry['label'] if kind == 'classes' else ','.join(entry['labels'])}")
    return "\n".join(lines) + "\n"


def _metrics(logits: np.ndarray, labels: np.ndarray, scoring: Scoring, *, is_regression: bool) -> dict[str, float]:
    glue = scoring.glue
    if is_regression:
        by_number = text_metrics.regression_metrics if glue is None else text_metrics.glue_regression_metrics
        return by_number(logits[:, 0], labels)
    if scoring.labels.kind == "multi":
        return text_metrics.multi_label_metrics(logits, labels)
    if len(labels) and labels.max() >= logits.shape[1]:
        raise DataError(
            f"a row has the label {labels.max()}, and the model has {logits.shape[1]} outputs, 0 to {logits.shape[1] - 1}"
        )
    if glue is None:
        return text_metrics.class_metrics(logits, labels)
    positive = scoring.labels.places[glue.positive] if glue.positive is not None else None
    return text_metrics.glue_class_metrics(logits, labels, glue.metrics, positive)


def _completed(options: Any, glue: GlueTask | None) -> Any:
    """The options with what others of them stand for: `--task_name` alone is the data set of that name, and `--eval_on_test`
    makes the test data those of validation."""
    files = (options.train_file, options.validation_file, options.test_file)
    if glue is not None and options.dataset_name is None and not any(files):
        options = replace(options, dataset_name=HUB_NAME, dataset_config_name=glue.name)
    if options.eval_on_test and options.dataset_name is None:
        if options.test_file is None:
            raise OptionError("--eval_on_test needs --test_file, or --dataset_name with a test split")
        options = replace(options, validation_file=options.test_file)
    return options


class _Loader:
    """Reads, checks and tokenizes the splits of one run; `labels` are known after the first."""

    def __init__(
        self,
        options: DataOptions,
        spec: TextSpec,
        notes: list[str],
        glue: GlueTask | None,
        model_labels: Sequence[str] | None,
        model_problem_type: str | None,
    ) -> None:
        self.options = options
        self.spec = spec
        self.notes = notes
        self.glue = glue
        self.model_labels = model_labels
        self.model_problem_type = model_problem_type
        self.named = named_columns(options.input_column_names)
        self.label_column = options.label_column_name or "label"
        self.labels: LabelSet | None = None
        self.num_dropped = 0
        self._known: KnownColumns | None = None
        self._reader = SplitReader(options, notes, self._read_file, self._split_of_data_set, self._classes)

    def split(self, name: SplitName, max_samples: int | None) -> Split:
        """One split; its first `max_samples` rows. All of its rows count for the labels that there are."""
        try:
            rows, source = self._reader.rows(name)
        except DataError as error:
            if self.options.dataset_name != HUB_NAME or self.glue is None:
                raise
            raise DataError(_without_hub(self.glue, error)) from error
        return self._checked(name, rows, source, max_samples)

    def mismatched(self, name: SplitName, max_samples: int | None) -> dict[str, Split]:
        """MNLI's other part of validation and test data: the split of the data set, or the file beside the one that was named."""
        if self.glue is None or self.glue.name != "mnli" or (name == "validation" and self.options.eval_on_test):
            return {}
        options = self.options
        if options.dataset_name is not None:
            split = f"{name}_mismatched"
            if split not in data_set_splits(options.dataset_name, options.dataset_config_name, options.cache_dir):
                return {}
            rows = read_data_set(options.dataset_name, options.dataset_config_name, split, options.cache_dir)
            return {_MISMATCHED: self._checked(name, rows, f"{options.dataset_name} ({split})", max_samples)}
        file = options.validation_file if name == "validation" else options.test_file
        other = mismatched_file(file) if file is not None else None
        if other is None:
            return {}
        self.notes.append(f"{other} is scored too; its metrics end in _{_MISMATCHED}")
        return {_MISMATCHED: self._checked(name, self._read_file(str(other)), str(other), max_samples)}

    def _checked(self, name: SplitName, rows: Sequence[Row], source: str, max_samples: int | None) -> Split:
        bad = BadRows(self.options.on_bad_rows)
        is_test = name == "test"
        columns = self._columns(rows, labelled=not is_test)
        examples: list[TextExample] = []
        for row in rows:
            example = text_example(row, columns)
            if isinstance(example, str):
                bad.add(row.where, example)
            else:
                examples.append(example)
        _check_some_are_left(examples, bad, source)
        labels: dict[str, np.ndarray] = {}
        if not is_test:
            examples, found = self._labelled(name, examples, bad, source)
            labels["labels"] = found[:max_samples]
        elif self.labels is None:
            self.labels = self._labels_of_model(source)
        assert self.labels is not None
        examples = examples[:max_samples]
        features = self._features([(example.first, example.second) for example in examples])
        num_cut = int(features.facts["truncated"].sum())
        if num_cut:
            self.notes.append(
                f"{source}: {num_cut} of {len(examples)} texts are longer than max_seq_length {self.spec.max_length}; what is "
                "beyond it is not read"
            )
        if bad.messages:
            self.notes.append(bad.note(source))
            self.num_dropped += len(bad.messages)
        return Split(replace(features, labels=labels), examples, Scoring(self.labels, self.glue, is_test))

    def _labelled(
        self, name: SplitName, examples: list[TextExample], bad: BadRows, source: str
    ) -> tuple[list[TextExample], np.ndarray]:
        """The examples whose label is one, and the labels as the model learns them: int32 [N], float32 [N] or [N, L]."""
        if self.labels is None:
            examples = self._decide_labels(name, examples, bad, source)
        assert self.labels is not None
        kept, values = [], []
        for example in examples:
            try:
                values.append(self.labels.encode(example.label))
            except BadLabelError as problem:
                bad.add(example.where, str(problem))
                continue
            kept.append(example)
        _check_some_are_left(kept, bad, source)
        dtype = np.int32 if self.labels.kind == "classes" else np.float32
        return kept, np.array(values, dtype=dtype)

    def _decide_labels(
        self, name: SplitName, examples: list[TextExample], bad: BadRows, source: str
    ) -> list[TextExample]:
        """Set `labels` from the first split, whose rows with a label of another kind are bad."""
        if self.glue is not None:
            self.labels = glue_labels(self.glue, self.model_labels)
            return examples
        kind, problems = label_kind([(example.where, example.label) for example in examples])
        for index, problem in sorted(problems.items()):
            bad.add(examples[index].where, problem)
        kept = [example for index, example in enumerate(examples) if index not in problems]
        if name != "train":
            self.labels = model_label_set(kind, self.model_labels, source)
            return kept
        labels = [example.label for example in kept]
        if self._reader.holds_out():
            # A class may have all of its rows but those without a text in the part that is held out.
            labels += self._labels_held_out()
        self.labels, notes = label_set(labels, kind, self.model_labels, source)
        self.notes.extend(notes)
        return kept

    def _columns(self, rows: Sequence[Row], *, labelled: bool) -> TextColumns:
        """The columns to read, the same of all data."""
        columns, notes = text_columns(
            rows, self.named, self.label_column, self.glue, labelled=labelled, known=self._known
        )
        self.notes.extend(notes)
        if self._known is None:
            self._known = KnownColumns(dict(zip(TEXTS, columns.texts, strict=False)), source_of(rows))
        return columns

    def _classes(self, rows: Sequence[Row]) -> list[str | None] | None:
        """The class of each row; None where labels are no classes."""
        columns = self._columns(rows, labelled=True)
        assert columns.label is not None
        labels = [(row.where, row.values.get(columns.label)) for row in rows]
        return class_names(labels, are_classes=None if self.glue is None else not self.glue.is_regression)

    def _labels_held_out(self) -> list[Any]:
        rows, _ = self._reader.rows("validation")
        columns = self._columns(rows, labelled=True)
        examples = (text_example(row, columns) for row in rows)
        found = [example for example in examples if isinstance(example, TextExample)]
        _, problems = label_kind([(example.where, example.label) for example in found])
        return [example.label for index, example in enumerate(found) if index not in problems]

    def _labels_of_model(self, source: str) -> LabelSet:
        """The labels where no data has any."""
        if self.glue is not None:
            return glue_labels(self.glue, self.model_labels)
        if self.model_problem_type == PROBLEM_TYPES["multi"]:
            return LabelSet("multi", None if self.model_labels is None else tuple(self.model_labels))
        return model_label_set("classes", self.model_labels, source)

    def _features(self, texts: list[Texts]) -> Features:
        name = digest_of([text or "" for pair in texts for text in pair], "text_classification", self.spec.digest())
        workers = self.options.preprocessing_num_workers
        return cached_features(self.options, name, lambda: encode_texts(texts, self.spec, workers), self.notes)

    def _read_file(self, path: str) -> list[Row]:
        rows = read_glue_file(path, self.glue) if self.glue is not None else None
        return rows if rows is not None else read_file(path)

    def _split_of_data_set(self, name: SplitName, there: Sequence[str]) -> str:
        """What a split is called in the data set: MNLI has no `validation`, and `--eval_on_test` wants another."""
        if name == "validation" and self.options.eval_on_test:
            name = "test"
        return f"{name}_matched" if name not in there and f"{name}_matched" in there else name


def _check_some_are_left(examples: Sequence[TextExample], bad: BadRows, source: str) -> None:
    if not examples:
        raise DataError(f"{source}: no usable row is left: {'; '.join(bad.messages[:NUM_ROWS_NAMED])}")


def _without_hub(glue: GlueTask, error: DataError) -> str:
    return (
        f"--task_name {glue.name} without files loads GLUE from the Hugging Face hub ({HUB_NAME}), and that did not work: {error}\n"
        f"Pass --train_file and --validation_file instead: GLUE's own tab-separated files, with the columns {glue.layout}, or "
        f"JSON, CSV or parquet with the columns {', '.join((*glue.texts, 'label'))}"
    )
