"""Pages: every number of the data is there, nothing else can get in, and what is drawn stands where it should."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sparse_accel.compress import inspection as inspection_module
from sparse_accel.compress.inspection import QuantizerFacts
from sparse_accel.recipe.timeline_shapes import Bar, Curve, Lane
from sparse_accel.reports import layers as layers_module
from sparse_accel.reports import page as page_module
from sparse_accel.reports import run_page as run_page_module
from sparse_accel.reports.charts import (
    MOST_POINTS,
    Axis,
    Band,
    Dot,
    Line,
    bars,
    dot_chart,
    heat_map,
    lanes,
    line_chart,
)
from sparse_accel.reports.page import page, section, table
from sparse_accel.reports.run_files import tell_of_export
from sparse_accel.reports.run_page import RunStory, Shapes, run_page
from tests.report_files import MATRICES, Page, facts, history, results, write_run

QUANTIZERS = (
    QuantizerFacts(
        "bert.encoder.layer.0.attention.self.query", "weight", 8, True, True, False, 1, (0.0123, 0.0123), (0, 0)
    ),
    QuantizerFacts("bert.encoder.layer.0.attention.self.query", "input", 4, False, False, True, 3, (0.01, 0.5), (7, 9)),
)
SHAPES = Shapes(
    2.0,
    ("",),
    (Curve(0, ((0.0, 1e-4), (2.0, 0.0))),),
    (
        Lane("zeros", (Bar(0.0, 2.0, "zeros", "held 75.0%"),)),
        Lane("quantization", (Bar(1.0, 1.5, "moving", "ranges move"),)),
    ),
)
EXPORTED: dict[str, Any] = {
    "format": "qdq",
    "passed": True,
    "failures": [],
    "sizes": {"float_bytes": 436_000_000, "file_bytes": 109_000_000, "compressed_bytes": 43_000_000},
    "kernels": {"integer": 97, "floating": 3, "expected_integer": 97, "expected_floating": 3},
    "parity": {
        "text": "a file",
        "tolerances": {"mean": 0.02, "p99": 0.1, "agreement": 0.95},
        "rounding_noise": None,
        "reference": "torch",
        "exported": "onnxruntime",
        "total": {"num_features": 34, "mean": 0.0123, "p99": 0.0456, "max": None, "num_same": 33, "num_ties": 1, "spread": 2.5},
        "shapes": [
            {"batch": 8, "length": 384, "num_features": 16, "mean": 0.0111, "p99": 0.0222, "max": 0.0333, "num_same": 16,
             "num_ties": 0}
        ],
    },
}  # fmt: skip


def story(**changes: Any) -> RunStory:
    given: dict[str, Any] = {"facts": facts(), "history": history(), "results": results()}
    return RunStory(**{**given, "shapes": SHAPES, "quantizers": QUANTIZERS, "recipe_text": "a: <recipe>", **changes})


def paths(source: str, look: str) -> list[list[tuple[float, float]]]:
    """The points of every drawn line of a colour, 0 to 1 from the left and from below."""
    drawn = re.findall(rf'<path class="{look}(?: faint)?" d="M([^"h]*)"', source)
    points = [[tuple(map(float, point.split())) for point in line.split("L")] for line in drawn]
    return [[(x / 1000, 1 - y / 1000) for x, y in line] for line in points]


def test_the_page_of_a_run_is_well_formed_and_loads_nothing() -> None:
    Page(run_page(story(exported=EXPORTED, deployment="run/deployment"))).check_self_contained()


def test_the_page_of_a_run_tells_every_number() -> None:
    shown = Page(run_page(story(exported=EXPORTED, deployment="run/deployment"))).text
    for line in history():
        if "eval_f1" in line:
            assert f"{line['eval_f1']:g}" in shown and f"{line['eval_exact_match']:g}" in shown
            assert f"{line['eval_samples_per_second']:g}" in shown
    for value in results().values():
        assert f"{value:,.6g}" in shown, value
    for name, (numel, before, after) in MATRICES.items():
        assert name in shown
        for number in (f"{numel:,}", f"{before:,}", f"{after:,}", f"{after / numel:.1%}", f"{before / numel:.1%}"):
            assert number in shown, number
    for text in (
        "9.8.7",
        "6.5.4",
        "bf16",
        "2 on cpu, DDP",
        "1.23 GB",
        "1:02:03",
        "2026-01-02 03:04 UTC",
        "70.0%",
        "85.0%",
    ):
        assert text in shown, text
    for text in (
        "0.0123",
        "0.01",
        "0.5",
        "int8",
        "uint4",
        "symmetric",
        "affine",
        "per channel",
        "ranges move",
        "held 75.0%",
    ):
        assert text in shown, text
    for text in (
        "436 MB",
        "109 MB (25%)",
        "43 MB",
        "97 (97 expected)",
        "1.23%",
        "4.56%",
        "not finite",
        "33 + 1 tied",
        "8 x 384",
    ):
        assert text in shown, text
    assert "sparse_accel train question_answering --train_file 'a<b>.json'" in shown
    assert "models/<student> & co" in shown and "a: <recipe>" in shown
    assert "Export" not in Page(run_page(story())).text


def test_a_failed_check_is_told() -> None:
    shown = Page(run_page(story(exported={**EXPORTED, "passed": False, "failures": ["2 answers differ"]}))).text
    assert "2 answers differ" in shown and "the check passed" not in shown


def test_a_run_without_a_recipe_or_a_step_has_a_page_too() -> None:
    bare = facts(matrices=[], kinds=[], one_shot=True, peak_memory_bytes=0)
    shown = Page(run_page(RunStory(bare, [], {"train_samples": 3}))).text
    assert "applied at once" in shown and "Quantized tensors" not in shown and "Loss" not in shown


def test_losses_and_phases_stand_at_their_steps() -> None:
    source = run_page(story())
    total, *terms = [line for line in paths(source, "k0") if len(line) == 8][1:4]
    assert [x for x, _ in total] == pytest.approx([step / 7 for step in range(8)], abs=1e-3)
    highest = total[0][1]
    for step in range(1, 9):
        assert total[step - 1][1] == pytest.approx(highest / step, abs=2e-3)
    assert len(terms) == 2
    moving, fixed = re.findall(r'<rect class="(moving|fixed)" x="([\d.]+)" y="0" width="([\d.]+)"', source)[:2]
    assert moving == ("moving", f"{1000 * 2 / 7:.1f}", f"{1000 * 3 / 7:.1f}")  # steps 3 to 6, of an axis from 1 to 8
    assert fixed == ("fixed", f"{1000 * 5 / 7:.1f}", f"{1000 * 2 / 7:.1f}")


def test_the_logged_rate_lies_on_the_planned_one() -> None:
    planned, logged = paths(run_page(story()), "k1")[0], paths(run_page(story()), "k0")[0]
    assert planned[0] == pytest.approx((0.0, logged[0][1]))
    for x, y in logged:
        assert y == pytest.approx(planned[0][1] * (1 - x), abs=2e-3)


def test_scores_of_many_types_are_in_the_table_and_the_asked_for_in_the_picture() -> None:
    lines = [
        {"step": step, "epoch": float(step), "eval_f1": 0.5, "eval_loss": 2.5, "eval_samples_per_second_mm": 7.0}
        | {f"eval_T{kind}_f1": kind / 16 for kind in range(8)}
        | {"eval_T0_number": 1234}
        for step in (1, 2)
    ]
    source = run_page(story(history=lines, results={"eval_f1": 0.5}))
    shown = Page(source)
    assert "0.4375" in shown.text and "1,234" not in shown.text and "second mm" not in shown.text
    pictures = [value for _, name, value in shown.attributes if name == "aria-label"]
    assert "Scores, shares of 1: f1 over epoch" in pictures and "loss: loss over epoch" in pictures


def test_zeros_that_changed_are_shown_before_and_after() -> None:
    assert {"Before", "After"} <= set(Page(run_page(story())).words)
    same = [{**entry, "zeros": entry["zeros_before"]} for entry in facts()["matrices"]]
    assert "Before" not in Page(run_page(story(facts=facts(matrices=same)))).words


def test_text_of_the_data_cannot_become_markup() -> None:
    evil = "</title><script>alert(1)</script>\"'&"
    source = page(evil, evil, [section(evil, table([evil], [[evil]]))])
    source += bars([(evil, 1.0, evil)]) + heat_map(evil, [evil], [evil], {(evil, evil): (0.5, evil)})
    source += line_chart(evil, [Line(evil, [[(0, 1), (1, 2)]])], x_name=evil, y_name=evil)
    source += lanes([(evil, [(0, 1, "zeros", evil)])], 1, evil)
    source += dot_chart(evil, {evil: [Dot(0, 1, 2, evil)]}, x_ticks=[(0, evil)], x_name=evil, y_name=evil)
    assert "<script" not in source and not any(name == "onload" for _, name, _ in Page(source).attributes)
    assert "alert(1)" in Page(source).text


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 10), [0, 2, 4, 6, 8, 10]),
        (Axis(0, 1.7e-4), [0, 5e-5, 1e-4, 1.5e-4]),
        (Axis(1, 12, is_whole=True), [3, 6, 9, 12]),
        (Axis(1, 2, is_whole=True), [1, 2]),
        (Axis(0.002, 0.3, is_log=True), [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]),
        (Axis(1e-7, 10.0, is_log=True), [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10]),
    ],
)
def test_ticks_are_round_numbers_on_the_axis(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)
    assert all(-1e-9 <= axis.share(tick) <= 1 + 1e-9 for tick in ticks)


def test_a_long_line_is_thinned_to_means_and_keeps_its_ends() -> None:
    values = [(float(x), float(x % 2)) for x in range(10 * MOST_POINTS)]
    (drawn,) = paths(line_chart("", [Line("", [values])], x_name="", y_name=""), "k0")
    assert MOST_POINTS / 2 < len(drawn) <= MOST_POINTS + 2
    assert drawn[0][0] == 0.0 and drawn[-1][0] == 1.0
    assert all(y == pytest.approx(0.5 / 1.05, abs=2e-3) for _, y in drawn[1:-2])


def test_what_is_not_finite_is_left_out_and_nothing_draws_nothing() -> None:
    assert line_chart("", [Line("", [[(0, float("nan")), (1, float("inf"))]])], x_name="", y_name="") == ""
    assert dot_chart("", {"a": [Dot(0, 0.0, 0.0, "")]}, x_ticks=[], x_name="", y_name="") == ""
    assert lanes([], 1.0, "") == "" == bars([])


def test_a_single_point_and_a_constant_are_drawn() -> None:
    Page(line_chart("", [Line("one", [[(3, 0.0)]])], x_name="", y_name="", bands=[Band(0, 9, "moving", "b")]))
    (flat,) = paths(line_chart("", [Line("", [[(0, 5.0), (1, 5.0)]])], x_name="", y_name="", from_zero=False), "k0")
    assert [y for _, y in flat] == pytest.approx([0.5, 0.5])


def exported_run(folder: Path) -> Path:
    write_run(folder)
    (folder / "export_report.json").write_text(json.dumps(EXPORTED), "utf-8")
    return folder


def test_an_export_is_told_of_in_the_report_of_the_run(tmp_path: Path) -> None:
    folder = exported_run(tmp_path)
    assert tell_of_export(folder, Path("somewhere"), folder / "export_report.json") is None
    shown = Page((folder / "report.html").read_text("utf-8")).text
    assert "somewhere" in shown and "97 (97 expected)" in shown and "79.5" in shown
    assert not list(folder.glob(".report*"))


def test_a_report_that_cannot_be_made_is_told_of_and_the_old_one_stays(tmp_path: Path) -> None:
    folder = exported_run(tmp_path)
    (folder / "trainer_state.json").write_text("{}", "utf-8")
    problem = tell_of_export(folder, Path("somewhere"), folder / "export_report.json")
    assert problem is not None and "report.html does not tell of this export: KeyError: 'log_history'" in problem
    assert (folder / "report.html").read_text("utf-8") == "nothing yet"


def test_a_folder_without_a_report_gets_none(tmp_path: Path) -> None:
    folder = exported_run(tmp_path)
    for name in ("report.json", "report.html"):
        (folder / name).unlink()
        assert tell_of_export(folder, Path("somewhere"), folder / "export_report.json") is None
    assert not (folder / "report.html").exists()


def test_examples_hold() -> None:
    for module in (page_module, run_page_module, layers_module, inspection_module):
        assert doctest.testmod(module).attempted > 0 and doctest.testmod(module).failed == 0
