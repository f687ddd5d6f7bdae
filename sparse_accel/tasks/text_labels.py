"""Labels of texts: what kind they are, which there are in what order, and each as the number that a model learns.

Three kinds: `classes` (one of several names), `multi` (any number of several names) and `regression` (a number).
"""

from __future__ import annotations

import ast
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final, Literal

import numpy as np

from sparse_accel.errors import DataError, suggestion
from sparse_accel.tasks.glue import GlueTask
from sparse_accel.tasks.reading import kind_of

LabelKind = Literal["classes", "multi", "regression"]

PROBLEM_TYPES: Final[dict[str, str]] = {
    "classes": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
# More labels than this share of the rows look like another column.
_TOO_MANY: Final = 0.5
_NUM_NAMED: Final = 8
# Labels are stored as int32.
_LARGEST_PLACE: Final = int(np.iinfo(np.int32).max)
# Longer runs of digits are text: Python refuses to convert them.
_MOST_DIGITS: Final = 4000
_TRAINING: Final = " of the training data"
_WORDS: Final = {"text": "text", "number": "a number", "list": "a list"}


class BadLabelError(Exception):
    """A label that is none; the message says why."""


@dataclass(frozen=True)
class LabelSet:
    """The labels of a run. `names` in the order of the model's outputs; None where they are not known by name.

    A whole number n in the data is `numbered[n]` where that is given, else it is a name like any other. `whose` says in
    messages whose labels they are (` of the model`).
    """

    kind: LabelKind
    names: tuple[str, ...] | None = None
    numbered: tuple[str, ...] | None = None
    whose: str = ""

    @cached_property
    def places(self) -> dict[str, int]:
        """name -> its place among the outputs; also by the name in small letters, where that is unambiguous."""
        names = self.names or ()
        folded = Counter(name.casefold() for name in names)
        loose = {name.casefold(): place for place, name in enumerate(names) if folded[name.casefold()] == 1}
        return {**loose, **{name: place for place, name in enumerate(names)}}

    def encode(self, value: Any) -> Any:
        """The label as a model learns it: an int for `classes`, a float for `regression`, float32 [L] for `multi`.

        Raises BadLabelError with the nearest names.
        """
        if is_absent(value):
            raise BadLabelError("has no label")
        if self.kind == "regression":
            return _number(value)
        if self.kind == "classes":
            found = _parsed(value)
            if isinstance(found, list):
                raise BadLabelError(
                    f"has {len(found)} labels, {found!r:.60}; each row has exactly one label in this data"
                )
            return self._place(found)
        return self._places(_parsed(value))

    def _place(self, value: Any) -> int:
        if isinstance(value, float):
            raise BadLabelError(f"the label {value!r} is a number with a fraction; the labels are {self._listed()}")
        if self.names is None:
            if not isinstance(value, int) or not 0 <= value <= _LARGEST_PLACE:
                raise BadLabelError(
                    f"the label is {value!r}; the model's config does not name its labels, so that only the numbers of its "
                    "outputs (0, 1, ...) mean anything to it"
                )
            return value
        if isinstance(value, int) and not (self.numbered is None or str(value) in self.places):
            if not 0 <= value < len(self.numbered):
                unlabelled = " (-1 stands for a row without a label)" if value == -1 else ""
                raise BadLabelError(
                    f"the label {value} is out of range: there are {len(self.numbered)} labels, 0 to "
                    f"{len(self.numbered) - 1}{unlabelled}"
                )
            value = self.numbered[value]
        name = str(value)
        place = self.places.get(name, self.places.get(name.casefold()))
        if place is None:
            raise BadLabelError(
                f"the label {name!r} is not one of the {len(self.names)} labels{self.whose}{suggestion(name, self.names)}"
            )
        return place

    def _places(self, value: Any) -> np.ndarray:
        if not isinstance(value, list):
            raise BadLabelError(f"the labels should be a list, they are {kind_of(value)} ({value!r:.40})")
        assert self.names is not None  # `multi` always knows how many there are
        if _is_vector(value):
            if len(value) != len(self.names):
                raise BadLabelError(f"has {len(value)} labels, a 1 or 0 for each of {len(self.names)} is expected")
            vector = np.array(value, dtype=np.float32)
            if not np.isin(vector, (0.0, 1.0)).all():
                raise BadLabelError(f"the labels should be 0 or 1 each, they are {value!r:.60}")
            return vector
        vector = np.zeros(len(self.names), dtype=np.float32)
        for entry in _named(value):
            vector[self._place(entry)] = 1.0
        return vector

    def _listed(self) -> str:
        if self.names is None:
            return "whole numbers"
        return listed(self.names)


def listed(names: Sequence[str]) -> str:
    """The first of many names, for a message."""
    shown = ", ".join(map(repr, names[:_NUM_NAMED]))
    return f"{shown} and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else shown


def is_absent(value: Any) -> bool:
    """Whether a cell holds no label at all."""
    return value is None or (isinstance(value, str) and not value.strip())


def _plain(value: Any) -> Any:
    """A label without its wrapping: numpy's and the truth values' own types, and text that is a whole number."""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        text = value.strip()
        digits = text.removeprefix("-")
        if len(digits) <= _MOST_DIGITS and digits.isascii() and digits.isdigit() and str(int(text)) == text:
            return int(text)
        return text
    if isinstance(value, int | float):
        return value
    raise BadLabelError(f"the label should be text or a number, it is {kind_of(value)}")


def _parsed(value: Any) -> Any:
    """A label, or the list of them that a cell of a table says in JSON or as Python writes it (`["joy", "fear"]`)."""
    if isinstance(value, np.ndarray | tuple):
        value = list(value)
    if isinstance(value, str):
        return _parsed_text(value)
    return value if isinstance(value, list) else _plain(value)


@lru_cache(maxsize=2**16)
def _parsed_text(text: str) -> Any:
    """The same of text; what it gives is shared and never changed."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return _plain(text)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
    return found if isinstance(found, list) else text


def _number(value: Any) -> float:
    value = _plain(value)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise BadLabelError(f"the label {value!r} is no number, and the labels of this data are numbers") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise BadLabelError(f"the label is {value}, which is no number that could be learned")
    if abs(value) > float(np.finfo(np.float32).max):
        raise BadLabelError(f"the label {value!r:.40} is larger than single precision can hold")
    return float(value)


def _is_vector(labels: Sequence[Any]) -> bool:
    """Whether a list says yes or no for every label (1.0, 0.0, true, false), and does not name those that apply."""
    return bool(labels) and all(isinstance(label, float | bool | np.floating | np.bool_) for label in labels)


def _named(labels: Sequence[Any]) -> list[Any]:
    """The labels that a list names. Raises BadLabelError for one that is none, and for one that is there twice: that is a 1 or 0
    for every label, and would be read as the labels 0 and 1."""
    found = [_plain(label) for label in labels]
    repeated = next((label for label, count in Counter(found).items() if count > 1), None)
    if repeated is not None:
        raise BadLabelError(
            f"names the label {repeated!r:.40} twice, {list(labels)!r:.60}; a yes or no for every label is written with true "
            "and false, or 1.0 and 0.0"
        )
    return found


def _looks_like_a_fraction(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return any(character in text for character in ".eEnN")


def _group(value: Any) -> str:
    """text, number or list; a whole number that is written as text counts as a number."""
    found = _parsed(value)
    if isinstance(found, list):
        if not _is_vector(found):
            _named(found)
        return "list"
    if isinstance(found, str):
        return "number" if _looks_like_a_fraction(found) else "text"
    return "number"


def class_names(labels: Sequence[tuple[str, Any]], *, are_classes: bool | None = None) -> list[str | None] | None:
    """The class of each row, given (where, label) of all, None for a label that is none; None in place of the list where the
    labels are no classes, which `are_classes` may say. Raises DataError where no row has a label."""
    kind, problems = label_kind(labels) if are_classes is None else ("classes" if are_classes else "regression", {})
    if kind != "classes":
        return None
    names: list[str | None] = []
    for index, (_, value) in enumerate(labels):
        try:
            names.append(None if index in problems else str(_parsed(value)).casefold())
        except BadLabelError:
            names.append(None)
    return names


def label_kind(labels: Sequence[tuple[str, Any]]) -> tuple[LabelKind, dict[int, str]]:
    """What kind the labels of a data set are, given (where, label) of its rows; and index -> problem for those of another.

    The kind of most rows decides; numbers with a fraction make a regression. Raises DataError where no row has a label.
    """
    groups: dict[int, str] = {}
    problems: dict[int, str] = {}
    for index, (_, value) in enumerate(labels):
        if is_absent(value):
            problems[index] = "has no label"
            continue
        try:
            groups[index] = _group(value)
        except BadLabelError as problem:
            problems[index] = str(problem)
    if not groups:
        where, value = labels[0]
        others = "and neither has any other row" if is_absent(value) else "and no row has a label that can be used"
        raise DataError(f"{where}: {problems[0]}, {others}")
    count = Counter(groups.values())
    # The first of equals: text, because every number can be read as text.
    most = max(_WORDS, key=lambda group: count[group])
    example = next(labels[index] for index, group in groups.items() if group == most)
    for index, group in groups.items():
        if group != most:
            problems[index] = (
                f"the label {labels[index][1]!r:.40} is {_WORDS[group]}, and most labels are {_WORDS[most]} "
                f"({example[0]}: {example[1]!r:.40})"
            )
    if most == "list":
        return "multi", problems
    if most == "text":
        return "classes", problems
    values = (_parsed(labels[index][1]) for index, group in groups.items() if group == "number")
    return ("classes" if all(isinstance(value, int) for value in values) else "regression"), problems


def label_set(
    labels: Sequence[Any], kind: LabelKind, model_labels: Sequence[str] | None, source: str
) -> tuple[LabelSet, list[str]]:
    """The labels to train on, and notes: those of the data in alphabetical (numbers: numerical) order, or in the model's own
    order where it has the same ones by name or they are its numbers, so that its head stays what it is.

    Raises DataError where fewer than two labels occur.
    """
    if kind == "regression":
        return LabelSet("regression"), []
    vectors, values = _occurring(labels)
    if vectors:
        return _vector_labels(vectors, values, model_labels, source), []
    names = [str(value) for value in sorted(values, key=lambda value: (isinstance(value, str), value))]
    if not names or (kind == "classes" and len(names) < 2):
        raise DataError(
            f"{source}: every row has the label {names[0]!r}; at least two labels are needed"
            if names
            else f"{source}: no row has a label"
        )
    notes = []
    if kind == "classes" and len(names) > max(20, _TOO_MANY * len(labels)):
        notes.append(
            f"{source}: {len(names)} different labels in {len(labels)} rows: is --label_column_name the column that is meant?"
        )
    if model_labels is not None:
        model = tuple(model_labels)
        if same_names(model, names):
            return LabelSet(kind, model, model, _TRAINING), notes
        if all(isinstance(value, int) for value in values) and sorted(values) == list(range(len(model))):
            notes.append(f"{source}: the labels are numbers; they are taken for the model's own: {_numbering(model)}")
            return LabelSet(kind, model, model, _TRAINING), notes
        if set(names) & set(model):
            head = "is kept and learns them" if len(names) == len(model) else "begins anew"
            notes.append(
                f"{source}: has the {len(names)} labels {listed(names)}, the model {len(model)}, {listed(model)}; as they are "
                f"not the same, its head {head}"
            )
    return LabelSet(kind, tuple(names), whose=_TRAINING), notes


def glue_labels(task: GlueTask, model_labels: Sequence[str] | None) -> LabelSet:
    """The labels of a GLUE task, in the model's own order where it has the same ones."""
    if task.is_regression:
        return LabelSet("regression")
    names = task.labels
    if model_labels is not None and same_names(model_labels, names):
        names = tuple(model_labels)
    return LabelSet("classes", names, task.labels, f" of {task.name}")


def model_label_set(kind: LabelKind, model_labels: Sequence[str] | None, source: str) -> LabelSet:
    """The labels of a run that does not train: the model's. Raises DataError where it would have to name them."""
    if kind == "regression":
        return LabelSet("regression")
    if model_labels is None:
        if kind == "multi":
            raise DataError(
                f"{source}: rows have lists of labels, and the model's config does not name its labels (id2label), so that "
                "it is not known which of its outputs they are"
            )
        return LabelSet("classes")
    names = tuple(model_labels)
    return LabelSet(kind, names, names, " of the model")


def same_names(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether both are the same labels in whatever order; capital letters do not count where they tell nothing apart."""
    if set(one) == set(other):
        return True
    ours, theirs = ({name.casefold() for name in names} for names in (one, other))
    return ours == theirs and len(ours) == len(one) == len(other)


def order_in(ours: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
    """Where each of our labels stands among theirs, the same labels in another order; None where they are not the same."""
    if len(ours) != len(theirs) or not same_names(ours, theirs):
        return None
    if set(ours) == set(theirs):
        return [list(theirs).index(name) for name in ours]
    folded = [name.casefold() for name in theirs]
    return [folded.index(name.casefold()) for name in ours]


def _occurring(labels: Sequence[Any]) -> tuple[list[list[Any]], set[Any]]:
    """The yes-or-no vectors among the labels, and all that are named."""
    vectors: list[list[Any]] = []
    values: set[Any] = set()
    for label in labels:
        found = _parsed(label)
        if not isinstance(found, list):
            values.add(found)
        elif _is_vector(found):
            vectors.append(found)
        else:
            values.update(_plain(entry) for entry in found)
    return vectors, values


def _vector_labels(
    vectors: Sequence[Sequence[Any]], values: set[Any], model_labels: Sequence[str] | None, source: str
) -> LabelSet:
    if values:
        raise DataError(
            f"{source}: some rows name their labels ({next(iter(values))!r:.40}), and some say yes or no for each of them "
            f"({list(vectors[0])!r:.40}); one way is needed"
        )
    size = Counter(map(len, vectors)).most_common(1)[0][0]
    if model_labels is not None and len(model_labels) == size:
        return LabelSet("multi", tuple(model_labels), tuple(model_labels))
    names = tuple(str(place) for place in range(size))
    return LabelSet("multi", names, names)


def _numbering(names: Sequence[str]) -> str:
    shown = [f"{place} is {name!r}" for place, name in enumerate(names[:_NUM_NAMED])]
    return ", ".join(shown) + (", ..." if len(names) > _NUM_NAMED else "")
