"""What each way of launching leaves in the environment, and what must come of it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from sparse_accel.errors import LaunchError, OptionError
from sparse_accel.runtime.launch import (
    check_accumulation,
    check_environment,
    check_installed,
    check_launch,
    gradient_clipping,
    mixed_precision,
    process_group_error,
    process_rank,
    requested_world_size,
)

# What accelerate 1.15 and torch 2.13 really set, taken down from running processes.
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
CPU_TWO_PROCESSES = {**ACCELERATE, "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
MULTI_GPU = {**ACCELERATE, **TORCHRUN}
MULTI_GPU_ON_CPU = {**MULTI_GPU, "ACCELERATE_USE_CPU": "1"}
FSDP = {**MULTI_GPU, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": "true"}
WITHOUT_VERSION = {name: value for name, value in FSDP.items() if name != "FSDP_VERSION"}
SRUN_OF_TWO = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}

ALONE = {"num_processes": 1, "distributed_type": "NO", "backend": None, "device_type": "cpu"}
TWO_ON_CPU = {"num_processes": 2, "distributed_type": "MULTI_CPU", "backend": "gloo", "device_type": "cpu"}
TWO_ON_GPU = {"num_processes": 2, "distributed_type": "MULTI_GPU", "backend": "nccl", "device_type": "cuda"}


@pytest.mark.parametrize(
    ("environ", "became", "message"),
    [
        (CPU_TWO_PROCESSES, ALONE, "MASTER_ADDR is set but WORLD_SIZE is not"),
        ({"MASTER_ADDR": "10.0.0.1"}, ALONE, "MASTER_ADDR is set but WORLD_SIZE is not"),
        (MULTI_GPU, ALONE, "asks for 2 processes, but accelerate runs 1: no GPU was found"),
        (MULTI_GPU, TWO_ON_CPU, "asks for 2 GPUs .* but no GPU was found"),
        (FSDP, ALONE, "asks for FSDP, but the run is a single process"),
        ({**FSDP, "ACCELERATE_USE_CPU": "1"}, TWO_ON_CPU, "ACCELERATE_USE_CPU makes accelerate train plain DDP"),
        ({**DEEPSPEED, "ACCELERATE_USE_CPU": "1"}, TWO_ON_CPU, "ACCELERATE_USE_CPU makes accelerate train plain DDP"),
        (DEEPSPEED, ALONE | {"distributed_type": "DEEPSPEED"}, "DeepSpeed found no backend"),
        (MULTI_GPU, TWO_ON_GPU | {"backend": "gloo"}, "talk through gloo, expected nccl"),
        (TORCHRUN | {"WORLD_SIZE": "4"}, TWO_ON_GPU, "asks for 4 processes, but accelerate runs 2"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ALONE, "asks for 2 processes, but accelerate runs 1"),
        ({"SLURM_STEP_NUM_TASKS": "3"}, ALONE, "srun started 3 copies"),
        ({**FSDP, "FSDP_VERSION": "1"}, TWO_ON_GPU, "asks for FSDP 1, .* set fsdp_version: 2"),
        (WITHOUT_VERSION, TWO_ON_GPU, "asks for FSDP 1, .* set fsdp_version: 2"),
        (
            {**SRUN_OF_TWO, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
            ALONE,
            "2 machines were started, .* counts 1 process, ",
        ),
        (
            {**SRUN_OF_TWO, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
            ALONE,
            "2 machines .* counts 8 processes, its own",
        ),
        ({"GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "1"}, ALONE, "--num_machines 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ALONE, "Megatron-LM is not supported"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ALONE, "compilation .INDUCTOR., which is not offered"),
    ],
)
def test_a_run_that_is_not_what_the_launch_asked_for_is_refused(
    environ: Mapping[str, str], became: dict, message: str
) -> None:
    with pytest.raises(LaunchError, match=message):
        check_launch(environ, **became)


@pytest.mark.parametrize(
    ("environ", "became"),
    [
        ({}, ALONE),
        ({**ACCELERATE, "ACCELERATE_USE_CPU": "True"}, ALONE),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, ALONE),
        (MULTI_GPU_ON_CPU, TWO_ON_CPU),
        (TORCHRUN, TWO_ON_CPU),
        (TORCHRUN | {"ACCELERATE_USE_CPU": "1"}, TWO_ON_CPU),
        (MULTI_GPU, TWO_ON_CPU | {"use_cpu": True}),
        (MULTI_GPU, TWO_ON_GPU),
        (FSDP, TWO_ON_GPU | {"distributed_type": "FSDP", "backend": "cuda:nccl,cpu:gloo"}),
        (FSDP | {"ACCELERATE_TORCH_DEVICE": "cpu"}, TWO_ON_CPU | {"distributed_type": "FSDP"}),
        (DEEPSPEED, TWO_ON_GPU | {"distributed_type": "DEEPSPEED"}),
        ({**MULTI_GPU, **SRUN_OF_TWO, "LOCAL_WORLD_SIZE": "1"}, TWO_ON_GPU),
        ({**MULTI_GPU, "SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "2"}, TWO_ON_GPU),
    ],
)
def test_a_run_that_is_what_the_launch_asked_for_goes_on(environ: Mapping[str, str], became: dict) -> None:
    check_launch(environ, **became)


def test_the_refusal_says_how_two_cpu_processes_are_had() -> None:
    with pytest.raises(LaunchError, match="ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N"):
        check_environment(CPU_TWO_PROCESSES)


def test_accelerates_own_enum_is_understood() -> None:
    from accelerate.utils import DistributedType

    check_launch(FSDP, **TWO_ON_GPU | {"distributed_type": DistributedType.FSDP})
    with pytest.raises(LaunchError, match="the run is plain DDP"):
        check_launch(FSDP, **TWO_ON_GPU | {"distributed_type": DistributedType.MULTI_GPU})


@pytest.mark.parametrize("environ", [FSDP, DEEPSPEED, DEEPSPEED | {"ACCELERATE_USE_CPU": "1"}])
def test_sharding_without_a_gpu_is_refused_before_anything_starts(environ: Mapping[str, str]) -> None:
    check_environment(environ, has_gpu=lambda: True)
    check_environment(environ | {"ACCELERATE_TORCH_DEVICE": "cpu"}, has_gpu=lambda: False)
    with pytest.raises(LaunchError, match="needs GPUs, and none was found"):
        check_environment(environ, has_gpu=lambda: False)


def test_sharding_is_left_alone_where_nobody_asked_for_it() -> None:
    check_environment(MULTI_GPU, has_gpu=lambda: False)


@pytest.mark.parametrize(
    ("environ", "rank", "size"),
    [
        ({}, 0, None),
        (TORCHRUN, 1, 2),
        ({"LOCAL_RANK": "-1"}, 0, None),
        ({"RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}, 4, 8),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, 3, 4),
        ({"SLURM_PROCID": "2"}, 0, None),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, 2, None),
        ({"RANK": "junk", "WORLD_SIZE": ""}, 0, None),
    ],
)
def test_rank_and_size_come_from_the_most_telling_variable(
    environ: Mapping[str, str], rank: int, size: int | None
) -> None:
    assert process_rank(environ) == rank
    assert requested_world_size(environ) == size


def test_flags_and_launcher_agree_on_precision_or_are_refused() -> None:
    assert mixed_precision({}, fp16=False, bf16=False, device_type="cpu") == "no"
    assert mixed_precision({"ACCELERATE_MIXED_PRECISION": "no"}, fp16=False, bf16=True, device_type="cpu") == "bf16"
    assert mixed_precision({"ACCELERATE_MIXED_PRECISION": "bf16"}, fp16=False, bf16=False, device_type="cpu") == "bf16"
    with pytest.raises(OptionError, match="make them agree"):
        mixed_precision({"ACCELERATE_MIXED_PRECISION": "fp16"}, fp16=False, bf16=True, device_type="cuda")
    with pytest.raises(OptionError, match="fp8, which is not offered"):
        mixed_precision({"ACCELERATE_MIXED_PRECISION": "fp8"}, fp16=False, bf16=False, device_type="cuda")
    with pytest.raises(OptionError, match="needs a GPU"):
        mixed_precision({}, fp16=True, bf16=False, device_type="cpu")


def test_the_launchers_accumulation_may_not_differ_from_the_flags() -> None:
    check_accumulation({}, 4)
    check_accumulation({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, 4)
    with pytest.raises(OptionError, match="is 1, but the launch says 4"):
        check_accumulation({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, 1)


@pytest.mark.parametrize(
    ("said", "flag", "is_explicit", "norm"),
    [
        (None, 1.0, False, 1.0),
        ("auto", 0.5, True, 0.5),
        ("0.5", 1.0, False, 0.5),
        ("0.5", 0.5, True, 0.5),
        ("0", 1.0, False, 0.0),
        ("0.0", 0.0, True, 0.0),
    ],
)
def test_gradients_are_clipped_as_the_one_that_speaks_says(
    said: str | None, flag: float, is_explicit: bool, norm: float
) -> None:
    environ = {} if said is None else {"ACCELERATE_GRADIENT_CLIPPING": said}
    assert gradient_clipping(environ, flag, is_explicit=is_explicit) == norm


def test_a_flag_that_contradicts_the_launchs_clipping_is_refused() -> None:
    with pytest.raises(OptionError, match=r"--max_grad_norm is 1, but the launch says 0\.5"):
        gradient_clipping({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, 1.0, is_explicit=True)


@pytest.mark.parametrize("said", ["much", "-1", "nan", "inf", ""])
def test_a_clipping_that_is_no_number_is_refused(said: str) -> None:
    with pytest.raises(LaunchError, match="expected `auto` or a number"):
        gradient_clipping({"ACCELERATE_GRADIENT_CLIPPING": said}, 1.0, is_explicit=False)


def test_deepspeed_that_is_not_installed_is_named_with_the_extra_that_brings_it() -> None:
    check_installed(DEEPSPEED, lambda package: package == "deepspeed")
    check_installed(FSDP, lambda package: False)
    with pytest.raises(LaunchError, match=r"pip install 'sparse_accel\[deepspeed\]'"):
        check_installed(DEEPSPEED, lambda package: False)


def _store(port: int, host: str = "127.0.0.1", *, is_first: bool = True) -> None:
    """What forming a process group begins with: the first of two processes listens, another calls it."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    TCPStore(host, port, 2, is_first, timeout=timedelta(seconds=1), wait_for_workers=True, use_libuv=True)


def _failure(port: int, host: str = "127.0.0.1", *, is_first: bool = True) -> LaunchError | None:
    from torch.distributed import DistError

    with pytest.raises((DistError, RuntimeError)) as caught:
        _store(port, host, is_first=is_first)
    return process_group_error(caught.value, {"MASTER_ADDR": host, "MASTER_PORT": str(port)})


def test_a_port_in_use_is_one_message_with_the_way_out() -> None:
    import socket

    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = _failure(port)
    assert error is not None
    assert str(error).startswith(f"port {port} is in use on this machine")
    assert "--main_process_port PORT" in str(error)


def test_a_machine_that_did_not_come_is_missed() -> None:
    error = _failure(0)
    assert error is not None
    assert "1 of 2 processes came to 127.0.0.1:0 in time" in str(error)


def test_a_first_machine_that_cannot_be_reached_is_named() -> None:
    for host in ("127.0.0.1", "no-such-machine.invalid"):
        error = _failure(9, host, is_first=False)
        assert error is not None
        assert f"the first process, {host}:9, cannot be reached from here" in str(error)


def test_another_failure_is_left_alone() -> None:
    assert process_group_error(RuntimeError("CUDA error: out of memory"), {}) is None
