"""Which labels a run of token classification knows, and the tags of its data written with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparse_accel.errors import DataError
from sparse_accel.tasks.splits import SplitName
from sparse_accel.tasks.tag_schemes import Scheme, find_scheme, iob2, iobes
from sparse_accel.tasks.token_rows import Example, with_tags

# The schemes that are written otherwise for training and scoring, and how.
REWRITTEN = {Scheme.IOB1: (iob2, "IOB2"), Scheme.BILOU: (iobes, "IOBES")}


@dataclass(frozen=True)
class Labels:
    """The label set in order, a phrase that says where it is from, the examples in its words, and notes for the user."""

    names: tuple[str, ...]
    source: str
    splits: Mapping[SplitName, list[Example]]
    notes: list[str]


def settle_labels(splits: Mapping[SplitName, list[Example]], model_labels: Sequence[str] | None) -> Labels:
    """The labels of the run.

    The first of `splits` (name -> examples; train before validation before test) that is labelled decides: the model's own
    labels in their order if they hold all of its labels, else what occurs in it, sorted. Without training data a model's own
    labels stand in any case. IOB1 becomes IOB2 and BILOU becomes IOBES, unless the model's labels hold the tags as they are
    and not as they would be. Raises DataError when there is no label.
    """
    tagged = {name: [example for example in split if example.tags is not None] for name, split in splits.items()}
    schemes = {name: find_scheme(example.tags or () for example in split) for name, split in tagged.items()}
    rewritten = {name: _rewritten(split, schemes[name]) for name, split in splits.items()}
    first = next((name for name, split in tagged.items() if split), None)
    as_they_are = _seen(splits[first]) if first else set()
    as_they_would_be = _seen(rewritten[first]) if first else set()
    notes = []
    keep = False
    if model_labels is not None and as_they_would_be <= set(model_labels):
        names, source = tuple(model_labels), "the model"
    elif model_labels is not None and as_they_are <= set(model_labels):
        names, source, keep = tuple(model_labels), "the model", True
    elif model_labels is not None and first != "train":
        names, source = tuple(model_labels), "the model"
    elif first is not None:
        names, source = tuple(sorted(as_they_would_be)), "the training data" if first == "train" else "the data"
    else:
        raise DataError(
            "the data have no labels, and neither has the model: its config.json should name them (id2label)"
        )
    if model_labels is not None and source != "the model":
        notes.append(
            f"the model's own labels ({', '.join(model_labels)}) lack some of the training data's: the labels of the data "
            "are learned"
        )
    for name, scheme in schemes.items():
        if tagged[name]:
            notes.extend(_scheme_notes(name, tagged[name], scheme, keep))
    return Labels(names, source, splits if keep else rewritten, notes)


def _rewritten(examples: list[Example], scheme: Scheme) -> list[Example]:
    if scheme not in REWRITTEN:
        return examples
    rewrite, _ = REWRITTEN[scheme]
    return [example if example.tags is None else with_tags(example, rewrite(example.tags)) for example in examples]


def _seen(examples: Sequence[Example]) -> set[str]:
    return {tag for example in examples for tag in example.tags or ()}


def _scheme_notes(split: str, examples: Sequence[Example], scheme: Scheme, keep: bool) -> list[str]:
    """What a person should know of the way in which entities are written; nothing of IOB2, the usual one."""
    if scheme in REWRITTEN:
        if keep:
            return [f"{split}: the tags are {scheme.value}, as the model's labels are, and stay so"]
        return [f"{split}: the tags are {scheme.value}; the same entities are written in {REWRITTEN[scheme][1]}"]
    if scheme is Scheme.IOBES:
        return [f"{split}: the tags are {scheme.value}"]
    if scheme is Scheme.MIXED:
        return [
            f"{split}: the tags are {scheme.value}: some entities begin with B- and some with I-; they are taken as they are"
        ]
    if scheme is Scheme.PLAIN:
        return [
            f"{split}: the labels are not of the kind B-..., I-..., O: accuracy is the score to read; f1, precision and "
            "recall count what seqeval makes of such labels"
        ]
    return []
