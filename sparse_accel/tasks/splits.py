"""Which rows train, validate and test: files, a data set's splits, or a part of the training rows that is held out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Final, Literal

import numpy as np

from sparse_accel.errors import DataError, OptionError
from sparse_accel.tasks.base import DataOptions
from sparse_accel.tasks.reading import Row, data_set_splits, read_data_set, read_file
from sparse_accel.tasks.shares import held_out_share

SplitName = Literal["train", "validation", "test"]
# The option that turns a split on, and the one that names its file.
SPLIT_OPTIONS: Final[dict[SplitName, tuple[str, str]]] = {
    "train": ("do_train", "train_file"),
    "validation": ("do_eval", "validation_file"),
    "test": ("do_predict", "test_file"),
}
# Which rows are held out must not depend on --seed: a run and its continuation, and runs with other seeds, share them.
_HELD_OUT_SEED: Final = 0


class SplitReader:
    """Reads the rows of a run's splits, each with a phrase that names where they are from. A file is read once.

    `read` is how a file becomes rows; `notes` gets what the person should know. `named` says what a split is called in a data
    set that has the splits that it is given. `strata` names the label of each row, or None for labels that are no classes: of
    each, the same share is held out.
    """

    def __init__(
        self,
        options: DataOptions,
        notes: list[str],
        read: Callable[[str], list[Row]] = read_file,
        named: Callable[[SplitName, Sequence[str]], str] | None = None,
        strata: Callable[[Sequence[Row]], Sequence[Hashable] | None] | None = None,
    ) -> None:
        self.options = options
        self.notes = notes
        self._read = read
        self._named = named
        self._strata = strata
        self._there: list[str] | None = None
        self._training: tuple[list[Row], str] | None = None

    def rows(self, name: SplitName) -> tuple[list[Row], str]:
        """The rows of one split. Raises DataError and OptionError where there are none to be had."""
        if name == "test" or not self.holds_out():
            return self._given(name)
        rows, source = self._training_rows()
        share = held_out_share(self.options)
        assert share is not None
        labels = self._strata(rows) if self._strata is not None else None
        held_out = held_out_rows(len(rows), share, labels)
        if not 0 < held_out.sum() < len(rows):
            raise OptionError(
                f"{source}: {share:.3g} of its {len(rows)} rows, held out for validation, leaves {len(rows) - held_out.sum()} "
                f"to train with and {held_out.sum()} to score"
                + (f": of each of its {len(set(labels))} labels, one row at least stays in training" if labels else "")
            )
        wanted = held_out if name == "validation" else ~held_out
        note = f"{source}: {held_out.sum()} of {len(rows)} rows are held out for validation"
        if labels is not None:
            note += ", of each label its share"
        if name == "validation" and note not in self.notes:
            self.notes.append(note)
        return [row for row, kept in zip(rows, wanted, strict=True) if kept], f"{source} ({name} part)"

    def holds_out(self) -> bool:
        """Whether validation rows come out of the training rows."""
        options = self.options
        if held_out_share(options) is None or options.validation_file is not None:
            return False
        if options.dataset_name is not None:
            return self._split_of_data_set("validation") not in self._splits()
        return options.train_file is not None and options.do_eval

    def _split_of_data_set(self, name: SplitName) -> str:
        return name if self._named is None else self._named(name, self._splits())

    def _splits(self) -> list[str]:
        options = self.options
        assert options.dataset_name is not None
        if self._there is None:
            self._there = data_set_splits(options.dataset_name, options.dataset_config_name, options.cache_dir)
        return self._there

    def _training_rows(self) -> tuple[list[Row], str]:
        if self._training is None:
            self._training = self._given("train")
        return self._training

    def _given(self, name: SplitName) -> tuple[list[Row], str]:
        options = self.options
        file: str | None = getattr(options, SPLIT_OPTIONS[name][1])
        if options.dataset_name:
            if file:
                self.notes.append(
                    f"--{SPLIT_OPTIONS[name][1]} {file} is not read: --dataset_name {options.dataset_name} comes first"
                )
            split = self._split_of_data_set(name)
            if name == "validation" and split not in self._splits() and "train" in self._splits():
                raise DataError(
                    f"the data set {options.dataset_name!r} has no split {split!r}; it has "
                    f"{', '.join(map(repr, self._splits()))}: --validation_split_percentage N stands for N percent of its "
                    "training rows, which are then held out of training"
                )
            rows = read_data_set(options.dataset_name, options.dataset_config_name, split, options.cache_dir)
            return rows, f"{options.dataset_name} ({split})"
        if file is None:
            raise DataError(f"there is no {name} data: --{SPLIT_OPTIONS[name][1]}")
        return self._read(file), str(file)


def held_out_rows(num_rows: int, share: float, strata: Sequence[Hashable] | None = None) -> np.ndarray:
    """bool [num_rows], True for round(share * num_rows) rows, drawn by chance but the same each time.

    With `strata`, a name for each row, as many of each name as its share of all rows, rounded; one at least is False, so that
    there may be fewer in all.
    """
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(num_rows).tolist()
    total = round(share * num_rows)
    held_out = np.zeros(num_rows, bool)
    if strata is None:
        held_out[order[:total]] = True
        return held_out
    groups: dict[Hashable, list[int]] = {}
    for row in order:
        groups.setdefault(strata[row], []).append(row)
    counts = _apportioned(np.array(list(map(len, groups.values()))), total)
    for group, count in zip(groups.values(), counts, strict=True):
        held_out[group[:count]] = True
    return held_out


def _apportioned(sizes: np.ndarray, total: int) -> np.ndarray:
    """`total` in parts as `sizes` (int [n]), rounded by largest remainder; each part is less than its size."""
    counts: np.ndarray = np.minimum(sizes * total // sizes.sum(), sizes - 1)
    lacking = sizes * total / sizes.sum() - counts
    for place in np.argsort(-lacking, kind="stable"):
        if counts.sum() == total:
            break
        counts[place] += counts[place] < sizes[place] - 1
    return counts


def check_data_options(options: DataOptions, least: dict[str, int] | None = None) -> None:
    """Raise OptionError for numbers that are too small and for splits without data. `least` adds a task's own limits."""
    least = dict(least or {})
    for name in (
        "max_seq_length",
        "preprocessing_num_workers",
        "max_train_samples",
        "max_eval_samples",
        "max_predict_samples",
    ):
        if getattr(options, name) is not None:
            least.setdefault(name, 1)
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            raise OptionError(f"--{name} should be {smallest} or more, it is {getattr(options, name)}")
    if options.on_bad_rows not in ("error", "skip"):
        raise OptionError(f"--on_bad_rows should be error or skip, it is {options.on_bad_rows!r}")
    for split, (switch, file) in SPLIT_OPTIONS.items():
        held_out = split == "validation" and held_out_share(options) is not None and options.train_file is not None
        if getattr(options, switch) and not options.dataset_name and not getattr(options, file) and not held_out:
            raise OptionError(f"--{switch} needs --{file}, or --dataset_name with a {split} split")


def longest_feature(
    options: DataOptions, tokenizer: object, max_positions: int | None, notes: list[str], default: int | None = None
) -> int:
    """Tokens of the longest feature: `--max_seq_length`, else `default`, capped at what tokenizer and model can take (and 512
    where nobody sets a limit), with a note where that is less than what was asked for."""
    asked = options.max_seq_length if options.max_seq_length is not None else default
    limits = {
        "the tokenizer's model_max_length": getattr(tokenizer, "model_max_length", None),
        "the model's positions": max_positions,
    }
    if asked is None:
        known = [int(limit) for limit in limits.values() if limit is not None and limit < _NO_LIMIT]
        return min(known, default=512)
    length = asked
    for name, limit in limits.items():
        if limit is not None and limit < length:
            notes.append(f"max_seq_length {length} is more than {name}, {limit}: {limit} is used")
            length = int(limit)
    return length


# Tokenizers without a limit say 10 to the power of 30.
_NO_LIMIT: Final = 10**9
