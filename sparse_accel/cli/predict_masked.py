"""What `predict` does with a masked language model: fills the gaps of texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sparse_accel.errors import DataError

if TYPE_CHECKING:
    from sparse_accel.serving.mlm_predicting import Filled

# How many fillings are shown for each gap, where nobody says otherwise.
DEFAULT_TOP_K = 5


def texts_of_file(file: str, on_bad_rows: str, say: Callable[[str], None]) -> list[str]:
    """The texts of a data file. Raises DataError."""
    from sparse_accel.tasks.mlm_rows import read_lines, texts_of
    from sparse_accel.tasks.rows import BadRows

    bad, notes = BadRows(on_bad_rows), list[str]()
    texts = texts_of(read_lines(file), None, file, bad, notes)
    for note in [*notes, *([bad.note(file)] if bad.messages else [])]:
        say(f"note: {note}")
    return texts


def fill_masks(
    folder: Path,
    texts: Sequence[str],
    stream: IO[str],
    *,
    top_k: int | None,
    as_json: bool,
    refuse: Callable[[str], None],
    say: Callable[[str], None],
    engine: str | None,
    threads: int | None,
    batch_size: int,
    max_seq_length: int | None,
) -> None:
    """Write each text with its likeliest fillings to `stream`; what cannot be filled goes to `refuse`."""
    from sparse_accel.serving.mlm_predicting import MaskFiller

    filler = MaskFiller(folder, engine, threads=threads, batch_size=batch_size, max_seq_length=max_seq_length)
    for note in filler.notes:
        say(f"note: {note}")
    found = filler.fillings(texts, top_k=top_k or DEFAULT_TOP_K)
    for number, (text, filled) in enumerate(zip(texts, found, strict=True), start=1):
        if isinstance(filled, DataError):
            refuse(f"text {number}: {filled}")
        elif as_json:
            row = {"id": f"row-{number}", "text": text, "filled": filled.text}
            row["masks"] = [[asdict(filling) for filling in gap] for gap in filled.gaps]  # type: ignore[assignment]
            print(json.dumps(row, ensure_ascii=False), file=stream, flush=True)
        else:
            _show(text, filled, stream)


def _show(text: str, filled: Filled, stream: IO[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    console.print(Text(" ".join(text.split()), style="bold"), soft_wrap=True)
    console.print(Text("  ") + Text(" ".join(filled.text.split()), style="green"), soft_wrap=True)
    for number, gap in enumerate(filled.gaps, start=1):
        if len(filled.gaps) > 1:
            console.print(f"  gap {number}", style="dim")
        for rank, filling in enumerate(gap, start=1):
            line = Text(f"  {rank}. ", style="dim") + Text(filling.text, style="bold green")
            console.print(line + Text(f"  (score {filling.score:.3f})", style="dim"), soft_wrap=True)
    console.print()
