"""What a training benchmark found, for people: a table on the screen, Markdown, and a plot of where a step's time goes."""

from __future__ import annotations

import importlib.util
import json
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sparse_accel.benchmarking.bars import Verdict, verdicts
from sparse_accel.benchmarking.heads import MASKED_LANGUAGE_MODELING
from sparse_accel.benchmarking.models import vocabulary_of
from sparse_accel.benchmarking.stopwatch import PHASES
from sparse_accel.benchmarking.summary import (
    ArmSummary,
    Document,
    collating_milliseconds,
    collating_speedup,
    noise,
    phases_per_step,
    summarise,
)

# Columns that the tables need to show all they have.
_WIDE: Final = 100
_SHORT: Final = {"optimizer": "optim."}

RESULT_FILES: Final = ("results.json", "results.md", "step_breakdown.png")
_COLOURS: Final = ("#bdbdbd", "#fdae6b", "#6baed6", "#2171b5", "#756bb1", "#d94801", "#e7298a", "#31a354", "#e0e0e0")


@dataclass(frozen=True)
class Table:
    """Headings and rows; the first `num_words` columns are words, the others are numbers."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_words: int = 1

    def without(self, heading: str) -> Table:
        """All columns but one."""
        at = self.headings.index(heading)

        def kept(cells: tuple[str, ...]) -> tuple[str, ...]:
            return cells[:at] + cells[at + 1 :]

        return Table(kept(self.headings), tuple(map(kept, self.rows)))

    def to_markdown(self) -> str:
        """With the numbers to the right."""
        rule = "|".join("---" if at < self.num_words else "---:" for at in range(len(self.headings)))
        lines = [" | ".join(self.headings), *(" | ".join(row) for row in self.rows)]
        return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]) + "\n"


def speed_table(document: Document) -> Table:
    """One row an arm: speed, time over dense, and utilisation of the device."""
    peak = "datasheet" if "datasheet" in document["peaks"] else "measured"
    rows = []
    for arm in document["arms"]:
        found = summarise(document, arm)
        rows.append(
            (
                arm,
                f"{found.features_per_second:,.1f}",
                f"{found.features_low:,.1f}-{found.features_high:,.1f}",
                f"{found.tokens_per_second:,.0f}",
                over_dense_text(found, noise(document)),
                f"{found.mfu[peak]:.1%}",
                f"{found.hfu[peak]:.1%}",
            )
        )
    headings = ("arm", "features/s", "range", "tokens/s", "time / dense", "MFU", "HFU")
    return Table(headings, tuple(rows))


def demands_table(document: Document) -> Table:
    """One row an arm: what a step asks of the machine, and what is held between steps."""
    has_peak = any("peak_bytes_above_state" in told for told in document["arms"].values())
    rows = []
    for arm, told in document["arms"].items():
        found = summarise(document, arm)
        row = [arm, count_text(found.launches), count_text(found.syncs), megabytes(told["state_bytes"])]
        rows.append((*row, megabytes(told["peak_bytes_above_state"])) if has_peak else tuple(row))
    headings = ["arm", "launches a step", "syncs a step", "weights, gradients, optimizer (MB)"]
    return Table(tuple([*headings, "peak above that (MB)"] if has_peak else headings), tuple(rows))


def count_text(value: float | None) -> str:
    """A count, or nothing where there is none."""
    return "" if value is None else f"{value:,.0f}"


def scaling_table(document: Document) -> Table:
    """One row an arm of a run in several processes: speed against one process, and what is exchanged in a step."""
    count = document["workload"]["processes"]
    rows = []
    for arm, told in document["arms"].items():
        together = summarise(document, arm).features_per_second
        alone = summarise({**document, **document["alone"]}, arm).features_per_second
        without = document["arms"].get(f"{arm}_alone")
        exposed = "" if without is None else milliseconds(1000 * exposed_seconds(told, without))
        sent = document["wire"][arm]["bytes_a_step"]
        exchanged = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in sent.items() if size >= 5e3) or "nothing"
        rows.append((arm, f"{together:,.1f}", f"{alone:,.1f}", f"{together / (count * alone):.0%}", exposed, exchanged))
    headings = (
        "arm",
        f"features/s of {count}",
        "features/s of one",
        "efficiency",
        "ms a step for exchanges",
        "MB a step in collectives",
    )
    return Table(headings, tuple(rows))


def exposed_seconds(told: Mapping[str, Any], without: Mapping[str, Any]) -> float:
    """Wall seconds of a step that are not there where gradients are not exchanged: medians over rounds."""
    medians = [statistics.median(arm["seconds"]["wall"]) / arm["steps"] for arm in (told, without)]
    return medians[0] - medians[1]


def megabytes(count: int) -> str:
    """Bytes as megabytes."""
    return f"{count / 1e6:,.0f}"


def over_dense_text(found: ArmSummary, spread: float | None) -> str:
    """An arm's time over dense, median and range; a mark where it lies within the noise."""
    ratio = found.over_dense
    if ratio is None:
        return ""
    if found.name == "dense":
        return "1"
    within = spread is not None and abs(ratio.median - 1) <= spread and found.name != "dense_again"
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" + (" =" if within else "")


def phases_table(document: Document) -> Table:
    """Milliseconds of each phase of a step."""
    found = {arm: phases_per_step(document, arm) for arm in document["arms"]}
    shown = [phase for phase in PHASES if any(phase in phases for phases in found.values())]
    rows = [
        (
            arm,
            *(milliseconds(phases[phase]) if phase in phases else "" for phase in shown),
            milliseconds(sum(phases.values())),
        )
        for arm, phases in found.items()
    ]
    return Table(("ms a step", *(_SHORT.get(phase, phase) for phase in shown), "sum"), tuple(rows))


def milliseconds(value: float) -> str:
    """Whole from 10 on."""
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.1f}"


def bars_table(found: Sequence[Verdict]) -> Table:
    """What was promised beside what was measured."""
    rows = []
    for verdict in found:
        bar = verdict.bar
        sign = "at least" if bar.is_floor else "at most"
        measured = "" if verdict.value is None else f"{number(verdict.value)}{bar.unit}"
        where = f"{bar.workload}, {'GPU' if bar.device == 'cuda' else 'CPU'}"
        rows.append((bar.what, where, verdict.status, f"{sign} {number(bar.bound)}{bar.unit}", measured))
    return Table(("bar", "workload", "status", "bound", "measured"), tuple(rows), num_words=3)


def number(value: float) -> str:
    """Three figures, or more where it has more before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def notes(document: Document) -> list[str]:
    """Sentences that belong beside the tables."""
    settings, machine, turn = document["settings"], document["machine"], document["turn"]
    spread = noise(document)
    device = machine.get("device_name", machine["processor"])
    clock = "process CPU time" if document["clock"] == "cpu" else "wall time"
    lines = [
        f"{device}, {machine['threads']} of {machine['cores']} cores; load average {machine['busy_cores_before']} before and "
        f"{machine['busy_cores_after']} after; torch {document['versions']['torch']}, transformers "
        f"{document['versions']['transformers']}",
        f"{settings['precision']}, {settings['batching']} unless the arm says otherwise; a turn is {turn['features']} features of "
        f"{turn['tokens']:,} real tokens in {next(iter(document['arms'].values()))['steps']} steps; {settings['rounds']} rounds in "
        f"turns; features/s by wall time, ratios by {clock}: median (lowest-highest)",
    ]
    if spread is not None:
        lines.append(f"two equal arms differed by up to {spread:.1%}: less than that (=) is no difference")
    peaks = ", ".join(f"{value / 1e12:,.2f} TFLOP/s {name}" for name, value in document["peaks"].items())
    lines.append(f"peak: {peaks}; MFU counts real tokens alone, HFU padding and a live teacher too")
    # Documents of before there were others than question answering do not say their task.
    if document["workload"].get("task") == MASKED_LANGUAGE_MODELING:
        lines.append(head_note(document))
    counted = {told["counts"]["counted"] for told in document["arms"].values() if told["counts"] is not None}
    lines += [f"launches and syncs are of one step: {how}" for how in counted]
    lines.append(
        f"collating 32 features: {collating_milliseconds(document, 'packed'):.3f} ms packed, "
        f"{collating_speedup(document, 'packed').median:,.0f}x as fast as default_data_collator over a datasets.Dataset"
    )
    arms = document["arms"]
    lines += [f"{arm}: {told['what']}" for arm, told in arms.items()]
    for numerics in dict.fromkeys(told["numerics"] for told in arms.values() if told["numerics"]):
        names = [arm for arm, told in arms.items() if told["numerics"] == numerics]
        lines.append(f"{', '.join(names)}: {numerics}")
    lines += [
        f"{arm}: its first turn took {told['warm_up_wall_seconds'][0] - statistics.median(told['seconds']['wall']):,.0f} s longer, for "
        "compiling"
        for arm, told in arms.items()
        if told["is_compiled"]
    ]
    lines += [
        f"{arm}: {told['violations']:,} pruned weights stand off zero after the optimizer's last step"
        for arm, told in arms.items()
        if told["violations"]
    ]
    lines += [f"{arm} was not measured: {why}" for arm, why in document["skipped"].items()]
    worst = max(gate["found"] for gate in document["gates"]) if document["gates"] else 0.0
    lines.append(
        f"{len(document['gates'])} parity gates held before anything was timed; the largest difference was {worst:.1e}"
    )
    return lines


def head_note(document: Document) -> str:
    """What MFU and HFU leave out of masked language modelling."""
    width = document["size"]["width"]
    share = width * (vocabulary_of(document["workload"]["shape"]) + width) / document["size"]["encoder_weights"]
    return (
        f"MFU and HFU count the encoder alone; the scores of the vocabulary take another {share:.0%} of its products with weights at "
        "each token that has them: with a teacher, a quantizer or in b1 all tokens, else the masked ones alone"
    )


def to_markdown(document: Document) -> str:
    """All tables and notes."""
    found = [verdict for verdict in verdicts([document]) if verdict.value is not None]
    parts = [f"# {document['workload']['name']}: {document['workload']['purpose']}\n", f"    {document['command']}\n"]
    parts += [scaling_table(document).to_markdown()] if "alone" in document else []
    parts += [make(document).to_markdown() for make in (speed_table, demands_table, phases_table)]
    if found:
        parts.append(bars_table(found).to_markdown())
    parts.append("\n".join(f"- {line}" for line in notes(document)) + "\n")
    return "\n".join(parts)


def print_report(document: Document) -> None:
    """The tables and notes on the screen."""
    from rich.console import Console

    console = Console()
    console.print(f"[bold]{document['workload']['name']}[/bold]: {document['workload']['purpose']}\n", highlight=False)
    if "alone" in document:
        print_table(console, scaling_table(document))
    speed = speed_table(document)
    print_table(console, speed if console.width >= _WIDE else speed.without("range"))
    for make in (demands_table, phases_table):
        print_table(console, make(document))
    found = [verdict for verdict in verdicts([document]) if verdict.value is not None]
    if found:
        print_table(console, bars_table(found))
    for line in notes(document):
        console.print(line, highlight=False, markup=False)


def print_table(console: Any, table: Table) -> None:
    """A table on the screen, with the numbers to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Shown

    shown = Shown(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1 if console.width >= _WIDE else 0, 0, 0))
    for index, heading in enumerate(table.headings):
        is_number = index >= table.num_words
        if is_number:
            # Numbers do not break; a heading that is longer than they are does.
            longest = max((len(row[index]) for row in table.rows), default=0)
            heading = "\n".join(textwrap.wrap(heading, max(longest, 9), break_long_words=False))
        # Nor does the name of an arm.
        shown.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number or table.num_words == 1)
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown, highlight=False, markup=False)


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(document: Document, path: Path) -> None:
    """Draw where a step's time goes, one bar an arm, into a PNG. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = list(document["arms"])
    found = {arm: phases_per_step(document, arm) for arm in arms}
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(arms))
    left = [0.0] * len(arms)
    for phase, colour in zip(PHASES, _COLOURS, strict=True):
        widths = [found[arm].get(phase, 0.0) for arm in arms]
        if not any(widths):
            continue
        axes.barh(places, widths, 0.72, left=left, color=colour, label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, end in zip(places, left, strict=True):
        axes.text(end, place, f" {end:,.0f} ms", va="center", fontsize=8)
    axes.set_yticks(places, arms)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel("milliseconds of an optimizer step (looked into, so a little slower than timed)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PHASES), frameon=False, fontsize=8)
    settings = document["settings"]
    name = document["machine"].get("device_name", document["machine"]["processor"])
    figure.suptitle(
        f"{document['workload']['name']}, {settings['precision']}: where a step's time goes\n{name}", fontsize=10
    )
    figure.savefig(path, dpi=130)


def write_report(document: Document, folder: Path) -> None:
    """Write results.json, results.md and, with matplotlib, step_breakdown.png."""
    (folder / RESULT_FILES[0]).write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    (folder / RESULT_FILES[1]).write_text(to_markdown(document), "utf-8")
    if can_plot():
        plot(document, folder / RESULT_FILES[2])
