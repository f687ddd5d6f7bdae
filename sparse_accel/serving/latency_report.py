"""What a latency benchmark found, for people and programs: sentences, a table, JSON, Markdown and a plot."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import permutations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparse_accel.errors import OptionError, OutputError, suggestion
from sparse_accel.serving.latency import (
    Cell,
    Contender,
    Grid,
    Measured,
    Speedup,
    Timing,
    Traits,
    graph_bytes,
    speedup,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULT_FILES: Final = ("results.json", "results.md", "latency.png")
VARIANTS: Final = "variants"

_FORMAT: Final = 1
# A difference below two percent is not worth a word, however sure: the place of a buffer in memory makes as much.
_WORTH_A_WORD: Final = 1.02
# Shares of zeros that far apart are different, and those that near alike.
_SPARSER_BY: Final = 0.2
_ALIKE: Final = 0.05

_ENGINE_NAMES: Final = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "torch"}
# What an engine computes a float graph in.
_FLOAT_NAMES: Final = {"onnxruntime": "float32", "openvino": "float", "torch": "float32"}

# (question, verdict) -> the clause that answers it.
_CLAUSES: Final = {
    ("int8", "faster"): "int8 is {numbers} as fast as {float}",
    ("int8", "nothing"): "int8 bought nothing: {numbers}",
    ("int8", "slower"): "int8 is slower than {float}: {numbers} as fast",
    ("zeros", "faster"): "zeros made it {numbers} as fast",
    ("zeros", "nothing"): "zeros bought nothing: {numbers}",
    ("zeros", "slower"): "zeros cost speed: {numbers} as fast",
    ("model", "faster"): "{subject} is {numbers} as fast as {reference}",
    ("model", "nothing"): "{subject} is no faster than {reference}: {numbers}",
    ("model", "slower"): "{subject} is slower than {reference}: {numbers} as fast",
}


@dataclass(frozen=True)
class LatencyReport:
    """A finished benchmark. Speed-ups are over the contender `baseline`; `command` repeats the benchmark; `notes` are
    sentences for the person."""

    measured: Measured
    contenders: tuple[Contender, ...]
    baseline: str
    grid: Grid
    machine: Mapping[str, Any]
    command: str
    device: str = "cpu"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two cells of one setting that differ in one thing: `question` is int8, zeros, or model where they differ in
    more. `circumstance` tells comparisons of one question apart."""

    question: str
    subject: Cell
    reference: Cell
    circumstance: str
    speedup: Speedup

    @property
    def verdict(self) -> str:
        """faster, slower, or nothing: a difference within the spread of the measurements, or below two percent."""
        if self.speedup.low > _WORTH_A_WORD:
            return "faster"
        return "slower" if self.speedup.high < 1 / _WORTH_A_WORD else "nothing"


def check_baseline(name: str | None, names: Sequence[str]) -> str:
    """The contender that others are compared with: the first, unless named. Raises OptionError with the nearest
    name."""
    if name is not None and name not in names:
        raise OptionError(f"--baseline: no model is called {name!r}{suggestion(name, names)}")
    return name or names[0]


def comparisons(report: LatencyReport) -> list[Comparison]:
    """All that can be compared within one setting: int8 with float of equal zeros, sparse with dense of equal type;
    a contender that has no such partner, with the baseline."""
    timings = {timing.cell: timing for timing in report.measured.timings}
    traits = {contender.name: contender.traits for contender in report.contenders}
    found = []
    names = [contender.name for contender in report.contenders]
    asked = {pair: _question(traits[pair[0]], traits[pair[1]]) for pair in permutations(names, 2)}
    explained = {name for pair, question in asked.items() if question is not None for name in pair}
    for name in names:
        if name not in explained or report.baseline not in explained:
            asked[name, report.baseline] = ("model", "")
    for subject, reference in permutations(timings.values(), 2):
        question = asked.get((subject.cell.model, reference.cell.model))
        if subject.cell.setting == reference.cell.setting and question is not None:
            found.append(
                Comparison(question[0], subject.cell, reference.cell, question[1], speedup(subject, reference))
            )
    return found


def _question(subject: Traits | None, reference: Traits | None) -> tuple[str, str] | None:
    """What alone distinguishes the subject, and under which circumstance."""
    if subject is None or reference is None or subject.family != reference.family:
        return None
    more_zeros = subject.sparsity - reference.sparsity
    if subject.int8 and not reference.int8 and abs(more_zeros) <= _ALIKE:
        return "int8", "dense" if subject.sparsity <= _ALIKE else f"{subject.sparsity:.0%} zeros"
    if subject.int8 == reference.int8 and more_zeros >= _SPARSER_BY:
        return "zeros", "int8" if subject.int8 else "float"
    return None


def sentences(report: LatencyReport) -> list[str]:
    """What int8 and zeros bought, or by how much the models differ: one sentence a setting, and where an engine has
    several settings, one that sums them up."""
    found = comparisons(report)
    lines = []
    for engine in report.grid.engines:
        of_engine = [comparison for comparison in found if comparison.subject.engine == engine]
        settings = list(dict.fromkeys(comparison.subject.setting for comparison in of_engine))
        for setting in settings:
            clauses = _clauses([comparison for comparison in of_engine if comparison.subject.setting == setting])
            lines.append(f"{_setting_words(setting)}: {'; '.join(clauses)}.")
        if len(settings) > 1:
            lines.append(f"{_ENGINE_NAMES[engine]} in all: {'; '.join(_sums(of_engine))}.")
    return lines


def _setting_words(setting: tuple[str, int, int, int]) -> str:
    engine, threads, batch_size, length = setting
    return f"{_ENGINE_NAMES[engine]}, length {length}, batch {batch_size}, {threads} thread{'s' * (threads > 1)}"


def _clauses(found: Sequence[Comparison]) -> list[str]:
    """The answers of one setting, those to the same question and with the same verdict together."""
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for comparison in found:
        subject = comparison.subject.model if comparison.question == "model" else ""
        groups.setdefault((comparison.question, subject, comparison.verdict), []).append(comparison)
    clauses = []
    for question in ("int8", "zeros", "model"):
        several = sum(comparison.question == question for comparison in found) > 1 and question != "model"
        for (asked, _, verdict), group in groups.items():
            if asked != question:
                continue
            numbers = [
                f"{comparison.speedup.value:.2f}x" + (f" ({comparison.circumstance})" if several else "")
                for comparison in group
            ]
            clauses.append(_clause(question, verdict, " and ".join(numbers), group[0]))
    return clauses


def _sums(found: Sequence[Comparison]) -> list[str]:
    """The answers of one engine over all its settings."""
    clauses = []
    keys = dict.fromkeys(
        (comparison.question, comparison.subject.model if comparison.question == "model" else "")
        for comparison in found
    )
    for question, model in sorted(keys, key=lambda key: ("int8", "zeros", "model").index(key[0])):
        group = [c for c in found if c.question == question and model in ("", c.subject.model)]
        values = [comparison.speedup.value for comparison in group]
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        numbers = f"{low}x" if low == high else f"{low} to {high}x"
        verdicts = {comparison.verdict for comparison in group}
        if len(verdicts) == 1:
            clauses.append(_clause(question, verdicts.pop(), numbers, group[0]))
        else:
            won = sum(comparison.verdict == "faster" for comparison in group)
            lost = sum(comparison.verdict == "slower" for comparison in group)
            subject = model or question
            clauses.append(f"{subject} won {won} and lost {lost} of {len(group)} comparisons ({numbers})")
    return clauses


def _clause(question: str, verdict: str, numbers: str, example: Comparison) -> str:
    return _CLAUSES[question, verdict].format(
        numbers=numbers,
        float=_FLOAT_NAMES[example.subject.engine],
        subject=example.subject.model,
        reference=example.reference.model,
    )


@dataclass(frozen=True)
class Rows:
    """The rows of one setting, as text: what tells the setting from others, and the cells of each row."""

    setting: dict[str, str]
    cells: list[list[str]]


@dataclass(frozen=True)
class Latencies:
    """The table as text: what is the same in all its rows, the headings (model first), and a section a setting."""

    common: str
    headings: list[str]
    sections: list[Rows]


def table(report: LatencyReport) -> Latencies:
    """Percentiles, throughput and speed-ups; with several engines also those over the baseline with the first
    engine."""
    timings = report.measured.timings
    settings = {timing.cell.setting: _setting_cells(timing.cell) for timing in timings}
    names = next(iter(settings.values()))
    constant = [name for name in names if len({cells[name] for cells in settings.values()}) == 1]
    references = {timing.cell: timing for timing in timings}
    first_engine = report.grid.engines[0]
    several_engines = "engine" not in constant
    headings = ["model", "p50 ms", "p90 ms", "p99 ms", "seq/s", "speed-up", "95 %"]
    if several_engines:
        headings.append(f"vs {_ENGINE_NAMES[first_engine]}")
    sections = []
    for setting, cells in settings.items():
        rows = []
        for timing in timings:
            cell = timing.cell
            if cell.setting != setting:
                continue
            row = [cell.model, *(_milliseconds(timing.percentile(percent)) for percent in (50, 90, 99))]
            row.append(f"{timing.throughput:.3g}" if timing.throughput < 100 else f"{timing.throughput:.0f}")
            row += _speedup_words(timing, references.get(_beside(cell, report.baseline, cell.engine)))
            if several_engines:
                first = references.get(_beside(cell, report.baseline, first_engine))
                row.append("" if first is None else f"{speedup_value(timing, first):.2f}x")
            rows.append(row)
        sections.append(Rows({name: text for name, text in cells.items() if name not in constant}, rows))
    return Latencies(", ".join(_setting_text({name: names[name] for name in constant})), headings, sections)


def _setting_cells(cell: Cell) -> dict[str, str]:
    return {
        "engine": _ENGINE_NAMES[cell.engine],
        "threads": str(cell.threads),
        "batch": str(cell.batch_size),
        "length": str(cell.sequence_length),
    }


def _setting_text(cells: Mapping[str, str]) -> list[str]:
    return [text if name == "engine" else f"{name} {text}" for name, text in cells.items()]


def speedup_value(timing: Timing, baseline: Timing) -> float:
    """p50 of `baseline` over p50 of `timing`."""
    return baseline.percentile(50) / timing.percentile(50)


def _beside(cell: Cell, model: str, engine: str) -> Cell:
    return Cell(model, engine, cell.threads, cell.batch_size, cell.sequence_length)


def _speedup_words(timing: Timing, baseline: Timing | None) -> list[str]:
    if baseline is None:
        return ["", ""]
    if baseline is timing:
        return ["1.00x", ""]
    ratio = speedup(timing, baseline)
    return [f"{ratio.value:.2f}x", f"{ratio.low:.2f}-{ratio.high:.2f}"]


def _milliseconds(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _megabytes(folder: Path) -> str:
    size = graph_bytes(folder)
    return "" if size is None else f"{size / 1e6:.1f} MB"


def model_lines(report: LatencyReport) -> list[str]:
    """One line a contender: type, zeros and size, as far as they are known."""
    lines = []
    for contender in report.contenders:
        words = [_megabytes(contender.folder)]
        if contender.traits is not None:
            type_name = "int8" if contender.traits.int8 else "float"
            words = [type_name, f"{contender.traits.sparsity:.1%} zeros", *words]
        known = ", ".join(word for word in words if word)
        baseline = "; the baseline" if contender.name == report.baseline else ""
        lines.append(f"{contender.name}: {known or 'no graph'}{baseline}")
    return lines


def machine_line(report: LatencyReport) -> str:
    """The machine in one line."""
    machine = report.machine
    has = [name.upper() for name in ("avx512", "vnni", "bf16", "amx") if machine[name]]
    words = [machine["processor"], f"{machine['cores']} cores", *(has or ["no AVX-512"])]
    return ", ".join(words) + ("" if report.device == "cpu" else f"; device {report.device}")


def notes(report: LatencyReport) -> list[str]:
    """What a reader should know about the numbers, the report's own notes first."""
    lines = list(report.notes)
    fewest = min(timing.calls for timing in report.measured.timings)
    if fewest < 100:
        lines.append(
            f"some rows have only {fewest} calls, so their p99 is close to the slowest one; --seconds gives more"
        )
    if min(len(timing.rounds) for timing in report.measured.timings) < 6:
        lines.append("with fewer than six rounds the interval is their range, and promises less than 95 %")
    busy = report.machine["busy_cores_before"]
    if busy is not None and busy > 0.25 * report.machine["cores"]:
        lines.append(
            f"other programs kept {busy:g} of {report.machine['cores']} cores busy when this began; ratios suffer less "
            "than times, since the models took turns"
        )
    most = max(report.grid.threads)
    if most > report.machine["cores"]:
        lines.append(f"{most} threads share {report.machine['cores']} cores")
    if "openvino" in report.grid.engines and report.machine["bf16"]:
        lines.append("OpenVINO may compute a float graph in bfloat16 on this processor, so float is not float32 there")
    has_int8 = any(contender.traits is not None and contender.traits.int8 for contender in report.contenders)
    x86_without = not report.machine["vnni"] and report.machine["system"].endswith(("x86_64", "AMD64"))
    if has_int8 and x86_without:
        lines.append("this processor has no VNNI instructions, which are what makes int8 quick")
    return lines


def failure_lines(report: LatencyReport) -> list[str]:
    """What could not be measured: one line a model, engine and reason."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for failure in report.measured.failures:
        groups.setdefault((failure.cell.model, failure.cell.engine, failure.reason), []).append(failure.cell)
    return [
        f"{model} with {_ENGINE_NAMES[engine]} ({len(cells)} row{'s' * (len(cells) > 1)}): {reason}"
        for (model, engine, reason), cells in groups.items()
    ]


def to_json(report: LatencyReport, home: Path | None = None) -> dict[str, Any]:
    """Everything as plain values; times in milliseconds, throughput in sequences per second. Folders below `home` are
    told relative to it."""
    references = {timing.cell: timing for timing in report.measured.timings}
    results = []
    for timing in report.measured.timings:
        baseline = references.get(_beside(timing.cell, report.baseline, timing.cell.engine))
        results.append(
            {
                **asdict(timing.cell),
                "calls": timing.calls,
                "rounds": len(timing.rounds),
                **{f"p{percent}_ms": round(timing.percentile(percent), 4) for percent in (50, 90, 99)},
                "sequences_per_second": round(timing.throughput, 3),
                "speedup": None if baseline is None else _json_speedup(speedup(timing, baseline)),
            }
        )
    return {
        "sparse_accel_benchmark": _FORMAT,
        "command": report.command,
        "device": report.device,
        "machine": dict(report.machine),
        "method": {
            "order": "models, engines, batch sizes and lengths took turns, every other round backwards; one thread count "
            "after the other",
            "percentiles": "linear interpolation between calls",
            "speedup": "p50 of the baseline over p50, same engine, threads, batch size and length; low and high are order "
            "statistics of the ratios within each round, 95 percent",
            "inputs": "random token ids, nothing padded",
        },
        "models": [
            {
                "name": contender.name,
                "folder": str(
                    contender.folder.relative_to(home)
                    if home is not None and contender.folder.is_relative_to(home)
                    else contender.folder
                ),
                "bytes": graph_bytes(contender.folder),
                **({} if contender.traits is None else asdict(contender.traits)),
            }
            for contender in report.contenders
        ],
        "baseline": report.baseline,
        "results": results,
        "failures": [{**asdict(failure.cell), "reason": failure.reason} for failure in report.measured.failures],
        "comparisons": [
            {
                "question": comparison.question,
                "subject": comparison.subject.model,
                "reference": comparison.reference.model,
                **dict(
                    zip(("engine", "threads", "batch_size", "sequence_length"), comparison.subject.setting, strict=True)
                ),
                "speedup": _json_speedup(comparison.speedup),
                "verdict": comparison.verdict,
            }
            for comparison in comparisons(report)
        ],
        "words": sentences(report),
        "notes": notes(report),
    }


def _json_speedup(value: Speedup) -> dict[str, float]:
    return {name: round(number, 4) for name, number in asdict(value).items()}


def to_markdown(report: LatencyReport) -> str:
    """The report as a page: what was found, the table, the machine and the command."""
    found = table(report)
    lines = ["# Latency", "", *(f"* {line}" for line in sentences(report)), ""]
    if found.common:
        lines += [f"All rows: {found.common}.", ""]
    settings = list(found.sections[0].setting)
    left = len(settings) + 1
    lines.append("| " + " | ".join([*settings, *found.headings]) + " |")
    lines.append("|" + "---|" * left + "---:|" * (len(found.headings) - 1))
    for section in found.sections:
        for index, cells in enumerate(section.cells):
            shown = list(section.setting.values()) if index == 0 else [""] * len(settings)
            lines.append("| " + " | ".join([*shown, *cells]) + " |")
    lines += ["", f"{_speedup_caption(report)}.", ""]
    lines += [f"* {line}" for line in model_lines(report)]
    lines += ["", f"Machine: {machine_line(report)}; {_version_words(report)}.", ""]
    lines += [f"* not measured: {line}" for line in failure_lines(report)]
    lines += [f"* note: {line}" for line in notes(report)]
    lines += ["", "```", report.command, "```", ""]
    return "\n".join(lines)


def _speedup_caption(report: LatencyReport) -> str:
    words = f"speed-up, and its 95 % interval: over {report.baseline} in the same setting"
    if len({timing.cell.engine for timing in report.measured.timings}) > 1:
        first = _ENGINE_NAMES[report.grid.engines[0]]
        words += f"; vs {first}: over {report.baseline} with {first}"
    return words


def _version_words(report: LatencyReport) -> str:
    return ", ".join(f"{name} {version}" for name, version in report.machine["versions"].items())


def print_report(report: LatencyReport) -> None:
    """The table, what it means, and what could not be measured."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    found = table(report)
    shown = Table(
        title=f"Latency: {found.common}" if found.common else "Latency",
        caption=_speedup_caption(report),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, heading in enumerate(found.headings):
        # Only the name of a model may wrap; a long heading is broken where it does no harm.
        shown.add_column(
            heading.replace("ONNX Runtime", "ONNX\nRuntime"), justify="right" if index else "left", no_wrap=index > 0
        )
    for section in found.sections:
        if section.setting:
            shown.add_row(f"[bold]{', '.join(_setting_text(section.setting))}[/bold]")
        for cells in section.cells:
            shown.add_row(*map(escape, cells))
        shown.add_section()
    console.print(shown)
    for line in sentences(report):
        console.print(line, highlight=False, markup=False)
    console.print()
    for line in model_lines(report):
        console.print(line, highlight=False, markup=False)
    console.print(f"machine: {machine_line(report)}", highlight=False, markup=False)
    for line in failure_lines(report):
        console.print(f"not measured: {line}", highlight=False, markup=False, style="yellow")
    for line in notes(report):
        console.print(f"note: {line}", highlight=False, markup=False)


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


# Blue for float, orange for int8, the sparse one of each darker; what follows is for further models.
_COLOURS: Final = ("#9ecae1", "#2171b5", "#fdae6b", "#d94801", "#74c476", "#6a51a3", "#969696", "#e377c2")


def plot(report: LatencyReport, path: Path) -> None:
    """Draw p50 with whiskers up to p90 into a PNG: a panel for each engine, thread count and batch size, in it a group of
    bars for each length. Panels of one batch size have one scale. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timings = {timing.cell: timing for timing in report.measured.timings}
    grid = report.grid
    engines = [engine for engine in grid.engines if any(cell.engine == engine for cell in timings)]
    names = [contender.name for contender in report.contenders]
    # Thread counts side by side and engines below each other; engines side by side where there is one thread count.
    wide = len(grid.threads) == 1
    pairs = (
        [[(engine, grid.threads[0]) for engine in engines]]
        if wide
        else [[(e, t) for t in grid.threads] for e in engines]
    )
    rows = list(product(grid.batch_sizes, pairs))
    width = max(3.4, 0.52 * len(names) * len(grid.sequence_lengths) + 0.8)
    figure = Figure(figsize=(max(6.5, 0.8 + width * len(pairs[0])), 1.6 + 2.9 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), len(pairs[0]), squeeze=False)
    for row, (batch_size, beside) in enumerate(rows):
        for axes, (engine, threads) in zip(panels[row], beside, strict=True):
            _draw_panel(axes, timings, names, engine, threads, batch_size, grid.sequence_lengths)
            words = f"{_ENGINE_NAMES[engine]}, {threads} thread{'s' * (threads > 1)}"
            axes.set_title(f"{words}, batch {batch_size}", fontsize=10)
        panels[row][0].set_ylabel("latency of one call (ms)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    figure.suptitle(f"Latency: p50, whiskers to p90 (shorter is faster)\n{machine_line(report)}", fontsize=11)
    figure.savefig(path, dpi=130)


def _draw_panel(
    axes: Axes,
    timings: Mapping[Cell, Timing],
    names: Sequence[str],
    engine: str,
    threads: int,
    batch_size: int,
    lengths: Sequence[int],
) -> None:
    bar = 0.84 / len(names)
    highest = max(
        (timing.percentile(90) for cell, timing in timings.items() if cell.batch_size == batch_size), default=1.0
    )
    for index, name in enumerate(names):
        colour = _COLOURS[index % len(_COLOURS)]
        cells = [Cell(name, engine, threads, batch_size, length) for length in lengths]
        found = [(at, timings[cell]) for at, cell in enumerate(cells) if cell in timings]
        places = [at + (index - (len(names) - 1) / 2) * bar for at, _ in found]
        middle = [timing.percentile(50) for _, timing in found]
        upper = [timing.percentile(90) for _, timing in found]
        whiskers = [[0.0] * len(found), [high - p50 for high, p50 in zip(upper, middle, strict=True)]]
        axes.bar(places, middle, 0.92 * bar, yerr=whiskers, color=colour, label=name, capsize=2.5, error_kw={"lw": 0.9})
        for place, p50, p90 in zip(places, middle, upper, strict=True):
            axes.text(place, p90 + 0.015 * highest, _milliseconds(p50), ha="center", va="bottom", fontsize=7.5)
    axes.set_xticks(range(len(lengths)), [f"length {length}" for length in lengths])
    axes.set_ylim(0, 1.1 * highest)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(True, linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise OutputError for an output folder that is a file, or that holds a benchmark already."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output_dir: is a file, not a folder: {output}")
    present = [name for name in (*RESULT_FILES, VARIANTS) if (output / name).exists()]
    if present and not overwrite:
        raise OutputError(f"--output_dir: {output} holds {present[0]} already; name another, or pass --overwrite")


@contextmanager
def filled_output(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into; what is in it moves into `output` once all went well, and replaces what
    has the same name there."""
    partial = output.absolute().parent / f".{output.name}.partial-{os.getpid()}"
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"--output_dir {output} cannot be written: {error}") from error
        yield partial
        try:
            output.mkdir(parents=True, exist_ok=True)
            for entry in sorted(partial.iterdir()):
                if (output / entry.name).is_dir():
                    shutil.rmtree(output / entry.name)
                entry.replace(output / entry.name)
        except OSError as error:
            raise OutputError(f"--output_dir {output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_report(report: LatencyReport, folder: Path) -> None:
    """Write results.json, results.md and, with matplotlib, latency.png."""
    try:
        (folder / RESULT_FILES[0]).write_text(json.dumps(to_json(report, folder), indent=2) + "\n", "utf-8")
        (folder / RESULT_FILES[1]).write_text(to_markdown(report), "utf-8")
        if can_plot():
            plot(report, folder / RESULT_FILES[2])
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error}") from error
