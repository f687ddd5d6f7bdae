"""Entity-level precision, recall and F1, as seqeval counts them (and conlleval before it)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Tags (their first letter) after which an entity is over, and those that begin one, whatever stands beside them.
CLOSING = ("E", "S")
OPENING = ("B", "S")
# Tags after which one that goes on (I) or ends (E) begins anew.
OUTSIDE = ("O", "E", "S")
# The type of a tag that names none ("B", or "O").
NO_TYPE = "_"


@dataclass(frozen=True, slots=True, order=True)
class Entity:
    """The words `first` to `last`, both inclusive, of a sentence."""

    first: int
    last: int
    label: str


def split_tag(tag: str) -> tuple[str, str]:
    """The first letter of a tag and the type that it names: ("B", "PER") for "B-PER"."""
    return tag[0], tag[1:].split("-", maxsplit=1)[-1] or NO_TYPE


def find_entities(tags: Sequence[str]) -> list[Entity]:
    """The entities that the tags of one sentence mark, in order, by the rules of seqeval's default mode.

    These read IOB1, IOB2 and IOBES alike and forgive what is wrong: an I- that nothing began begins an entity.

    >>> find_entities(["I-PER", "I-PER", "B-PER", "O", "B-LOC"])
    [Entity(first=0, last=1, label='PER'), Entity(first=2, last=2, label='PER'), Entity(first=4, last=4, label='LOC')]
    """
    found = []
    first, before, label_before = 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        letter, label = split_tag(tag)
        if _ends(before, letter, label_before, label):
            found.append(Entity(first, place - 1, label_before))
        if _begins(before, letter, label_before, label):
            first = place
        before, label_before = letter, label
    return found


def _ends(before: str, letter: str, label_before: str, label: str) -> bool:
    """Whether an entity ends between two neighbours."""
    if before in CLOSING or (before in ("B", "I") and letter in ("B", "S", "O")):
        return True
    return before not in ("O", ".") and label_before != label


def _begins(before: str, letter: str, label_before: str, label: str) -> bool:
    """Whether an entity begins with the second of two neighbours."""
    if letter in OPENING or (before in OUTSIDE and letter in ("I", "E")):
        return True
    return letter not in ("O", ".") and label_before != label


@dataclass(frozen=True)
class Counts:
    """Entities of the data, of the predictions, and of both (same words, same type)."""

    true: int
    predicted: int
    right: int

    @property
    def scores(self) -> dict[str, float]:
        """precision, recall and f1, 0 where there is nothing to divide by."""
        precision = self.right / self.predicted if self.predicted else 0.0
        recall = self.right / self.true if self.true else 0.0
        both = precision + recall
        return {
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / both if both else 0.0,
        }


def count_entities(truth: Iterable[Sequence[str]], predictions: Iterable[Sequence[str]]) -> dict[str, Counts]:
    """Counts by type, sorted by its name: a type is there if the data or the predictions have it."""
    true: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for tags, guesses in zip(truth, predictions, strict=True):
        known, guessed = set(find_entities(tags)), set(find_entities(guesses))
        true.update(entity.label for entity in known)
        predicted.update(entity.label for entity in guessed)
        right.update(entity.label for entity in known & guessed)
    return {name: Counts(true[name], predicted[name], right[name]) for name in sorted({*true, *predicted})}


def entity_metrics(
    truth: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], *, by_type: bool = False
) -> dict[str, float]:
    """precision, recall and f1 over all entities, and accuracy over all tags: fractions of 1.

    With `by_type` also those of each type (`PER_precision`, `PER_recall`, `PER_f1`, and `PER_number`, how many the data
    have) and the four again as `overall_precision` and so on: the names that Hugging Face's example gives them.
    """
    counts = count_entities(truth, predictions)
    total = Counts(
        true=sum(count.true for count in counts.values()),
        predicted=sum(count.predicted for count in counts.values()),
        right=sum(count.right for count in counts.values()),
    )
    pairs = [pair for tags, guesses in zip(truth, predictions, strict=True) for pair in zip(tags, guesses, strict=True)]
    accuracy = sum(tag == guess for tag, guess in pairs) / len(pairs) if pairs else 0.0
    metrics = {**total.scores, "accuracy": accuracy}
    if by_type:
        for name, count in counts.items():
            metrics |= {f"{name}_{metric}": value for metric, value in count.scores.items()}
            metrics[f"{name}_number"] = count.true
        metrics |= {f"overall_{metric}": value for metric, value in total.scores.items()}
        metrics["overall_accuracy"] = accuracy
    return metrics
