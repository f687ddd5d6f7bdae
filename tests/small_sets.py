"""Small data sets under the names that the pages use, for the tests that run the pages' commands."""

from __future__ import annotations

from pathlib import Path

from tests import tiny


def write_small_sets(folder: Path) -> None:
    """sst2-train.csv, ner-train.conll, text-train.txt and the same with -dev, and text.txt; and ENCODER_DIR."""
    tiny.tiny_bert(folder / "ENCODER_DIR", seed=2)
    for part, seed in (("train", 5), ("dev", 6)):
        rows = tiny.tiny_rows(24, seed=seed)
        questions = [row["question"] for row in rows]
        labelled = [f'"{text}",{"positive" if "color" in text else "negative"}' for text in questions]
        (folder / f"sst2-{part}.csv").write_text("\n".join(["sentence,label", *labelled]) + "\n")
        tagged = ["\n".join(map(_tagged, enumerate(text.rstrip("?").split()))) for text in questions]
        (folder / f"ner-{part}.conll").write_text("\n\n".join(tagged) + "\n")
        (folder / f"text-{part}.txt").write_text("\n".join(row["context"] for row in rows))
    (folder / "text.txt").write_text("\n".join(row["context"] for row in tiny.tiny_rows(64, seed=7)))


def _tagged(numbered: tuple[int, str]) -> str:
    """A line of CoNLL: every name but a sentence's first word is a person's."""
    place, word = numbered
    return f"{word} {'B-PER' if word.istitle() and place else 'O'}"
