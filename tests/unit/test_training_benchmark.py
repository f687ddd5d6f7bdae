"""Training benchmark: formulas by hand, real arms on a tiny model, gates that end a run, and what is said of bars."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from sparse_accel.benchmarking import bars, lengths, parity, summary
from sparse_accel.benchmarking.arms import check_arms
from sparse_accel.benchmarking.baselines import build_b1, padded_dataset
from sparse_accel.benchmarking.counting import Census
from sparse_accel.benchmarking.heads import HEADS, MASKED_LANGUAGE_MODELING, TEXT_CLASSIFICATION
from sparse_accel.benchmarking.models import Load, Size, encoder_matrices, random_model, shape_size, training_flops
from sparse_accel.benchmarking.other_tools import TOOLS, build_tool
from sparse_accel.benchmarking.own import OWN_ARMS, Bench, OwnTraining, build_own, quantized_plan, recipe_text
from sparse_accel.benchmarking.report import demands_table, notes
from sparse_accel.benchmarking.runner import check_tools, open_bench, run_benchmark
from sparse_accel.benchmarking.scaling import measure_processes
from sparse_accel.benchmarking.sparseml_style import build_b2
from sparse_accel.benchmarking.stopwatch import Stopwatch
from sparse_accel.benchmarking.turns import take_turns
from sparse_accel.benchmarking.workloads import WORKLOADS, Settings, Workload, find_workload
from sparse_accel.cli.benchmark_train_command import read_settings
from sparse_accel.cli.program import run_command
from sparse_accel.errors import InvariantError, OptionError, OutputError
from sparse_accel.folders.head_rows import ROWS
from sparse_accel.modifiers.distillation import DistillationModifier
from sparse_accel.modifiers.quantization import QuantizationModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.tasks import resolve_task
from sparse_accel.tasks.collating import Collator
from sparse_accel.tasks.mlm_masking import KINDS, NOT_MASKED, SPECIAL

CPU = torch.device("cpu")


@pytest.fixture
def bench() -> Iterator[Bench]:
    """One step of 8 features in two micro-batches on the tiny model."""
    threads = torch.get_num_threads()
    workload = replace(WORKLOADS["tiny-ci"], features=8)
    with open_bench(Settings(workload, ("dense",), 1, "fp32", "packed", threads)) as opened:
        yield opened
    AcceleratorState._reset_state(True)


def test_the_histograms_count_what_they_say() -> None:
    squad = lengths.histogram("squad_v1")["parts"]
    assert (squad["dev"]["examples"], squad["dev"]["features"]) == (10570, 10784)
    for name, longest in (("squad_v1", 384), ("mnli", 128)):
        for part, told in lengths.histogram(name)["parts"].items():
            found, counts = lengths.length_counts(name, part)
            assert counts.sum() == told["features"] and found.max() <= longest


def test_a_few_lengths_stand_for_all() -> None:
    found, counts = lengths.length_counts("squad_v1")
    mean = (found * counts).sum() / counts.sum()
    spread = lengths.spread_lengths("squad_v1", 32, longest=384)
    assert abs(spread.mean() / mean - 1) < 0.02
    assert lengths.spread_lengths("squad_v1", 32, longest=100).max() == 100


def test_random_features_have_their_lengths_and_answers_within() -> None:
    given = np.array([6, 40, 20])
    features = lengths.random_features(given, vocabulary=1000, seed=3)
    assert sorted(features.lengths) == [6, 20, 40]
    start, end = features.labels["start_positions"], features.labels["end_positions"]
    assert (start <= end).all() and (end < features.lengths).all()
    assert len(np.unique(features.tokens["input_ids"])) > 30
    assert np.array_equal(features.tokens["input_ids"], lengths.random_features(given, 1000, 3).tokens["input_ids"])


def test_operations_by_hand() -> None:
    # Two sequences of 3 and 5 tokens; 100 weights, 2 layers, 4 wide.
    load = Load.of(np.array([3, 5]))
    assert load == Load(8, 34)
    assert training_flops(Size(100, 2, 4), load) == 3 * (2 * 8 * 100 + 4 * 2 * 4 * 34)


def test_the_size_is_that_of_the_model() -> None:
    assert shape_size("tiny").encoder_weights == sum(
        w.numel() for w in encoder_matrices(random_model("tiny", 0)).values()
    )
    assert shape_size("bert_base").encoder_weights == 84_934_656
    assert shape_size("bert_large").encoder_weights == 301_989_888


def document(**seconds: list[float]) -> dict[str, Any]:
    """Results as a run gives them, of arms that took so long; `dense` computed 10 tokens of which 8 were real."""
    arm = {
        "what": "",
        "numerics": "",
        "has_teacher": False,
        "is_compiled": False,
        "steps": 2,
        "computed": {"tokens": 10, "squares": 50},
        "counts": {"launches": 6, "syncs": 4, "counted": ""},
        "phases_seconds": {"forward": 0.5, "other": 0.1},
        "state_bytes": 0,
        "violations": 0,
    }
    return {
        "workload": {"name": "mini-cpu", "purpose": "", "processes": 1},
        "settings": {"precision": "fp32", "batching": "packed", "rounds": 2},
        "machine": {"device": "cpu"},
        "clock": "cpu",
        "turn": {"features": 4, "tokens": 8, "squares": 34},
        "size": {"encoder_weights": 100, "layers": 2, "width": 4},
        "peaks": {"measured": 10_000.0},
        "collating": {"milliseconds_per_32_features": {"hugging_face": [6.0, 8.0], "packed": [0.1, 0.1]}},
        "arms": {name: {**arm, "seconds": {"wall": values, "cpu": values}} for name, values in seconds.items()},
    }


def test_utilisation_by_hand() -> None:
    found = summary.summarise(document(dense=[2.0, 2.0]), "dense")
    assert found.features_per_second == 2.0 and found.tokens_per_second == 4.0
    assert found.mfu["measured"] == pytest.approx(3 * (2 * 8 * 100 + 4 * 2 * 4 * 34) / 2.0 / 10_000)
    assert found.hfu["measured"] == pytest.approx(3 * (2 * 10 * 100 + 4 * 2 * 4 * 50) / 2.0 / 10_000)
    assert (found.launches, found.syncs) == (3, 2)


def test_a_live_teacher_counts_for_the_hardware_alone() -> None:
    plain, taught = document(dense=[2.0]), document(dense=[2.0])
    taught["arms"]["dense"]["has_teacher"] = True
    one, other = summary.summarise(plain, "dense"), summary.summarise(taught, "dense")
    assert other.mfu == one.mfu
    assert other.hfu["measured"] == pytest.approx(one.hfu["measured"] * 4 / 3)


def test_what_was_not_counted_is_not_told() -> None:
    found = document(dense=[2.0])
    found["arms"]["dense"]["counts"] = None
    assert summary.summarise(found, "dense").launches is None
    assert demands_table(found).rows == (("dense", "", "", "0"),)


def test_ratios_are_those_within_rounds() -> None:
    found = summary.cost(document(dense=[1.0, 2.0, 4.0], mask=[1.1, 2.4, 4.0]), "mask", "dense")
    assert found is not None
    assert (found.median, found.low, found.high) == pytest.approx((1.1, 1.0, 1.2))
    assert summary.noise(document(dense=[1.0, 2.0], dense_again=[1.01, 1.9])) == pytest.approx(0.05)


def test_bars_are_met_missed_or_open() -> None:
    measured = document(dense=[1.0], dense_padded=[2.4], mask=[1.1])
    found = {verdict.bar.what: verdict for verdict in bars.verdicts([measured])}
    assert found["packed against padded to 384, fp32"].status == "met"
    assert found["masks over dense"].status == "not measured yet"  # on the GPU, which comes last
    on_cpu = [verdict for verdict in bars.verdicts([measured]) if verdict.bar.device == "cpu"]
    statuses = {verdict.bar.what: verdict.status for verdict in on_cpu}
    assert statuses["masks over dense"] == "missed"
    assert statuses["packed against padded to 384, bf16"] == "not measured yet"
    assert statuses["collating against default_data_collator on datasets"] == "met"
    assert statuses["collating 32 features"] == "met"


def test_a_bar_reads_runs_of_its_own_kind_alone() -> None:
    in_bf16 = document(dense=[1.0], dense_padded=[2.4])
    in_bf16["settings"]["precision"] = "bf16"
    statuses = {v.bar.what: v.status for v in bars.verdicts([in_bf16]) if v.bar.device == "cpu"}
    assert statuses["packed against padded to 384, fp32"] == "not measured yet"
    assert statuses["packed against padded to 384, bf16"] == "met"


def test_arms_take_turns_and_every_other_round_goes_backwards() -> None:
    log: list[str] = []
    arms = {name: (lambda name=name: log.append(name)) for name in "ab"}
    seconds, before = take_turns(arms, 3, warm_up=1, device=CPU)
    assert "".join(log) == "ba" + "ab" + "ba" + "ab"
    assert len(seconds["a"]["wall"]) == len(seconds["b"]["cpu"]) == 3 and len(before["a"]) == 1


def test_time_goes_to_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    stopwatch = Stopwatch(CPU)
    monkeypatch.setattr(stopwatch, "_mark", lambda: next(ticks))
    with stopwatch.within("forward"):
        pass  # it is off
    stopwatch.start()  # 0
    with stopwatch.within("forward"):  # 1
        with stopwatch.within("quant"):  # 2
            pass  # 3
    # 4, and 5 at the end
    assert stopwatch.stop() == {"forward": 2, "quant": 1, "other": 2}


def test_the_census_counts_operations_but_no_views() -> None:
    stopwatch = Stopwatch(CPU)
    x = torch.ones(2, 3)
    with Census(stopwatch) as census:
        (x.t() @ x).sum().item()
    assert sum(census.operations.values()) == 2
    assert sum(census.reads.values()) == 1


def test_hugging_faces_rows_are_those_of_our_padded_batch(bench: Bench) -> None:
    features = bench.features
    ours = Collator({"input_ids": 0, "token_type_ids": 0}, 128, pad_to_max_length=True)(features, np.arange(8))
    theirs = padded_dataset(features, 128)[:]
    assert set(theirs) == set(ours)
    for name, column in ours.items():
        assert torch.equal(torch.tensor(theirs[name]), column), name


def test_a_step_of_every_baseline_trains(bench: Bench) -> None:
    for build in (build_b1, build_b2):
        loop = build(bench)
        before = copy.deepcopy(loop.module.state_dict())
        with loop.watched():
            loop.turn()
        assert loop.load == Load(8 * 128, 8 * 128 * 128)
        after = loop.module.state_dict()
        assert any(
            not torch.equal(before[name], value) for name, value in after.items() if name.endswith("query.weight")
        )


def test_sparseml_style_quantizes_what_the_recipe_does(bench: Bench) -> None:
    from torch.ao.quantization import FakeQuantize

    loop = build_b2(bench)
    fake = [module for module in loop.module.modules() if isinstance(module, FakeQuantize)]
    assert len(fake) == quantized_plan(random_model("tiny", 0)).num_quantizers == 6 + 2 + 2 * 18
    loop.turn()
    assert all(float(module.scale) != 1.0 for module in fake)
    loop.model(**next(iter(loop.batches)))  # SparseML's hook puts zeros back before a forward
    assert loop.violations() == 0


def test_an_arm_of_ours_is_watched_without_a_trace(bench: Bench) -> None:
    training = build_own(OWN_ARMS["recipe"], bench)
    session = training.session
    seen = [dict(vars(session)), dict(vars(session.optimizer)), dict(vars(session.accelerator))]
    training.turn()
    with training.watched():
        bench.stopwatch.start()
        training.turn()
        phases = bench.stopwatch.stop()
    assert {"data", "teacher", "forward", "backward", "mask", "quant", "optimizer"} <= set(phases)
    assert training.load == Load.of(bench.features.lengths)
    assert [dict(vars(session)), dict(vars(session.optimizer)), dict(vars(session.accelerator))] == seen
    assert training.violations() == 0
    assert training.state.clock.step == 2


def test_tiny_ci_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["benchmark", "train", "tiny-ci", "--arms", "dense,recipe,mask,b2", "--features", "8"]
    try:
        assert run_command([*words, "--rounds", "1", "--output-dir", str(tmp_path / "out")], speaks=True) == 0
    finally:
        AcceleratorState._reset_state(True)
    text = (tmp_path / "out" / "results.json").read_text("utf-8")
    found = json.loads(text)
    counts = {arm: told["counts"] for arm, told in found["arms"].items()}
    assert list(counts) == ["dense", "recipe", "mask", "b2"]
    assert [counts[arm]["syncs"] for arm in ("dense", "mask")] == [0, 0]
    assert counts["b2"]["syncs"] > 300
    assert counts["dense"]["launches"] < counts["mask"]["launches"] < counts["recipe"]["launches"]
    assert found["arms"]["mask"]["violations"] == 0
    assert found["arms"]["mask"]["state_bytes"] < found["arms"]["dense"]["state_bytes"] / 2
    assert all(gate["found"] <= gate["allowed"] for gate in found["gates"])
    assert str(tmp_path) not in text
    assert (tmp_path / "out" / "step_breakdown.png").stat().st_size > 10_000
    page = (tmp_path / "out" / "results.md").read_text("utf-8")
    assert "| mask |" in page and "time / dense" in capsys.readouterr().out


TINY_MLM = replace(WORKLOADS["tiny-mlm"], max_length=64, features=8)
TINY_TEXTS = replace(WORKLOADS["tiny-ci"], task=TEXT_CLASSIFICATION, lengths="mnli", max_length=64, features=8)


def small(workload: Workload) -> Settings:
    """One round of four arms."""
    return Settings(workload, ("dense", "mask", "kd_live", "b1"), 1, "fp32", "packed", torch.get_num_threads())


@pytest.fixture
def masked_bench() -> Iterator[Bench]:
    """One step of 8 chunks in two micro-batches, masked language modelling on the tiny model."""
    with open_bench(small(TINY_MLM)) as opened:
        yield opened
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("workload", [TINY_MLM, TINY_TEXTS], ids=lambda workload: workload.task)
def test_other_tasks_are_measured(workload: Workload) -> None:
    try:
        found = json.loads(json.dumps(run_benchmark(small(workload), "")))
    finally:
        AcceleratorState._reset_state(True)
    compared = [gate["what"] for gate in found["gates"]]
    for start in ("dense, packed against padded", "kd_live, packed against padded", "dense against Hugging Face's own"):
        assert sum(what.startswith(start) for what in compared) == 2
    assert all(gate["found"] <= gate["allowed"] for gate in found["gates"])
    assert list(found["arms"]) == ["dense", "mask", "kd_live", "b1"] and found["skipped"] == {}
    for arm in found["arms"]:
        told = summary.summarise(found, arm)
        assert told.features_per_second > 0 and told.mfu["measured"] > 0
    assert [found["arms"][arm]["counts"]["syncs"] for arm in ("dense", "mask", "kd_live")] == [0, 0, 0]
    says_so = any("MFU and HFU count the encoder alone" in note for note in notes(found))
    assert says_so == (workload.task == MASKED_LANGUAGE_MODELING)


def test_masked_words_alone_are_scored_where_nobody_sees_the_others(masked_bench: Bench) -> None:
    def micro_batches(name: str) -> list[dict[str, torch.Tensor]]:
        training: OwnTraining = build_own(OWN_ARMS[name], masked_bench)
        (step,) = training.session.loader.steps(training.state.clock, 1)
        return [dict(micro_batch.inputs) for micro_batch in step]

    for batch in micro_batches("mask"):
        assert len(batch[ROWS]) == (batch["labels"] != NOT_MASKED).sum()
    assert not any(ROWS in batch for name in ("kd_live", "qat_frozen") for batch in micro_batches(name))
    assert build_own(OWN_ARMS["kd_live"], masked_bench).session.options.distill_top_k == 32


def test_hugging_faces_collator_masks_what_ours_may(masked_bench: Bench) -> None:
    loop = build_b1(masked_bench)
    kinds = masked_bench.features.extra[KINDS].reshape(8, 64)
    shown = {tuple(row) for row in masked_bench.features.tokens["input_ids"].reshape(8, 64).tolist()}
    for batch in loop.batches:
        is_masked = batch["labels"] != NOT_MASKED
        assert 0.08 < is_masked.float().mean() < 0.25
        assert not is_masked[:, torch.from_numpy(kinds[0] == SPECIAL)].any()
        hidden = batch["input_ids"][is_masked] == lengths.MASK_ID
        assert 0.5 < hidden.float().mean() < 1.0
        whole = torch.where(is_masked, batch["labels"], batch["input_ids"])
        assert {tuple(row) for row in whole.tolist()} <= shown


@pytest.mark.parametrize("task", HEADS)
def test_the_arms_recipe_says_what_the_shipped_one_of_the_task_says(task: str) -> None:
    shipped = Recipe.load(f"{task}/pruned_quant")
    ours = Recipe.load(recipe_text(OWN_ARMS["recipe"].modifiers, resolve_task(task)))
    for one, other in zip(shipped.of(QuantizationModifier), ours.of(QuantizationModifier), strict=True):
        for name in ("submodules", "exclude_module_types", "quantize_embeddings", "quantize_linear_activations"):
            assert getattr(one, name) == getattr(other, name), name
    for theirs, our in zip(shipped.of(DistillationModifier), ours.of(DistillationModifier), strict=True):
        for name in ("hardness", "temperature", "distill_output_keys"):
            assert getattr(theirs, name) == getattr(our, name), name


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_processes_exchange_what_is_trained_and_no_more() -> None:
    tiny = replace(find_workload("scale-2"), shape="tiny", max_length=64, features=8)
    found = measure_processes(Settings(tiny, tiny.arms, 1, "fp32", "packed", 1), None)
    parameters = sum(parameter.numel() for parameter in random_model("tiny", 0).parameters())
    sent = {arm: told["bytes_a_step"].get("all_reduce", 0) for arm, told in found["wire"].items()}
    assert sent["dense"] == 4 * parameters
    assert sent["mask"] < 0.5 * sent["dense"]
    assert sent["dense_alone"] == sent["mask_alone"] == 0
    assert found["turn"]["features"] == 2 * found["alone"]["turn"]["features"] == 16


def test_a_gate_that_does_not_hold_yields_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "TOLERANCE", -1.0)
    words = [
        "benchmark",
        "train",
        "tiny-ci",
        "--arms",
        "dense",
        "--features",
        "8",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    try:
        with pytest.raises(InvariantError, match="nothing was measured"):
            run_command(words, speaks=True)
    finally:
        AcceleratorState._reset_state(True)
    assert not list(tmp_path.rglob("*"))


def settings(workload: str = "tiny-ci", **changes: Any) -> Settings:
    given: dict[str, Any] = dict.fromkeys(("arms", "precision", "features", "micro_batch_size", "micro_batches"))
    return read_settings(workload, **{**given, "rounds": 5, "batching": "packed", "threads": 1, **changes})


def test_settings_are_the_workloads_unless_said() -> None:
    found = settings(features=32, micro_batches=4, arms="dense, mask")
    assert (found.workload.features, found.workload.micro_batch_size, found.steps) == (32, 4, 2)
    assert found.arms == ("dense", "mask") and found.precision == "fp32"
    assert settings("scale-3").workload.processes == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 12}, "--features: a multiple of the 8 of a step, got 12"),
        ({"rounds": 0}, "--rounds: 1 or more, got 0"),
        ({"precision": "fp16"}, "--precision: fp32, bf16; got 'fp16'"),
        ({"batching": "loose"}, "--batching: packed, grouped, padded; got 'loose'"),
        ({"workload": "mini_cpu"}, "no such workload; did you mean 'mini-cpu'"),
        (
            {"workload": "mnli-base", "arms": "dense,b3"},
            "--arms: b3: this baseline trains question answering alone, and the workload's task is text_classification",
        ),
        ({"workload": "mlm-base", "arms": "nncf"}, "--arms: nncf: this baseline trains question answering alone"),
        (
            {"workload": "mlm-base", "arms": "dense,kd_cached"},
            "--arms: kd_cached: its teacher is asked once .* kd_live and recipe_live have a teacher in every step",
        ),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        settings(**changes)


def test_every_workload_names_arms_that_there_are() -> None:
    for workload in (*WORKLOADS.values(), find_workload("scale-2")):
        check_arms(workload.arms, workload.task)


def test_a_tool_that_is_not_installed_is_told_of_and_refused_where_it_is_asked_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOOLS, "nncf", replace(TOOLS["nncf"], package="nncf_that_nobody_has"))  # type: ignore[arg-type]
    skipped: dict[str, str] = {}
    with_tool = replace(bench, settings=replace(bench.settings, arms=("dense", "nncf")))
    assert check_tools(with_tool, skipped) == [] and skipped == {"nncf": "the package nncf is not installed"}
    assert "nncf" in settings().arms
    with pytest.raises(OptionError, match=r"--arms: nncf: the package nncf is not installed \(pip install nncf\)"):
        settings(arms="dense,nncf")


def test_a_tool_that_does_not_work_is_told_of(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(model: Any, batches: Any, sparsity: float) -> Any:
        raise RuntimeError("no kernels here\nand more")

    broken = replace(TOOLS["modelopt"], package="json", convert=convert)
    monkeypatch.setitem(TOOLS, "modelopt", broken)  # type: ignore[arg-type]
    skipped: dict[str, str] = {}
    with_tool = replace(bench, settings=replace(bench.settings, arms=("modelopt",)))
    assert check_tools(with_tool, skipped) == [] and skipped == {"modelopt": "RuntimeError: no kernels here"}


@pytest.mark.exhaustive
def test_a_tool_that_computes_something_else_fails_its_gates(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(model: Any, batches: Any, sparsity: float) -> Any:
        model.qa_outputs.register_forward_hook(lambda module, args, out: 1.01 * out)
        return model

    changed = replace(TOOLS["modelopt"], package="json", convert=convert, disable=lambda model: None)
    assert not any(gate.holds for gate in parity.tool_gates("modelopt", changed, bench))
    honest = replace(changed, convert=lambda model, batches, sparsity: model)
    assert all(gate.holds for gate in parity.tool_gates("modelopt", honest, bench))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_adds_its_quantization_alone_and_trains(name: str, bench: Bench) -> None:
    tool = TOOLS[name]
    if tool.missing:
        pytest.skip(tool.missing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tool's own, on importing
        gates = parity.tool_gates(name, tool, bench)
        assert len(gates) == (5 if tool.is_sparse else 2) and all(gate.holds for gate in gates), gates
        loop = build_tool(tool, bench)
        before = {key: weight.detach().clone() for key, weight in encoder_matrices(loop.module).items()}
        loop.turn()
    after = encoder_matrices(loop.module)
    assert any(not torch.equal(before[key], weight) for key, weight in after.items())
    assert loop.violations() == 0
    if tool.is_sparse:
        assert set(loop.masks or {}) == set(after)
        assert all(abs(float((weight == 0).float().mean()) - 0.9) < 0.01 for weight in after.values())
        tool.disable(loop.module)
        next(iter((loop.masks or {}).values())).logical_not_()
        assert loop.violations() > 0


def test_an_unknown_arm_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no arm is called 'masks'; did you mean 'mask'"):
        run_command(["benchmark", "train", "tiny-ci", "--arms", "masks"], speaks=True)
    (tmp_path / "results.json").write_text("{}", "utf-8")
    with pytest.raises(OutputError, match=r"holds results\.json already"):
        run_command(["benchmark", "train", "tiny-ci", "--output_dir", str(tmp_path)], speaks=True)
