"""Latency benchmark: statistics by closed formulas, real engines on a tiny graph, and what is said about the numbers."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from sparse_accel.cli import benchmark_command
from sparse_accel.errors import ModelError, OptionError, OutputError, SparseAccelError
from sparse_accel.serving import latency, latency_report
from sparse_accel.serving.engines import open_engine
from sparse_accel.serving.latency import Cell, Contender, Grid, Measured, Speedup, Timing, Traits
from tests.running import run, tiny_world
from tests.tiny import tiny_bert

VOCABULARY = 50
ONE = Grid(("onnxruntime",), (1,), (1,), (8,))


class RecordingEngine:
    """Writes down each call: which model, and the shape of its ids."""

    name = "onnxruntime"
    device = "cpu"
    input_names = ("input_ids", "attention_mask")
    output_names = ("start_logits",)

    def __init__(self, model: str, log: list[tuple[str, tuple[int, ...]]], seconds: float = 0.0) -> None:
        self.model, self.log, self.seconds = model, log, seconds

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.log.append((self.model, inputs["input_ids"].shape))
        time.sleep(self.seconds)
        return {"start_logits": np.zeros(inputs["input_ids"].shape, np.float32)}


def graph(
    folder: Path, *, inputs: tuple[str, ...] = ("input_ids", "attention_mask"), batch: str | int = "batch"
) -> Path:
    """A deployment whose model sums rows of a table: logits [batch, sequence], for ids below VOCABULARY alone."""
    from onnx import TensorProto, helper, numpy_helper, save

    table = numpy_helper.from_array(np.ones((VOCABULARY, 4), np.float32), "table")
    axes = numpy_helper.from_array(np.array([-1], np.int64), "axes")
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "axes"], ["sums"], keepdims=0),
        helper.make_node("Cast", [inputs[1]], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["sums", "mask"], ["start_logits"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.INT64, [batch, "sequence"]) for name in inputs]
    logits = helper.make_tensor_value_info("start_logits", TensorProto.FLOAT, [batch, "sequence"])
    made = helper.make_graph(nodes, "tiny", values, [logits], [table, axes])
    folder.mkdir(parents=True)
    save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(folder / "model.onnx")
    )
    config = {"model_type": "bert", "vocab_size": VOCABULARY, "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def timing(cell: Cell, *milliseconds: float) -> Timing:
    """Rounds of one call each."""
    return Timing(cell, tuple((round(value * 1e6),) for value in milliseconds))


def a_report(times: dict[str, tuple[float, ...]], traits: dict[str, Traits | None], **changes: Any) -> Any:
    """A report of one setting, made of given latencies in milliseconds."""
    contenders = tuple(Contender(name, Path(name), traits.get(name)) for name in times)
    timings = tuple(timing(Cell(name, "onnxruntime", 1, 1, 384), *values) for name, values in times.items())
    facts = {
        "measured": Measured(timings),
        "contenders": contenders,
        "baseline": contenders[0].name,
        "grid": Grid(("onnxruntime",), (1,), (1,), (384,)),
        "machine": latency.machine_facts(("onnxruntime",)),
        "command": "sparse_accel benchmark inference",
    }
    return latency_report.LatencyReport(**{**facts, **changes})


# --- statistics -------------------------------------------------------------------------------------------------------


def test_percentiles_are_interpolated_between_calls() -> None:
    # Of 0, 1, ..., 10 ms the p-th percentile is p / 10 ms.
    calls = Timing(Cell("a", "onnxruntime", 1, 4, 8), (tuple(i * 1_000_000 for i in range(11)),))
    assert [calls.percentile(percent) for percent in (50, 90, 99)] == pytest.approx([5.0, 9.0, 9.9])
    assert calls.throughput == pytest.approx(4 * 11 / (55 / 1000))


def test_interval_of_a_median_is_that_of_the_sign_test() -> None:
    # Tables of the sign test at 5 %: n = 10 gives the 2nd and 9th value, n = 20 the 6th and 15th.
    assert latency.median_interval(range(1, 11)) == (2, 9)
    assert latency.median_interval(range(1, 21)) == (6, 15)
    assert latency.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert latency.median_interval([7.0]) == (7.0, 7.0)


@pytest.mark.parametrize("count", [6, 9, 25, 60])
def test_interval_holds_the_median_as_often_as_it_promises(count: int) -> None:
    low, high = latency.median_interval(range(count))
    # The median lies outside when fewer than low + 1 of the values, or more than high, fall below it.
    outside = sum(math.comb(count, k) for k in range(count + 1) if k <= low or k > high) / 2**count
    one_narrower = sum(math.comb(count, k) for k in range(count + 1) if k <= low + 1 or k > high - 1) / 2**count
    assert outside <= 0.05 < one_narrower


def test_speedup_is_the_ratio_of_medians_with_the_spread_of_the_rounds() -> None:
    cells = [Cell(name, "onnxruntime", 1, 1, 8) for name in "ab"]
    base, half = timing(cells[0], 10, 20, 12, 11), timing(cells[1], 5, 10, 6, 4)
    found = latency.speedup(half, base)
    assert found.value == pytest.approx(statistics.median([10, 20, 12, 11]) / statistics.median([5, 10, 6, 4]))
    assert (found.low, found.high) == pytest.approx((2.0, 11 / 4))


def test_drift_of_the_machine_does_not_widen_the_interval() -> None:
    drift = [1.0, 3.0, 1.5, 2.5, 1.2, 4.0, 2.0]
    base = timing(Cell("a", "onnxruntime", 1, 1, 8), *(30 * factor for factor in drift))
    quick = timing(Cell("b", "onnxruntime", 1, 1, 8), *(10 * factor for factor in drift))
    found = latency.speedup(quick, base)
    assert (found.low, found.value, found.high) == pytest.approx((3.0, 3.0, 3.0))


def test_a_turn_lasts_a_tenth_of_a_second_and_a_slow_call_is_a_turn_of_its_own() -> None:
    assert [latency.calls_in_a_turn(seconds) for seconds in (0.01, 0.05, 3.0, 0.0)] == [10, 2, 1, 200]
    assert latency.rounds_within(10.0, [0.5, 1.5]) == 5
    assert latency.rounds_within(0.1, [2.0]) == 3


# --- measuring --------------------------------------------------------------------------------------------------------


def test_models_and_lengths_take_turns_and_every_other_round_goes_backwards() -> None:
    log: list[tuple[str, tuple[int, ...]]] = []
    contenders = [Contender(name, Path(name)) for name in ("a", "b")]
    grid = Grid(("onnxruntime",), (1,), (2,), (4, 8))
    found = latency.measure(contenders, grid, lambda model, *_: RecordingEngine(model.name, log, 0.07), rounds=3)
    a4, a8, b4, b8 = cells = list(product("ab", [(2, 4), (2, 8)]))
    warm_up = [call for cell in cells for call in [cell] * 4]
    # One call of 70 ms makes a turn, and the one before it does not count.
    rounds = [a4, a8, b4, b8, b8, b4, a8, a4, a4, a8, b4, b8]
    assert log == warm_up + [call for cell in rounds for call in [cell] * 2]
    assert [(t.calls, len(t.rounds)) for t in found.timings] == [(3, 3)] * 4
    assert [(t.cell.model, t.cell.sequence_length) for t in found.timings] == [("a", 4), ("b", 4), ("a", 8), ("b", 8)]
    assert all(t.percentile(50) >= 70 for t in found.timings)


def test_one_thread_count_is_closed_before_the_next_opens() -> None:
    opened: list[int] = []
    log: list[tuple[str, tuple[int, ...]]] = []

    def open_one(model: Contender, engine: str, threads: int) -> RecordingEngine:
        assert threads == 1 or len(log) > 4, "the first thread count has been measured"
        opened.append(threads)
        return RecordingEngine(model.name, log)

    grid = Grid(("onnxruntime",), (1, 2), (1,), (4,))
    found = latency.measure([Contender("a", Path("a"))], grid, open_one, rounds=1)
    assert opened == [1, 2]
    assert [t.cell.threads for t in found.timings] == [1, 2]


def test_real_engines_run_with_ids_of_the_vocabulary(tmp_path: Path) -> None:
    folder = graph(tmp_path / "a")
    engines = latency.installed_engines()
    grid = Grid(engines, (1,), (1, 3), (8, 16))
    found = latency.measure(
        [Contender("a", folder)],
        grid,
        lambda model, name, threads: open_engine(model.folder, name, threads=threads),
        rounds=2,
    )
    assert not found.failures
    assert [t.cell.setting for t in found.timings] == list(product(engines, (1,), (1, 3), (8, 16)))
    assert latency.random_inputs(2, 500, VOCABULARY)["input_ids"].max() < latency.vocabulary_of(folder) == VOCABULARY


def test_what_cannot_run_is_a_row_with_its_reason(tmp_path: Path) -> None:
    contenders = [
        Contender("good", graph(tmp_path / "good")),
        Contender("fixed", graph(tmp_path / "fixed", batch=2)),
        Contender("odd", graph(tmp_path / "odd", inputs=("input_ids", "position_bias"))),
        Contender("empty", tmp_path),
    ]
    found = latency.measure(contenders, ONE, lambda model, name, _: open_engine(model.folder, name), rounds=1)
    assert [t.cell.model for t in found.timings] == ["good"]
    reasons = {failure.cell.model: failure.reason for failure in found.failures}
    assert "Expected: 2" in reasons["fixed"]
    assert "'position_bias'" in reasons["odd"]
    assert "sparse_accel export" in reasons["empty"]


def test_nothing_that_runs_is_an_error_with_all_reasons(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)nothing could be measured.*empty with onnxruntime.*no model.onnx"):
        latency.measure([Contender("empty", tmp_path)], ONE, lambda model, name, _: open_engine(model.folder, name))


def test_names_are_the_shortest_that_tell_folders_apart(tmp_path: Path) -> None:
    a, b, other = tmp_path / "a" / "deployment", tmp_path / "b" / "deployment", tmp_path / "c" / "other"
    assert latency.short_names([a, b, other]) == ["a/deployment", "b/deployment", "other"]
    with pytest.raises(OptionError, match="named twice"):
        latency.short_names([a, tmp_path / "a" / "deployment"])


def test_default_lengths_are_what_all_models_read(tmp_path: Path) -> None:
    short = graph(tmp_path / "short")  # 256 positions
    assert latency.default_lengths([short]) == (128,)
    assert latency.default_lengths([tmp_path]) == (128, 384)
    (short / "deployment.json").write_text('{"sequence_length": 64}', "utf-8")
    assert latency.default_lengths([short]) == (64,)


# --- words ------------------------------------------------------------------------------------------------------------


def traits(int8: bool, sparsity: float, family: str = "bert") -> Traits:
    return Traits(family, int8, sparsity)


FOUR = {
    "float_dense": traits(False, 0.0),
    "float_sparse": traits(False, 0.9),
    "int8_dense": traits(True, 0.0),
    "int8_sparse": traits(True, 0.9),
}


def steady(middle: float) -> tuple[float, ...]:
    """Ten rounds within half a percent."""
    return tuple(middle * (1 + 0.005 * (-1) ** i) for i in range(10))


def test_four_variants_say_what_int8_and_what_zeros_bought() -> None:
    times = {"float_dense": 283.0, "float_sparse": 280.2, "int8_dense": 100.0, "int8_sparse": 100.0}
    report = a_report({name: steady(value) for name, value in times.items()}, FOUR)
    assert latency_report.sentences(report) == [
        "ONNX Runtime, length 384, batch 1, 1 thread: int8 is 2.83x (dense) and 2.80x (90% zeros) as fast as float32; "
        "zeros bought nothing: 1.01x (float) and 1.00x (int8)."
    ]


def test_zeros_that_bought_something_are_told_from_those_that_cost() -> None:
    times = {"float_dense": 300.0, "float_sparse": 100.0, "int8_dense": 90.0, "int8_sparse": 120.0}
    (sentence,) = latency_report.sentences(a_report({name: steady(value) for name, value in times.items()}, FOUR))
    assert (
        "int8 is 3.33x (dense) as fast as float32; int8 is slower than float32: 0.83x (90% zeros) as fast" in sentence
    )
    assert "zeros made it 3.00x (float) as fast; zeros cost speed: 0.75x (int8) as fast" in sentence


def test_a_difference_within_the_spread_of_the_rounds_counts_as_nothing() -> None:
    noisy = {"a": tuple([100.0, 130.0] * 5), "b": tuple([115.0, 100.0] * 5)}
    report = a_report(noisy, {"a": traits(False, 0.0), "b": traits(True, 0.0)})
    (comparison,) = latency_report.comparisons(report)
    assert comparison.speedup.value > 1.02
    assert comparison.verdict == "nothing"


@pytest.mark.parametrize(
    ("speedup", "verdict"),
    [
        (Speedup(1.5, 1.4, 1.6), "faster"),
        (Speedup(1.5, 1.01, 2.0), "nothing"),
        (Speedup(1.01, 1.005, 1.015), "nothing"),
        (Speedup(0.8, 0.7, 0.9), "slower"),
        (Speedup(0.8, 0.7, 0.99), "nothing"),
    ],
)
def test_a_verdict_needs_the_whole_interval(speedup: Speedup, verdict: str) -> None:
    cell = Cell("a", "onnxruntime", 1, 1, 8)
    assert latency_report.Comparison("int8", cell, cell, "", speedup).verdict == verdict


def test_models_of_another_family_are_compared_as_models_not_by_their_type() -> None:
    report = a_report(
        {"big": steady(90.0), "small": steady(30.0)},
        {"big": traits(False, 0.0), "small": traits(True, 0.0, family="minilm")},
    )
    assert latency_report.sentences(report) == [
        "ONNX Runtime, length 384, batch 1, 1 thread: small is 3.00x as fast as big."
    ]


def test_several_settings_are_summed_up() -> None:
    lengths = (128, 384)
    values = {("a", 128): 20.0, ("b", 128): 10.0, ("a", 384): 90.0, ("b", 384): 30.0}
    timings = tuple(
        timing(Cell(name, "onnxruntime", 1, 1, length), *steady(values[name, length]))
        for length in lengths
        for name in ("a", "b")
    )
    report = a_report(
        {"a": steady(1.0), "b": steady(1.0)},
        {"a": traits(False, 0.0), "b": traits(True, 0.0)},
        measured=Measured(timings),
        grid=Grid(("onnxruntime",), (1,), (1,), lengths),
    )
    assert latency_report.sentences(report)[-1] == "ONNX Runtime in all: int8 is 2.00 to 3.00x as fast as float32."


def test_the_table_tells_once_what_never_changes() -> None:
    report = a_report({"a": steady(20.0), "b": steady(10.0)}, {})
    found = latency_report.table(report)
    assert found.common == "ONNX Runtime, threads 1, batch 1, length 384"
    assert [row[0] for section in found.sections for row in section.cells] == ["a", "b"]
    assert found.sections[0].cells[1][5] == "2.00x"


# --- the command ------------------------------------------------------------------------------------------------------


def benchmark(*words: str | Path) -> int:
    app = typer.Typer()
    app.callback()(lambda: None)
    benchmark_command.register(app)
    code: int = app(["benchmark", "inference", *map(str, words)], standalone_mode=False)
    return code


def test_the_command_writes_numbers_words_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [graph(tmp_path / "a"), graph(tmp_path / "b")]
    output = tmp_path / "results"
    options = ["--engine", "onnxruntime", "--sequence_length", "8,16", "--rounds", "2", "--baseline", "b"]
    assert benchmark(*folders, *options, "--output_dir", output) == 0
    assert "Latency: ONNX Runtime, threads 1, batch 1" in capsys.readouterr().out
    document = json.loads((output / "results.json").read_text("utf-8"))
    assert [row["model"] for row in document["results"]] == ["a", "b", "a", "b"]
    assert document["baseline"] == "b"
    assert document["results"][1]["speedup"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert document["machine"]["cores"] >= 1
    assert "onnxruntime" in document["machine"]["versions"]
    assert document["command"].startswith(f"sparse_accel benchmark inference {folders[0]}")
    assert all(row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] for row in document["results"])
    assert "| length | model | p50 ms |" in (output / "results.md").read_text("utf-8")
    assert (output / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "results"]
    with pytest.raises(OutputError, match=r"holds results\.json already"):
        benchmark(*folders, "--output_dir", output)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "of what"),
        (["{a}", "--engine", "onnxrutime"], "did you mean 'onnxruntime'"),
        (["{a}", "--batch_size", "1,x"], "--batch_size: expected whole numbers with commas between them, got 'x'"),
        (["{a}", "--batch_size", "0"], "--batch_size: 1 or more, got 0"),
        (["{a}", "--threads", "1,1"], "--threads: names a value twice"),
        (["{a}", "--sequence_length", "257"], "reads sequences of at most 256"),
        (["{a}", "--device", "tpu"], "cpu or cuda"),
        (["{a}", "--seconds", "1", "--rounds", "2"], "give one of them"),
        (["{a}", "--seconds", "0"], "more than 0"),
        (["{a}", "--baseline", "b"], "no model is called 'b'"),
        (["{a}/nowhere"], "no such folder"),
        (["--variants", "{a}"], "weights"),
    ],
)
def test_bad_input_is_one_message_before_anything_is_measured(words: list[str], message: str, tmp_path: Path) -> None:
    folder = graph(tmp_path / "a")
    output = tmp_path / "results"
    with pytest.raises(SparseAccelError, match=message):
        benchmark(*(word.format(a=folder) for word in words), "--output_dir", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_failure_leaves_no_output_folder(tmp_path: Path) -> None:
    folder = graph(tmp_path / "a", batch=2)
    with pytest.raises(ModelError, match="Expected: 2"):
        benchmark(folder, "--engine", "onnxruntime", "--output_dir", tmp_path / "results")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_filled_zeros_have_the_values_of_the_other_weights() -> None:
    import torch

    layer = torch.nn.Linear(64, 32)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    before = layer.weight.detach().clone()
    benchmark_command.fill_zeros(torch.nn.Sequential(layer))
    survivors = before != 0
    assert torch.equal(layer.weight[survivors], before[survivors])
    assert set(layer.weight[~survivors].tolist()) <= set(before[survivors].tolist())
    assert float(layer.weight[~survivors].detach().std()) == pytest.approx(float(before[survivors].std()), rel=0.1)


@pytest.mark.slow
def test_variants_of_a_trained_model_are_made_and_compared(tmp_path: Path) -> None:
    trained = run(tiny_world(tmp_path, rows=16, sparsity=0.9), tmp_path / "trained", do_eval=None)
    options = ["--engine", "onnxruntime", "--sequence_length", "16", "--rounds", "2"]
    assert benchmark("--variants", trained, *options, "--output_dir", tmp_path / "results") == 0
    document = json.loads((tmp_path / "results" / "results.json").read_text("utf-8"))
    made = {model["name"]: model for model in document["models"]}
    assert list(made) == ["float_dense", "float_sparse", "int8_dense", "int8_sparse"]
    assert [model["int8"] for model in made.values()] == [False, False, True, True]
    assert [round(model["sparsity"], 1) for model in made.values()] == [0.0, 0.9, 0.0, 0.9]
    assert all((tmp_path / "results" / model["folder"] / "model.onnx").is_file() for model in made.values())
    pairs = [(entry["question"], entry["subject"], entry["reference"]) for entry in document["comparisons"]]
    assert sorted(pairs) == [
        ("int8", "int8_dense", "float_dense"),
        ("int8", "int8_sparse", "float_sparse"),
        ("zeros", "float_sparse", "float_dense"),
        ("zeros", "int8_sparse", "int8_dense"),
    ]


@pytest.mark.slow
def test_a_plain_model_has_one_variant_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_bert(tmp_path / "model")
    words = ["--engine", "onnxruntime,torch", "--sequence_length", "16", "--rounds", "2"]
    assert benchmark("--variants", model, model, *words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "has no quantizers, so there are no int8 variants" in said
    assert "has 0.0% zeros, so there are no sparse variants" in said
    assert "not measured: model with ONNX Runtime" in said
    assert "not measured: float_dense with torch" in said


def test_a_provider_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class WithoutCuda:
        """What ONNX Runtime gives when a provider's libraries are missing: a session that runs on the CPU."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", WithoutCuda)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(OptionError, match="could not start its CUDAExecutionProvider"):
        open_engine(tmp_path, device="cuda")
