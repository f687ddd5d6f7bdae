"""What an export did and how well: the facts of export_report.json and the tables that a person reads."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from sparse_accel.onnx_export.graph_census import GraphCensus, MatMuls, matmuls_of
from sparse_accel.onnx_export.parity import Difference, Parity, Tolerances

REPORT_FILE: Final = "export_report.json"
FORMAT: Final = 1
_PACKAGES: Final = ("sparse_accel", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Sizes:
    """Bytes of the model's parameters as float32, of the ONNX file, and of the file's constants as bitmasks and
    surviving values."""

    float_bytes: int
    file_bytes: int
    compressed_bytes: int

    @classmethod
    def of(cls, model: Any, census: GraphCensus) -> Sizes:
        """Sizes of a torch model and of the graph that was made from it."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return cls(4 * parameters, census.file_bytes, census.compressed_bytes)


@dataclass(frozen=True)
class Check:
    """The comparison with torch: what came out, what was allowed, and where its text is from. `noise` is how far the
    torch model differs from itself, where that was measured because it decides what is allowed."""

    parity: Parity
    tolerances: Tolerances
    source: str
    noise: Difference | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "text": self.source,
            "tolerances": asdict(self.tolerances),
            "rounding_noise": None if self.noise is None else self.noise.to_json(),
            **self.parity.to_json(),
        }


@dataclass(frozen=True)
class ExportReport:
    """One export. `check` is None when it was switched off, `kernels` counts ONNX Runtime's products by operator,
    `expected` what the plan makes of them; `failures` and `notes` are sentences, `seconds` name -> duration."""

    folder: Path
    model: str
    task: str
    graph_format: str
    sizes: Sizes
    census: GraphCensus
    kernels: Mapping[str, int]
    expected: MatMuls
    check: Check | None
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing failed that was checked."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values: the content of export_report.json."""
        return {
            "sparse_accel_export_report": FORMAT,
            "model": self.model,
            "task": self.task,
            "format": self.graph_format,
            "passed": self.passed,
            "failures": list(self.failures),
            "notes": list(self.notes),
            "sizes": asdict(self.sizes),
            "parity": None if self.check is None else self.check.to_json(),
            "kernels": {
                "found": dict(self.kernels),
                "integer": matmuls_of(self.kernels).integer,
                "floating": matmuls_of(self.kernels).floating,
                "expected_integer": self.expected.integer,
                "expected_floating": self.expected.floating,
            },
            "census": self.census.to_json(),
            "options": dict(self.options),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """The versions that an export depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def print_report(report: ExportReport) -> None:
    """The tables of an export: sizes, weights, products, and the comparison with torch; then what failed."""
    from rich.console import Console

    console = Console()
    console.print(_contents(report))
    if report.check is not None:
        console.print(_comparison(report.check))
    for note in report.notes:
        console.print(f"note: {note}", highlight=False)
    for failure in report.failures:
        console.print(f"failed: {failure}", style="red", highlight=False)
    if report.passed:
        verdict = "the check was left out" if report.check is None else "the check passed"
        console.print(f"{verdict}; the deployment is in {report.folder}", highlight=False, soft_wrap=True)


def _contents(report: ExportReport) -> Any:
    from rich.table import Table

    sizes, census, products = report.sizes, report.census, matmuls_of(report.kernels)
    table = Table(title=f"{report.model} as {report.graph_format} ONNX", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    share = sizes.file_bytes / sizes.float_bytes if sizes.float_bytes else 0.0
    table.add_row("parameters in float32", _size(sizes.float_bytes))
    table.add_row("the ONNX file", f"{_size(sizes.file_bytes)} ({share:.0%})")
    table.add_row("its constants without their zeros", _size(sizes.compressed_bytes))
    table.add_section()
    for dtype, count in census.by_dtype().items():
        zeros = f", {count.zeros / count.numel:.2%} zero" if count.numel else ""
        table.add_row(f"{dtype} in {count.tensors} tensors", f"{count.numel:,}{zeros}")
    if report.check is not None:
        table.add_section()
        table.add_row(
            "products of integers in ONNX Runtime", f"{products.integer} ({report.expected.integer} expected)"
        )
        table.add_row("products of floats", f"{products.floating} ({report.expected.floating} expected)")
    return table


def _comparison(check: Check) -> Any:
    from rich.table import Table

    parity, tolerances, total = check.parity, check.tolerances, check.parity.total
    table = Table(
        title=f"Logits of {parity.exported} against {parity.reference}, text of {check.source}",
        caption=f"Shares of the logits' standard deviation, {total.spread:.3g}. The largest difference, {total.max_abs:.2g}, "
        "decides nothing.",
    )
    for heading in ("Batch", "Rows", "Mean", "99%", "Largest", "Same answer"):
        table.add_column(heading, justify="left" if heading == "Batch" else "right")
    for shape in parity.shapes:
        table.add_row(f"{shape.batch} x {shape.length}", *_cells(shape.difference))
    table.add_section()
    table.add_row("all", *_cells(total))
    if check.noise is not None:
        table.add_row("torch against itself", *_cells(check.noise))
    table.add_row("allowed", "", *map(_percent, (tolerances.mean, tolerances.p99)), "", f"{tolerances.agreement:.1%}")
    return table


def _cells(entry: Difference) -> list[str]:
    """Rows, the three differences, and the predictions that are the same or as good: one a row, or one a token."""
    same = f"{entry.num_same} + {entry.num_ties} tied" if entry.num_ties else f"{entry.num_same}"
    if entry.num_predictions != entry.num_features:
        same += f" of {entry.num_predictions} tokens"
    return [str(entry.num_features), *map(_percent, (entry.mean, entry.p99, entry.max)), same]


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-4 or share == 0 else f"{share:.0e}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"
