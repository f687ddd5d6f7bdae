"""What a task is: how its data becomes batches, and how a model's outputs become scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from sparse_accel.tasks.collating import Collator
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.files import write_json, write_text


class DataOptions(Protocol):
    """The options that a task reads; their names, defaults and meanings are those of SparseML's data arguments."""

    @property
    def dataset_name(self) -> str | None: ...
    @property
    def dataset_config_name(self) -> str | None: ...
    @property
    def train_file(self) -> str | None: ...
    @property
    def validation_file(self) -> str | None: ...
    @property
    def test_file(self) -> str | None: ...
    @property
    def overwrite_cache(self) -> bool: ...
    @property
    def preprocessing_num_workers(self) -> int | None: ...
    @property
    def validation_split_percentage(self) -> int | None: ...
    @property
    def validation_ratio(self) -> float | None: ...
    @property
    def streaming(self) -> bool: ...
    @property
    def max_seq_length(self) -> int | None: ...
    @property
    def pad_to_max_length(self) -> bool | None: ...
    @property
    def max_train_samples(self) -> int | None: ...
    @property
    def max_eval_samples(self) -> int | None: ...
    @property
    def max_predict_samples(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def task_name(self) -> str | None: ...
    @property
    def input_column_names(self) -> str | None: ...
    @property
    def text_column_name(self) -> str | None: ...
    @property
    def label_column_name(self) -> str | None: ...
    @property
    def eval_on_test(self) -> bool: ...
    @property
    def label_all_tokens(self) -> bool: ...
    @property
    def return_entity_level_metrics(self) -> bool: ...
    @property
    def dataset_name_2(self) -> str | None: ...
    @property
    def dataset_config_name_2(self) -> str | None: ...
    @property
    def line_by_line(self) -> bool: ...
    @property
    def mlm_probability(self) -> float: ...
    @property
    def whole_word_mask(self) -> bool: ...
    @property
    def question_column(self) -> str | None: ...
    @property
    def context_column(self) -> str | None: ...
    @property
    def answer_column(self) -> str | None: ...
    @property
    def version_2_with_negative(self) -> bool: ...
    @property
    def null_score_diff_threshold(self) -> float: ...
    @property
    def doc_stride(self) -> int: ...
    @property
    def n_best_size(self) -> int: ...
    @property
    def max_answer_length(self) -> int: ...
    @property
    def cache_dir(self) -> str | None: ...
    @property
    def on_bad_rows(self) -> str: ...
    @property
    def do_train(self) -> bool: ...
    @property
    def do_eval(self) -> bool: ...
    @property
    def do_predict(self) -> bool: ...


@dataclass(frozen=True)
class Split:
    """Features to run the model on, and the examples that its outputs are scored against. `context` is what else the task
    wants when it scores, such as the names of its labels."""

    features: Features
    examples: Sequence[Any]
    context: Any = None


class Lanes(Protocol):
    """Training features that are read while training: each lane gives one a step."""

    def take(self) -> Features:
        """The next feature of each lane, in the order of the lanes."""
        ...

    def skip(self, count: int) -> None:
        """Go on as after `count` times `take`."""
        ...


class Stream(Protocol):
    """Training data that does not fit into memory."""

    def lanes(self, own: np.ndarray, num_lanes: int) -> Lanes:
        """The lanes `own`, int64 [n], of the `num_lanes` that a step has features, from their beginnings."""
        ...

    @property
    def skipped(self) -> Mapping[int, str]:
        """The rows that were read so far and left out: by place, each once however often it was read, what is wrong."""
        ...


@dataclass(frozen=True)
class TaskData:
    """All that a run needs of its data. A part that was not asked for is None.

    `collate` makes padded batches of features. `stream` takes the place of `train` where the training data is read while
    training. `head` is what the model's config must say before the model is loaded (how
    many labels there are and what they are called). `more_validation` and `more_test` are further splits that are scored
    at the end, by the suffix of their metrics. `notes` are sentences for the person who started the run; `num_dropped`
    counts the rows that `--on_bad_rows skip` left out.
    """

    collate: Collator
    train: Features | None = None
    stream: Stream | None = None
    validation: Split | None = None
    test: Split | None = None
    more_validation: Mapping[str, Split] = field(default_factory=dict)
    more_test: Mapping[str, Split] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    num_dropped: int = 0


class LazyFiles(Mapping[str, Any]):
    """Contents by name, each made when it is first read: an evaluation whose files nobody writes does not pay for them.

    A copy for another process (pickle) is an ordinary dict, with all contents made.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


@dataclass(frozen=True)
class Scored:
    """The metrics of a split (empty where it holds no answers), and the files worth writing: name -> JSON content, or text where
    the name ends in .txt."""

    metrics: dict[str, float]
    files: Mapping[str, Any]


class Task(Protocol):
    """Interface of all tasks; one file and one row in TASKS each."""

    name: str
    # What distillation compares, and what `score` wants.
    output_keys: tuple[str, ...]
    # The keys of a batch that are labels: a teacher is not given them.
    label_keys: tuple[str, ...]
    # Whether a feature is the same in every epoch, so that what a teacher says of it is too.
    features_are_fixed: bool

    @property
    def model_class(self) -> Any:
        """The transformers auto class that opens a model folder for this task."""
        ...

    def load(
        self,
        options: DataOptions,
        tokenizer: Any,
        *,
        max_positions: int | None = None,
        model_labels: Sequence[str] | None = None,
        model_problem_type: str | None = None,
    ) -> TaskData:
        """Read, check and tokenize what `do_train`, `do_eval` and `do_predict` ask for.

        `max_positions` is the longest sequence the model can take, None for no limit; `model_labels` are the names that the
        model's config gives its labels, in their order, None where it gives none; `model_problem_type` is what it says of
        their kind, if anything (transformers' `problem_type`). Raises DataError for bad data, ModelError for an unfit
        tokenizer and OptionError for options that cannot be met.
        """
        ...

    def num_units(self, batch: Mapping[str, Tensor]) -> int:
        """How many units the loss of this batch is a mean over."""
        ...

    def loss(
        self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], *, include_padding: bool = False
    ) -> Tensor:
        """The task's own loss, a scalar in fp32: the mean over the batch's units. `outputs` are laid out by feature; what
        stands on padding takes part only if `include_padding`."""
        ...

    def distillation_keep(self, key: str, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Which positions of the logits take part in distillation: a bool mask that fits them, or None for all."""
        ...

    def for_scoring(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, list[np.ndarray]]:
        """What `score` wants of a batch's outputs, which are laid out by feature: per key, an array for each feature."""
        ...

    def score(self, split: Split, outputs: Mapping[str, Sequence[np.ndarray]], options: DataOptions) -> Scored:
        """Predictions and metrics of a whole split; `outputs` are those of `for_scoring`, an array for each feature in the split's
        order."""
        ...


def prediction_file(prefix: str, name: str, suffix: str = "") -> str:
    """The name under which a file of `Scored` is written: JSON, but for one that says itself that it is text."""
    stem, dot, ending = name.partition(".")
    return "_".join(part for part in (prefix, stem, suffix) if part) + (f".{ending}" if dot else ".json")


def write_predictions(folder: str | Path, prefix: str, scored: Scored) -> list[Path]:
    """Write each file of `scored` under its name (see `prediction_file`), whole or not at all; returns the paths."""
    written = []
    for name, content in scored.files.items():
        path = Path(folder) / prediction_file(prefix, name)
        if path.suffix == ".json":
            write_json(path, content)
        else:
            write_text(path, content)
        written.append(path)
    return written
