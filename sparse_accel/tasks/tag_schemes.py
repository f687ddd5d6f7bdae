"""Which way of writing entities as tags some data use, and one way of writing for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

from sparse_accel.tasks.entity_metrics import find_entities, split_tag


class Scheme(Enum):
    """How the tags of a sentence mark its entities."""

    # Each entity begins with B-, and goes on with I-.
    IOB2 = "IOB2"
    # An entity begins with I-, and with B- only where it touches another of its type.
    IOB1 = "IOB1"
    # Some entities begin with I- that need not, and some B- that need not: nobody meant this.
    MIXED = "neither IOB1 nor IOB2"
    # Also E- for the last word of an entity, and S- for an entity of one word.
    IOBES = "IOBES"
    # The same with the letters L- and U-.
    BILOU = "BILOU"
    # No B-, I-, ...: parts of speech and the like.
    PLAIN = "plain"


# BILOU's letters in IOBES.
IOBES_LETTERS = {"L": "E", "U": "S"}


def letter_of(tag: str) -> str | None:
    """B, I, E, S, L or U where the tag begins with that and a hyphen, else None."""
    return tag[0] if tag[1:2] == "-" and tag[0] in "BIESLU" else None


def find_scheme(sentences: Iterable[Sequence[str]]) -> Scheme:
    """The scheme of all these sentences together."""
    letters: set[str] = set()
    # Entities that begin with I-, and those that begin with B- though nothing of their type stands before them.
    begins_with_i = begins_with_b = False
    for tags in sentences:
        before = "O"
        for tag in tags:
            letter = letter_of(tag)
            if letter is not None:
                letters.add(letter)
                touches = letter_of(before) is not None and split_tag(before)[1] == split_tag(tag)[1]
                begins_with_i |= letter == "I" and not touches
                begins_with_b |= letter == "B" and not touches
            elif tag != "O":
                return Scheme.PLAIN
            before = tag
    if letters & {"L", "U"}:
        return Scheme.PLAIN if letters & {"E", "S"} else Scheme.BILOU
    if letters & {"E", "S"}:
        return Scheme.IOBES
    if begins_with_i:
        return Scheme.MIXED if begins_with_b else Scheme.IOB1
    return Scheme.IOB2


def iob2(tags: Sequence[str]) -> list[str]:
    """The same entities in IOB2.

    >>> iob2(["I-PER", "I-PER", "B-PER", "O"])
    ['B-PER', 'I-PER', 'B-PER', 'O']
    """
    written = ["O"] * len(tags)
    for entity in find_entities(tags):
        written[entity.first] = f"B-{entity.label}"
        for place in range(entity.first + 1, entity.last + 1):
            written[place] = f"I-{entity.label}"
    return written


def iobes(tags: Sequence[str]) -> list[str]:
    """BILOU's tags with the letters of IOBES, which scoring knows."""
    return [IOBES_LETTERS.get(letter_of(tag) or "", tag[0]) + tag[1:] for tag in tags]


def inside_tag(tag: str) -> str:
    """What the second and later pieces of a word with this tag are called: I- where it begins an entity, as Hugging
    Face's example does; the tag itself otherwise."""
    return f"I-{tag[2:]}" if tag.startswith("B-") else tag
