"""Which launch configuration is advised, on machines that are made up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from hypothesis import given
from hypothesis import strategies as st

from sparse_accel.cli import main
from sparse_accel.errors import LaunchError, ModelError, OptionError
from sparse_accel.runtime.launch_advice import (
    STRATEGIES,
    Machine,
    ModelSize,
    Workload,
    activation_bytes,
    advise,
    estimate,
    model_size,
    parameter_count,
    possible,
    table,
    typical_size,
)
from sparse_accel.runtime.launch_configs import launch_config, with_numbers

ROOT = Path(__file__).resolve().parents[2]
GB = 1e9
BERT_BASE = ModelSize(110_000_000, 85_000_000, num_layers=12, hidden_size=768, num_heads=12)
ONE = Machine(1, 80 * GB)
EIGHT = Machine(8, 80 * GB)


def workload(billions: float, **more: float) -> Workload:
    return Workload(typical_size(round(billions * 1e9)), batch_size=1, sequence_length=128, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machine", "billions", "name", "config"),
    [
        (Machine(0, 0.0), 0.1, "cpu", "cpu"),
        (ONE, 0.1, "single_gpu", "single_gpu"),
        (ONE, 4.5, "zero3_offload", "zero3_offload"),
        (EIGHT, 0.1, "ddp", "ddp"),
        (EIGHT, 5.0, "fsdp2", "fsdp2"),
        (EIGHT, 13.0, "zero3_offload", "zero3_offload"),
        (Machine(8, 80 * GB, num_nodes=2), 0.1, "ddp", "multi_node_ddp"),
        (Machine(8, 80 * GB, num_nodes=2), 7.0, "fsdp2", "multi_node_fsdp2"),
        (Machine(1, 80 * GB, num_nodes=2), 0.1, "ddp", "multi_node_ddp"),
    ],
)
def test_the_simplest_that_fits_is_advised(machine: Machine, billions: float, name: str, config: str) -> None:
    advice = advise(machine, workload(billions))
    assert (advice.strategy.name, advice.config) == (name, config)


def test_where_nothing_fits_the_error_shows_the_numbers() -> None:
    with pytest.raises(LaunchError, match=r"nothing fits(.|\n)*ddp .* too large(.|\n)*zero3_offload .* too large"):
        advise(EIGHT, workload(100.0))


def test_a_model_of_unknown_size_gets_the_simplest() -> None:
    advice = advise(EIGHT, None)
    assert (advice.strategy.name, advice.estimates) == ("ddp", ())
    assert "not looked at" in advice.reason


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ("cpu", "single_gpu")])
def test_a_strategy_that_is_asked_for_is_taken(name: str) -> None:
    advice = advise(EIGHT, workload(0.1), name)
    assert (advice.strategy.name, advice.config, advice.reason) == (name, name, "asked for")
    assert advice.machine.num_processes == 8
    assert "does not fit" in advise(EIGHT, workload(100.0), name).reason


@pytest.mark.parametrize("name", ["cpu", "single_gpu"])
def test_one_process_may_be_asked_for_where_there_are_more_gpus(name: str) -> None:
    advice = advise(EIGHT, workload(0.1), name)
    assert (advice.config, advice.machine.num_processes) == (name, 1)


@pytest.mark.parametrize(
    ("machine", "wanted", "message"),
    [
        (ONE, "ddp", "--strategy ddp is not for 1 machine with 1 GPU; these are: single_gpu, zero3_offload"),
        (Machine(0, 0.0), "fsdp2", "is not for 1 machine with 0 GPUs; these are: cpu"),
        (Machine(8, 80 * GB, 2), "zero1", "is not for 2 machines with 8 GPUs; these are: ddp, fsdp2, zero3$"),
        (Machine(8, 80 * GB, 2), "single_gpu", "is not for 2 machines with 1 GPU; these are: ddp, fsdp2, zero3$"),
        (Machine(0, 0.0, 2), None, "several machines without GPUs"),
        (Machine(8, 80 * GB, 2), "cpu", "several machines without GPUs"),
    ],
)
def test_a_strategy_without_a_configuration_is_refused(machine: Machine, wanted: str | None, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        advise(machine, workload(0.1), wanted)


def test_bert_base_takes_what_its_parameters_add_up_to() -> None:
    found = estimate(STRATEGIES["ddp"], EIGHT, Workload(BERT_BASE))
    assert found.weights == 4 * 110e6 + 4 * 85e6
    assert found.gradients == 8 * 110e6
    assert found.optimizer == 8 * 110e6
    assert found.activations == 2 * 384 * 8 * 768 * 12 * (34 + 5 * 12 * 384 / 768)
    assert activation_bytes(BERT_BASE, Workload(BERT_BASE, precision="bf16")) == found.activations / 2


def test_a_share_is_one_of_all_processes() -> None:
    machine, size = Machine(8, 80 * GB, num_nodes=2), BERT_BASE
    found = estimate(STRATEGIES["fsdp2"], machine, Workload(size))
    assert found.weights == 4 * 110e6 / 16 + 4 * size.num_gathered + 4 * 85e6
    assert (found.gradients, found.optimizer) == (4 * 110e6 / 16, 8 * 110e6 / 16)
    offloaded = estimate(STRATEGIES["zero3_offload"], EIGHT, Workload(size))
    assert offloaded.optimizer == 0
    assert offloaded.host == 16 * 110e6


def test_a_teacher_is_whole_in_every_process() -> None:
    with_teacher = Workload(BERT_BASE, num_teacher_parameters=330_000_000)
    for strategy in possible(EIGHT):
        assert estimate(strategy, EIGHT, with_teacher).teacher == 4 * 330e6


def test_compact_weights_shrink_what_is_trained() -> None:
    dense, sparse = Workload(BERT_BASE), Workload(BERT_BASE, sparsity=0.9)
    kept = (110e6 - 0.9 * 85e6) / 110e6
    for strategy in possible(EIGHT):
        full, less = estimate(strategy, EIGHT, dense), estimate(strategy, EIGHT, sparse)
        assert less.gradients == pytest.approx(full.gradients * kept)
        assert less.optimizer == pytest.approx(full.optimizer * kept)
        assert less.activations == full.activations


@given(st.integers(1_000_000, 10**11), st.integers(2, 64), st.integers(1, 4), st.floats(0, 0.99))
def test_sharing_more_never_takes_more(parameters: int, gpus: int, nodes: int, sparsity: float) -> None:
    machine = Machine(gpus, 80 * GB, nodes)
    work = Workload(typical_size(parameters), sparsity=sparsity)
    found = {name: estimate(strategy, machine, work) for name, strategy in STRATEGIES.items()}
    assert found["zero3_offload"].total <= found["zero3"].total
    assert found["fsdp2"].total <= found["zero3"].total
    assert found["zero2"].total <= found["zero1"].total
    assert found["fsdp2"].optimizer <= found["ddp"].optimizer
    assert all(entry.total > 0 for entry in found.values())


@pytest.mark.parametrize(
    ("text", "count"), [("110M", 110_000_000), ("1.3B", 1_300_000_000), ("22k", 22_000), ("85054464", 85_054_464)]
)
def test_a_size_may_be_written_shortly(text: str, count: int) -> None:
    assert parameter_count(text, "--parameters") == count


@pytest.mark.parametrize("text", ["", "M", "many", "-1M", "0", "nan", "inf", "1e30"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--parameters: expected a number of parameters such as 110M"):
        parameter_count(text, "--parameters")


def test_a_typical_model_has_as_many_parameters_as_its_shape() -> None:
    size = typical_size(85_000_000)
    assert (size.num_layers, size.hidden_size, size.num_heads) == (12, 768, 12)


def test_a_models_size_is_read_from_headers(tiny_student: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    size = model_size(tiny_student, "--model")
    model = AutoModelForQuestionAnswering.from_pretrained(tiny_student)
    assert size.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    assert size.num_prunable == sum(matrix.numel() for matrix in matrices)
    assert (size.num_layers, size.hidden_size) == (model.config.num_hidden_layers, model.config.hidden_size)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no safetensors file"):
        model_size(tmp_path, "--model")
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        model_size(tmp_path, "--model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        model_size(tmp_path, "--model")


def test_the_table_marks_what_fits_and_what_was_taken() -> None:
    machine = Machine(8, 24 * GB)
    advice = advise(machine, workload(2.0))
    lines = table(advice.estimates, machine, advice.strategy).splitlines()
    assert lines[0] == "GB per GPU, of 21.6 usable (90% of 24.0), 8 processes:"
    assert [line.split()[0] for line in lines[2:]] == [strategy.name for strategy in possible(machine)]
    assert [line.split()[0] for line in lines if line.endswith("<- this one")] == [advice.strategy.name]


# ---- the configuration that is written


@pytest.mark.parametrize("name", [strategy.config for strategy in STRATEGIES.values()])
def test_other_numbers_leave_all_else_as_it_is(name: str) -> None:
    text = launch_config(name).read_text("utf-8")
    numbers = {"num_processes": "6", "main_process_port": "29511"}
    written = with_numbers(text, numbers)
    assert yaml.safe_load(written) == yaml.safe_load(text) | {"num_processes": 6, "main_process_port": 29511}
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert [line for line in written.splitlines() if line.lstrip().startswith("#")] == comments
    assert with_numbers(text, {}) == text


BIG = ["launch-config", "--parameters", "110M", "--gpus", "4", "--gpu_memory_gb", "80"]


def test_standard_output_is_the_configuration_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BIG) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["num_processes"] == 4
    assert out.startswith("# One process per GPU of one machine")
    assert "ddp.yaml: the simplest that fits" in err
    assert "<- this one" in err


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_accelerate_reads_what_is_written_for_one_machine(strategy: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "launch.yaml"
    assert main([*BIG, "--strategy", strategy, "--output", str(path)]) == 0
    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if strategy in ("cpu", "single_gpu") else 4)
    assert f"--config_file {path} " in path.read_text()
    assert f"launch_configs/{strategy}.yaml" not in path.read_text()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_accelerate_reads_what_is_written_for_several_machines(strategy: str, tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    nodes = "--nodes 3 --machine_rank 2 --main_process_ip 10.0.0.1 --main_process_port 29600".split()
    assert main([*BIG, "--strategy", strategy, "--output", str(path), *nodes]) == 0
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes, config.machine_rank) == (3, 12, 2)
    assert (config.main_process_ip, config.main_process_port) == ("10.0.0.1", 29600)


def test_a_file_is_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text("mine")
    assert main([*BIG, "--output", str(path)]) == 2
    assert path.read_text() == "mine"
    assert f"--output {path}: is there already; --overwrite replaces it" in capsys.readouterr().err
    assert main([*BIG, "--output", str(path), "--overwrite"]) == 0
    assert "num_processes: 4" in path.read_text()


def test_a_machine_without_gpus_trains_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch_config", "--gpus", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == launch_config("cpu").read_text("utf-8")
    assert err == "cpu.yaml: there is no GPU\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "fp8"], "--precision: expected no|bf16|fp16, got 'fp8'"),
        (["--strategy", "ddp2"], "--strategy: expected cpu|"),
        (["--sparsity", "90"], "--sparsity: expected a share between 0 and 1, got 90"),
        (["--machine_rank", "1"], "--machine_rank 1: with --nodes 1 the last machine is 0"),
        (["--nodes", "2"], "--nodes 2: name the first of them: --main_process_ip NAME"),
        (["--nodes", "2", "--main_process_ip", "a: b"], "--main_process_ip: expected a name or an address"),
        (["--model", "somewhere"], "--model and --parameters both say how large"),
        (["--gpu_memory_gb", "0"], "--gpu_memory_gb: expected a number above 0"),
        (["--parameters", "many"], "--parameters: expected a number of parameters"),
    ],
)
def test_words_that_make_no_sense_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BIG, *words]) == 2  # the last of an option twice counts
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_gpus_that_are_not_here_need_their_memory(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["launch-config", "--gpus", "2"]) == 2
    assert (
        "--gpus 2: there is none here to look at; say how much memory one has: --gpu_memory_gb 80"
        in capsys.readouterr().err
    )


def test_half_precision_is_left_to_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BIG, "--precision", "bf16"]) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["mixed_precision"] == "no"
    assert "give the training --bf16" in err


def test_it_can_be_piped() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "sparse_accel", "launch-config", "--gpus", "0"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert yaml.safe_load(shown.stdout)["num_processes"] == 1
