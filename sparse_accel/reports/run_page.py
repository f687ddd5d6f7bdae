"""The page of a training run: what the recipe did when, losses, scores, zeros and scales by layer, and how it was run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from sparse_accel.compress.inspection import QuantizerFacts
from sparse_accel.recipe.timeline_shapes import Course, Curve, Lane
from sparse_accel.reports.charts import Band, Line, lanes, line_chart
from sparse_accel.reports.layers import LayerZeros, heat_maps, quantizer_tables, scale_chart
from sparse_accel.reports.page import (
    code,
    columns,
    details,
    page,
    paragraph,
    percent,
    section,
    short,
    size,
    table,
    tiles,
)

# Of a logged line: what is no loss, and what has a picture of its own.
_PLACES: Final = frozenset({"step", "epoch", "learning_rate", "phase"})
# Parts of the names of metrics that are no scores; a second validation set has them with a suffix.
_COUNTERS: Final = ("_samples", "_runtime", "_total", "_number")
_PHASES: Final = {"observing": ("moving", "quantizer ranges move"), "frozen": ("fixed", "quantizer ranges fixed")}
_LANE_LOOKS: Final = {"zeros": "zeros", "moving": "moving", "fixed": "fixed", "teacher": "teacher"}
# Zeros that differ by less look the same in a heat map; the table has them.
_VISIBLE: Final = 0.01
# From so many epochs on, an axis needs no parts of one.
_MANY_EPOCHS: Final = 3
# Scores that a person asks for first, and how many of them a page begins with; a picture has so many lines at most.
_HEADLINES: Final = (
    "exact_match", "exact", "f1", "accuracy", "accuracy_mm", "matthews_correlation", "pearson", "spearmanr", "f1_macro",
    "mse", "perplexity",
)  # fmt: skip
_NUM_HEADLINES: Final = 3
_MOST_LINES: Final = 6
# Parts of the names of metrics with a scale of their own.
_OWN_SCALE: Final = ("loss", "perplexity", "mse")


@dataclass(frozen=True)
class Shapes:
    """The recipe's timeline as it is drawn: learning rates, lanes and sparsities over epochs; `groups` names the curves' groups."""

    num_epochs: float
    groups: tuple[str, ...]
    curves: tuple[Curve, ...]
    lanes: tuple[Lane, ...]
    pruning: tuple[Course, ...] = ()


@dataclass(frozen=True)
class RunStory:
    """All that the page tells. `facts` is report.json, `history` and `results` are trainer_state.json's log and
    all_results.json; `exported` is an export_report.json, where the model was exported."""

    facts: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]
    shapes: Shapes | None = None
    quantizers: Sequence[QuantizerFacts] = ()
    recipe_text: str = ""
    exported: Mapping[str, Any] | None = None
    deployment: str = ""
    evaluations: Sequence[Mapping[str, Any]] = field(init=False)
    lines: Sequence[Mapping[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "evaluations", [line for line in self.history if _is_evaluation(line)])
        object.__setattr__(self, "lines", [line for line in self.history if "loss" in line])


def run_page(story: RunStory) -> str:
    """One self-contained HTML document."""
    facts = story.facts
    about = f"{facts['model']}, trained for {facts['task'].replace('_', ' ')}; finished {facts['finished']}"
    return page(
        facts["name"],
        about,
        [
            tiles(_headline(story)),
            section("What the recipe did" if story.recipe_text else "Learning rate", *_timeline(story)),
            section("Loss", *_losses(story)),
            section("Scores by evaluation", *_scores(story)),
            section("Zeros by layer", *_zeros(facts)),
            section("Quantized tensors", scale_chart(story.quantizers), quantizer_tables(story.quantizers))
            if story.quantizers
            else "",
            section("Export", *_export(story.exported, story.deployment)) if story.exported is not None else "",
            section("How it was run", *_circumstances(story)),
            section(
                "All results", table(["", "value"], [[name, number(value)] for name, value in story.results.items()])
            ),
        ],
    )


def number(value: Any) -> str:
    """A result as people read it.

    >>> number(85.2345), number(1200), number(0.00001234), number("x")
    ('85.2345', '1,200', '1.23e-5', 'x')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.4f}".rstrip("0").rstrip(".") if value == 0 or abs(value) >= 0.001 else short(value)


# --- sections ---------------------------------------------------------------------------------------------------------


def _headline(story: RunStory) -> list[tuple[str, str]]:
    facts, results = story.facts, story.results
    shown = [
        (name.partition("_")[2].replace("_", " "), f"{value:.4g}")
        for key in _HEADLINES
        for name, value in results.items()
        if name == f"eval_{key}"
    ][:_NUM_HEADLINES]
    prunable = facts["prunable"]
    shown.append(("zeros of the prunable weights", percent(_share(prunable["zeros"], prunable["numel"]))))
    if story.quantizers:
        shown.append(("quantized tensors", f"{len(story.quantizers):,}"))
    if "train_samples_per_second" in results:
        shown.append(("training, features/s", f"{results['train_samples_per_second']:,.1f}"))
    shown.append(("training time", _duration(facts["seconds"])))
    return shown


def _timeline(story: RunStory) -> Iterator[str]:
    per_epoch = story.facts["steps"]["per_epoch"]
    # A line stands after its step, and the rate is the one that the step was taken with.
    logged = [
        ((line["step"] - 1) / per_epoch, line["learning_rate"]) for line in story.lines if "learning_rate" in line
    ]
    shapes = story.shapes
    planned = shapes is not None and bool(shapes.curves)
    lines = [Line("as logged", [logged], is_faint=planned)]
    if shapes is not None:
        for index, name in enumerate(shapes.groups):
            pieces = [curve.points for curve in shapes.curves if curve.group == index]
            lines.append(Line(f"recipe{name}", pieces))
    end = shapes.num_epochs if shapes is not None else max((epoch for epoch, _ in logged), default=1.0)
    yield line_chart("Learning rate", lines, x_name="epoch", y_name="learning rate", x_range=(0.0, end))
    if shapes is not None and shapes.pruning:
        pruning = [Line(course.name, [_as_steps(course.points)]) for course in shapes.pruning]
        yield line_chart("Sparsity", pruning, x_name="epoch", y_name="share of zeros", x_range=(0.0, end))
    if shapes is not None and shapes.lanes:
        yield lanes(
            [
                (lane.name, [(bar.start, bar.end, _LANE_LOOKS[bar.look], bar.words) for bar in lane.bars])
                for lane in shapes.lanes
            ],
            end,
            "epoch",
        )
    if story.facts["one_shot"]:
        yield paragraph("The recipe's end state was applied at once (--one_shot); nothing was trained.")
    if story.recipe_text:
        yield details("the recipe, as it was carried out", code(story.recipe_text))


def _as_steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points between which a value stands still, with a corner before each change."""
    corners = []
    for (_, before), (epoch, value) in pairwise(points):
        corners += [(epoch, before), (epoch, value)]
    return [*points[:1], *corners]


def _losses(story: RunStory) -> Iterator[str]:
    terms = [key for key in dict.fromkeys(key for line in story.lines for key in line) if key.endswith("loss")]
    terms.sort(key=lambda term: (term != "loss", term))
    bands = _bands(story.lines)

    def drawn(key: str) -> str:
        line = Line(key.replace("_", " "), [[(line["step"], line[key]) for line in story.lines if key in line]])
        return line_chart(
            line.name.capitalize(), [line], x_name="optimizer step", y_name=line.name, is_whole=True, bands=bands
        )

    yield drawn("loss") if story.lines else ""
    if len(terms) > 2:  # with one, it is the loss
        yield columns(*(drawn(term) for term in terms if term != "loss"))
    others = dict.fromkeys(
        key
        for line in story.lines
        for key, value in line.items()
        if key not in _PLACES and not key.endswith("loss") and isinstance(value, int | float)
    )
    yield columns(*(drawn(key) for key in others))


def _bands(lines: Sequence[Mapping[str, Any]]) -> list[Band]:
    """Where quantizers worked, by the phases of the logged lines; each line speaks of the steps since the one before."""
    bands: list[Band] = []
    before = 0
    for line in lines:
        look = _PHASES.get(line.get("phase", ""))
        if look is not None:
            if bands and bands[-1].look == look[0] and bands[-1].end == before:
                bands[-1] = Band(bands[-1].start, line["step"], *look)
            else:
                bands.append(Band(before, line["step"], *look))
        before = line["step"]
    return bands


def _scores(story: RunStory) -> Iterator[str]:
    metrics = [
        key
        for key in dict.fromkeys(key for line in story.evaluations for key in line)
        if key.startswith("eval_") and not any(counter in key for counter in _COUNTERS)
    ]
    groups: dict[str, list[str]] = {}
    scores = [metric for metric in metrics if not any(part in metric for part in _OWN_SCALE)]
    most = max((line[metric] for line in story.evaluations for metric in scores if metric in line), default=0.0)
    for metric in metrics:
        groups.setdefault(_scale(metric, most), []).append(metric)
    for title, members in groups.items():
        if len(members) > _MOST_LINES:
            asked_for = [metric for metric in members if metric.removeprefix("eval_") in _HEADLINES]
            groups[title] = asked_for or members[:_MOST_LINES]
    if len(story.evaluations) > 1:
        yield columns(
            *(
                line_chart(
                    title,
                    [
                        Line(
                            _plain(metric),
                            [[(line["epoch"], line[metric]) for line in story.evaluations if metric in line]],
                            has_dots=True,
                        )
                        for metric in members
                    ],
                    x_name="epoch",
                    y_name=", ".join(_plain(metric) for metric in members),
                    from_zero=False,
                    is_whole=story.evaluations[-1]["epoch"] >= _MANY_EPOCHS,
                )
                for title, members in groups.items()
            )
        )
    if story.evaluations:
        speed = "eval_samples_per_second"
        yield table(
            ["step", "epoch", *map(_plain, metrics), "features/s"],
            [
                [number(line["step"]), number(line["epoch"])]
                + [number(line.get(metric, "-")) for metric in metrics]
                + [f"{line[speed]:,.1f}" if speed in line else "-"]
                for line in story.evaluations
            ],
            num_words=0,
            is_tall=len(story.evaluations) > 20,
        )


def _scale(metric: str, most: float) -> str:
    """Metrics of one scale share a picture: a task's scores all are percents, or all shares of 1."""
    if any(part in metric for part in _OWN_SCALE):
        return _plain(metric)
    return "Scores, shares of 1" if most <= 1.0 else "Scores, percent"


def _plain(metric: str) -> str:
    return metric.removeprefix("eval_").replace("_", " ")


def _zeros(facts: Mapping[str, Any]) -> Iterator[str]:
    after = [_layer(entry, "zeros") for entry in facts["matrices"]]
    before = [_layer(entry, "zeros_before") for entry in facts["matrices"]]
    if any(abs(one.sparsity - other.sparsity) > _VISIBLE for one, other in zip(before, after, strict=True)):
        yield "<h3>Before</h3>" + heat_maps(before) + "<h3>After</h3>"
    yield heat_maps(after)
    rows = [_kind_row(entry["kind"], entry) for entry in facts["kinds"]]
    rows.append(_kind_row("prunable weights", facts["prunable"]))
    yield table(["layers", "parameters", "zeros before", "zeros after", "quantized modules"], rows, total=True)
    each = [
        [entry["name"], f"{entry['numel']:,}", f"{entry['zeros_before']:,}", f"{entry['zeros']:,}"]
        + [percent(_share(entry[key], entry["numel"])) for key in ("zeros_before", "zeros")]
        for entry in facts["matrices"]
    ]
    yield details(
        f"each of the {len(each):,} matrices",
        table(
            ["matrix", "parameters", "zeros before", "zeros after", "share before", "share after"], each, is_tall=True
        ),
    )


def _kind_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    shares = [percent(_share(entry[key], entry["numel"])) for key in ("zeros_before", "zeros")]
    return [name, f"{entry['numel']:,}", *shares, f"{entry['quantized']:,}" if entry["quantized"] else "-"]


def _layer(entry: Mapping[str, Any], zeros: str) -> LayerZeros:
    return LayerZeros(
        entry["name"], entry["kind"], entry["row"], entry["column"], numel=entry["numel"], zeros=entry[zeros]
    )


def _export(exported: Mapping[str, Any] | None, deployment: str) -> Iterator[str]:
    if exported is None:
        return
    sizes, kernels, parity = exported["sizes"], exported["kernels"], exported["parity"]
    if parity is None:
        yield paragraph("The graph was not compared with torch (--no_validate).")
    elif exported["passed"]:
        yield paragraph("The graph computes what was trained: the check passed.", "good")
    for failure in exported["failures"]:
        yield paragraph(failure, "bad")
    rows = [
        ["written to", deployment],
        ["format", exported["format"]],
        ["parameters in float32", size(sizes["float_bytes"])],
        ["the ONNX file", f"{size(sizes['file_bytes'])} ({_share(sizes['file_bytes'], sizes['float_bytes']):.0%})"],
        ["its constants without their zeros", size(sizes["compressed_bytes"])],
    ]
    if parity is not None:
        for name in ("integer", "floating"):
            kind = "integers" if name == "integer" else "floats"
            rows.append(
                [f"products of {kind} in ONNX Runtime", f"{kernels[name]} ({kernels[f'expected_{name}']} expected)"]
            )
    yield table(["", ""], rows, num_words=2)
    if parity is None:
        return
    yield (
        f"<h3>Logits of {parity['exported']} against {parity['reference']}</h3>"
        if parity["exported"] in _ENGINES and parity["reference"] in _ENGINES
        else "<h3>Logits</h3>"
    )
    entries = [(f"{shape['batch']} x {shape['length']}", shape) for shape in parity["shapes"]]
    entries.append(("all", parity["total"]))
    if parity["rounding_noise"] is not None:
        entries.append(("torch against itself", parity["rounding_noise"]))
    allowed = parity["tolerances"]
    cells = [
        [name, f"{entry['num_features']:,}"]
        + [_deviation(entry[key]) for key in ("mean", "p99", "max")]
        + [f"{entry['num_same']:,}" + (f" + {entry['num_ties']} tied" if entry["num_ties"] else "")]
        for name, entry in entries
    ]
    cells.append(
        ["allowed", "", _deviation(allowed["mean"]), _deviation(allowed["p99"]), "", percent(allowed["agreement"])]
    )
    yield table(["batch x tokens", "rows", "mean", "99%", "largest", "same answer"], cells)
    yield paragraph(
        f"Differences are shares of the logits' standard deviation, {short(parity['total']['spread'])}, on text of "
        f"{parity['text']}. The largest one decides nothing.",
        "muted",
    )


_ENGINES: Final = frozenset({"torch", "onnxruntime", "openvino"})


def _deviation(share: float | None) -> str:
    if share is None:
        return "not finite"
    return f"{share:.2%}" if share >= 1e-4 or share == 0 else f"{share:.0e}"


def _circumstances(story: RunStory) -> Iterator[str]:
    facts, results = story.facts, story.results
    steps, ran_on = facts["steps"], facts["ran_on"]
    several = f", {ran_on['backend']}" if ran_on["processes"] > 1 else ""
    rows = [
        ["model", f"{facts['model']} ({facts['class']})"],
        ["teacher", facts["teacher"] or "none"],
        ["processes", f"{ran_on['processes']} on {ran_on['device']}{several}"],
        ["precision", ran_on["precision"]],
        ["steps", f"{steps['done']:,} of {steps['last']:,}; {steps['per_epoch']:,} an epoch"],
        ["features a step", f"{steps['features']:,}"],
        ["training time", _duration(facts["seconds"])],
    ]
    for name, key, unit in (
        ("speed of training", "train_samples_per_second", "features/s"),
        ("", "train_steps_per_second", "steps/s"),
        ("speed of evaluation", "eval_samples_per_second", "features/s"),
    ):
        if key in results:
            rows.append([name, f"{results[key]:,.4g} {unit}"])
    if facts["peak_memory_bytes"]:
        rows.append([f"most memory of the main process, {ran_on['memory_of']}", size(facts["peak_memory_bytes"])])
    yield table(["", ""], rows, num_words=2)
    yield "<h3>Command</h3>" + code(facts["command"], wraps=True)
    yield "<h3>Versions</h3>" + table(["", ""], [[name, text] for name, text in facts["versions"].items()], num_words=2)


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(key.startswith("eval_") for key in line)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}" if whole >= 60 else f"{seconds:.1f} s"
