"""What the measurement of evaluation found, for people: one table, notes beside it, and Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from sparse_accel.benchmarking.bars import Verdict, verdicts
from sparse_accel.benchmarking.report import Table, bars_table, print_table
from sparse_accel.benchmarking.summary import Document
from sparse_accel.benchmarking.workloads import EVALUATION

RESULT_FILES: Final = ("results.json", "results.md")
# Columns that the table needs to show all it has.
_WIDE: Final = 100


def arms_table(document: Document) -> Table:
    """One row an arm: milliseconds of processor time, questions a second of it, and how many times as fast as its baseline."""
    rows = []
    for arm, told in document["arms"].items():
        seconds, ratio = told["cpu"], told["times_as_fast"]["cpu"]
        is_baseline = told["compared_with"] == arm
        rows.append(
            (
                arm,
                _milliseconds(seconds["median"]),
                f"{_milliseconds(seconds['min'])}-{_milliseconds(seconds['max'])}",
                f"{told['questions_per_processor_second']:,.0f}",
                "1" if is_baseline else f"{_times(ratio['median'])} ({_times(ratio['min'])}-{_times(ratio['max'])})",
            )
        )
    return Table(("arm", "processor ms", "range", "questions/s", "times as fast"), tuple(rows))


def _milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _times(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def notes(document: Document) -> list[str]:
    """Sentences that belong beside the table."""
    machine, versions, parity = document["machine"], document["versions"], document["parity"]
    groups = "; ".join(dict.fromkeys(told["compared_with"] for told in document["arms"].values()))
    return [
        f"{machine['processor']}, one thread; load average {machine['busy_cores_before']} before and "
        f"{machine['busy_cores_after']} after; datasets {versions['datasets']}, transformers {versions['transformers']}",
        f"{document['questions']:,} questions, {document['data']}; {document['windows']:,} windows of up to "
        f"{document['max_length']} tokens, stride {document['stride']}; {document['tokenizer']}; logits are random with a peak",
        f"{document['rounds']} rounds in turns; processor time, that of worker processes included; times as fast, median "
        f"(lowest-highest), is over the arm that has 1 in the same group: {groups}",
        *(f"{arm}: {told['what']}" for arm, told in document["arms"].items()),
        "HF: what run_qa.py and utils_qa.py of Hugging Face's examples do, written anew",
        f"before anything was timed, both ways gave the same {parity['windows']:,} windows and, for SQuAD 1.1 and 2.0, the same "
        "answers, candidates and odds",
    ]


def for_bars(document: Document) -> dict[str, Any]:
    """The document as bars want to know it: no model computes, so it is of fp32 on a CPU."""
    machine = {**document["machine"], "device": "cpu"}
    return {**document, "workload": {"name": EVALUATION}, "settings": {"precision": "fp32"}, "machine": machine}


def _verdicts(document: Document) -> list[Verdict]:
    return [verdict for verdict in verdicts([for_bars(document)]) if verdict.value is not None]


def to_markdown(document: Document) -> str:
    """The tables and notes."""
    parts = [f"# {EVALUATION}: windows, answers and scores\n", f"    {document['command']}\n"]
    parts += [arms_table(document).to_markdown(), bars_table(_verdicts(document)).to_markdown()]
    parts.append("\n".join(f"- {line}" for line in notes(document)) + "\n")
    return "\n".join(parts)


def print_report(document: Document) -> None:
    """The table, the bar and the notes on the screen."""
    from rich.console import Console

    console = Console()
    console.print(f"[bold]{EVALUATION}[/bold]: windows, answers and scores\n", highlight=False)
    table = arms_table(document)
    print_table(console, table if console.width >= _WIDE else table.without("range"))
    print_table(console, bars_table(_verdicts(document)))
    for line in notes(document):
        console.print(line, highlight=False, markup=False)


def write_report(document: Document, folder: Path) -> None:
    """Write results.json and results.md."""
    (folder / RESULT_FILES[0]).write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    (folder / RESULT_FILES[1]).write_text(to_markdown(document), "utf-8")
