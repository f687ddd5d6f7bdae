"""Whether the processes that run are the ones that the launch asked for."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from typing import Final

from sparse_accel.errors import LaunchError, OptionError

# Where launchers leave the number of processes and this one's rank, the most telling first: torchrun and
# `accelerate launch`, then MPI's (Intel, Open MPI, MVAPICH), which accelerate reads too.
_WORLD_SIZES: Final = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS: Final = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "LOCAL_RANK")

# What the environment asks for -> accelerate's name for a run that does it.
_STRATEGIES: Final = {"ACCELERATE_USE_DEEPSPEED": "DEEPSPEED", "ACCELERATE_USE_FSDP": "FSDP"}
_SPOKEN: Final = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM"}

_TWO_ON_CPU: Final = (
    "on CPUs: `ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes {n} sparse_accel train ...` (the"
    " flag's"
    " name notwithstanding) or `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node {n} -m sparse_accel train ...`"
)
_TWO_ON_GPU: Final = "on GPUs: `accelerate launch --multi_gpu --num_processes {n} sparse_accel train ...`"


def _integer(environ: Mapping[str, str], name: str) -> int | None:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        return None


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").strip().lower() in ("1", "true", "yes", "on", "y", "t")


def requested_world_size(environ: Mapping[str, str]) -> int | None:
    """How many processes the launcher says there are, or None when it says nothing."""
    sizes = (_integer(environ, name) for name in _WORLD_SIZES)
    return next((size for size in sizes if size is not None), None)


def process_rank(environ: Mapping[str, str]) -> int:
    """This process's rank, as its launcher has it; 0 when it was not launched by one."""
    ranks = [_integer(environ, name) for name in _RANKS]
    if (_integer(environ, "SLURM_STEP_NUM_TASKS") or 1) > 1:
        ranks.append(_integer(environ, "SLURM_PROCID"))
    return next((rank for rank in ranks if rank is not None and rank >= 0), 0)


def _how(num_processes: int | str) -> str:
    return f"{_TWO_ON_CPU.format(n=num_processes)}; {_TWO_ON_GPU.format(n=num_processes)}"


def _has_gpu() -> bool:
    import torch  # only a launch that asks for sharding waits for it; `--help` does not

    return torch.accelerator.is_available()


def check_environment(environ: Mapping[str, str], has_gpu: Callable[[], bool] = _has_gpu) -> None:
    """Refuse what can be told to go wrong before a process group is made. `environ` is the environment as the launcher
    left it. Raises LaunchError."""
    if requested_world_size(environ) is None:
        if environ.get("MASTER_ADDR"):
            # `accelerate launch --cpu --num_processes N` starts one process and leaves only this trace of the N.
            raise LaunchError(
                "MASTER_ADDR is set but WORLD_SIZE is not: one process was started where several were asked for"
                " (`accelerate launch` with --cpu, or without --multi_gpu, starts one whatever --num_processes says)."
                f" Several processes are had so: {_how('N')}. For one process: leave --num_processes out and unset"
                " MASTER_ADDR"
            )
        tasks = _integer(environ, "SLURM_STEP_NUM_TASKS") or 1
        if tasks > 1:
            raise LaunchError(
                f"srun started {tasks} copies that do not know of each other (WORLD_SIZE is not set); let srun"
                " start one `accelerate launch` or torchrun per node"
            )
    _check_machines(environ)
    if _is_on(environ, "ACCELERATE_USE_MEGATRON_LM"):
        raise LaunchError("Megatron-LM is not supported; launch with --multi_gpu, --use_fsdp or --use_deepspeed")
    for variable, kind in _STRATEGIES.items():
        # Left alone, DeepSpeed would compile an op for minutes and then train every process by itself, and FSDP would
        # become DDP. A group that is presented as a GPU's (ACCELERATE_TORCH_DEVICE) is left to `check_launch`.
        if _is_on(environ, variable) and not environ.get("ACCELERATE_TORCH_DEVICE") and not has_gpu():
            n = requested_world_size(environ) or 1
            also = (
                " (and with ACCELERATE_USE_CPU accelerate trains plain DDP instead)" if _asks_for_cpu(environ) else ""
            )
            raise LaunchError(
                f"the launch asks for {_SPOKEN[kind]}, which needs GPUs, and none was found{also}; leave it out of the"
                f" launch: {_TWO_ON_CPU.format(n=n)}"
            )
    if _is_on(environ, "ACCELERATE_USE_FSDP") and environ.get("FSDP_VERSION", "1") != "2":
        raise LaunchError(
            "the launch asks for FSDP 1, which is not offered; set fsdp_version: 2 in its fsdp_config, or give `accelerate"
            " launch` --fsdp_version 2; launch_configs/fsdp2.yaml is such a configuration"
        )
    compiler = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in ("no", ""):
        raise LaunchError(
            f"the launch asks for compilation ({compiler}), which is not offered; set dynamo_backend to 'no'"
        )


def _check_machines(environ: Mapping[str, str]) -> None:
    """Refuse machines of which each counts only itself. Raises LaunchError."""
    machines = max(_integer(environ, name) or 1 for name in ("SLURM_STEP_NUM_NODES", "GROUP_WORLD_SIZE"))
    size, here = requested_world_size(environ), _integer(environ, "LOCAL_WORLD_SIZE") or 1
    if size is not None and machines > 1 and size <= here:
        raise LaunchError(
            f"{machines} machines were started, but this one counts {size} process{'es' if size > 1 else ''}, its own: each"
            f" machine would train by itself, into the same folder. Give `accelerate launch` --num_machines {machines},"
            " --num_processes for all of them together, --machine_rank and --main_process_ip, as launch_configs/slurm.sbatch"
            " does"
        )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_installed(environ: Mapping[str, str], is_installed: Callable[[str], bool] = _is_installed) -> None:
    """Refuse a launch that asks for a library that is not there. Raises LaunchError."""
    if _is_on(environ, "ACCELERATE_USE_DEEPSPEED") and not is_installed("deepspeed"):
        raise LaunchError(
            "the launch asks for DeepSpeed, which is not installed: pip install 'sparse_accel[deepspeed]'; FSDP2"
            " (launch_configs/fsdp2.yaml) shards as ZeRO-3 does and needs nothing more"
        )


def check_launch(
    environ: Mapping[str, str],
    *,
    num_processes: int,
    distributed_type: str,
    backend: str | None,
    device_type: str,
    use_cpu: bool = False,
) -> None:
    """Refuse a run that is not what the launch asked for: accelerate changes number of processes, strategy or backend
    without a word.

    `environ` is the environment as the launcher left it (accelerate adds to it while it sets up); the rest is what
    became of it: `accelerator.num_processes`, `.distributed_type`, `.state.backend` and `.device.type`; `use_cpu` is
    whether the command itself asks for the CPU. Raises LaunchError.
    """
    check_environment(environ, lambda: True)  # what became of a wish for sharding is looked at below
    kind = str(getattr(distributed_type, "value", distributed_type))
    wanted_kind = next((kind for name, kind in _STRATEGIES.items() if _is_on(environ, name)), None)
    wanted = requested_world_size(environ) or 1
    on_cpu = device_type == "cpu"

    if wanted_kind is not None and kind != wanted_kind:
        name = _SPOKEN[wanted_kind]
        if on_cpu and _is_on(environ, "ACCELERATE_USE_CPU"):
            raise LaunchError(
                f"the launch asks for {name}, but ACCELERATE_USE_CPU makes accelerate train plain DDP instead; unset"
                f" ACCELERATE_USE_CPU, or leave {name} out of the launch"
            )
        raise LaunchError(f"the launch asks for {name}, but the run is {_plain(kind)}; {name} needs GPUs here")
    if wanted != num_processes:
        started = f"the launch asks for {wanted} processes, but accelerate runs {num_processes}"
        if wanted_kind == "DEEPSPEED":
            raise LaunchError(
                f"{started}: DeepSpeed found no backend for its process group on this {device_type}, so every process"
                " would train alone. It needs GPUs here; without them leave DeepSpeed out: "
                f"{_TWO_ON_CPU.format(n=wanted)}"
            )
        if on_cpu and num_processes == 1:
            raise LaunchError(
                f"{started}: no GPU was found, so each of the {wanted} would train alone and call itself the"
                f" first; {_TWO_ON_CPU.format(n=wanted)}; or add --use_cpu"
            )
        raise LaunchError(f"{started}; {_how(wanted)}")
    if num_processes > 1 and on_cpu and not use_cpu and _launched_for_gpus(environ):
        raise LaunchError(
            f"the launch asks for {wanted} GPUs (--multi_gpu), but no GPU was found;"
            f" {_TWO_ON_CPU.format(n=wanted)}; or add --use_cpu"
        )
    if num_processes > 1:
        expected = {"cuda": ("nccl",), "cpu": ("gloo", "mpi", "ccl")}.get(device_type, ())
        if expected and not any(name in (backend or "") for name in expected):
            raise LaunchError(
                f"{num_processes} processes on {device_type} talk through {backend or 'nothing'}, expected"
                f" {' or '.join(expected)}"
            )


def _launched_for_gpus(environ: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` started several processes without a word about CPUs: its --multi_gpu does. torchrun,
    which leaves the device to the program, sets none of accelerate's variables."""
    return "ACCELERATE_MIXED_PRECISION" in environ and not _asks_for_cpu(environ)


def _asks_for_cpu(environ: Mapping[str, str]) -> bool:
    return _is_on(environ, "ACCELERATE_USE_CPU") or environ.get("ACCELERATE_TORCH_DEVICE", "").startswith("cpu")


def _plain(kind: str) -> str:
    return {"NO": "a single process", "MULTI_CPU": "plain DDP on CPUs", "MULTI_GPU": "plain DDP"}.get(kind, kind)


def mixed_precision(environ: Mapping[str, str], *, fp16: bool, bf16: bool, device_type: str) -> str:
    """`no`, `fp16` or `bf16`: what the flags and the launcher's own `--mixed_precision` say together. Raises
    OptionError where they differ or where the device cannot."""
    flag = "fp16" if fp16 else "bf16" if bf16 else "no"
    launched = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", "fp16", "bf16"):
        raise OptionError(f"the launch asks for mixed precision {launched}, which is not offered; use bf16 or fp16")
    if "no" not in (flag, launched) and flag != launched:
        raise OptionError(f"--{flag}: the launch asks for mixed precision {launched}; make them agree")
    precision = launched if flag == "no" else flag
    if precision == "fp16" and device_type == "cpu":
        raise OptionError("float16 needs a GPU; on a CPU use --bf16")
    return precision


def check_accumulation(environ: Mapping[str, str], gradient_accumulation_steps: int) -> None:
    """Refuse a launcher's own accumulation that differs from the flag's: accelerate takes the launcher's without a
    word. Raises OptionError."""
    launched = _integer(environ, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if launched is not None and launched != gradient_accumulation_steps:
        raise OptionError(
            f"--gradient_accumulation_steps is {gradient_accumulation_steps}, but the launch says {launched}"
            " (ACCELERATE_GRADIENT_ACCUMULATION_STEPS, from the launcher's flag or config); make them agree"
        )


def gradient_clipping(environ: Mapping[str, str], max_grad_norm: float, *, is_explicit: bool) -> float:
    """The norm to clip gradients to, 0 for never: the launch's where it names one, else `max_grad_norm`; `is_explicit` is
    whether the flag was given. Raises OptionError where both speak and differ."""
    said = environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto").strip().lower()
    if said == "auto":
        return max_grad_norm
    try:
        launched = float(said)
    except ValueError:
        launched = math.nan
    if not (math.isfinite(launched) and launched >= 0):
        raise LaunchError(f"the launch's gradient_clipping is {said!r}; expected `auto` or a number, 0 for never")
    if is_explicit and launched != max_grad_norm:
        raise OptionError(
            f"--max_grad_norm is {max_grad_norm:g}, but the launch says {launched:g} (gradient_clipping); make them agree,"
            " or let the launch say gradient_clipping: auto"
        )
    return launched


def process_group_error(error: BaseException, environ: Mapping[str, str]) -> LaunchError | None:
    """What a failure to form the process group means for the person who launched, or None where it is another failure."""
    text = str(error)
    address = f"{environ.get('MASTER_ADDR', '127.0.0.1')}:{environ.get('MASTER_PORT', '29500')}"
    if re.search(r"EADDRINUSE|address already in use", text, re.IGNORECASE):
        port = re.search(r"port: (\d+)", text)
        return LaunchError(
            f"port {port[1] if port else environ.get('MASTER_PORT', '29500')} is in use on this machine, most often by"
            " another training; choose one: `accelerate launch --main_process_port PORT`, where 0 finds a free one for one"
            " machine, or `torchrun --master_port PORT` (or --standalone)"
        )
    if re.search(r"waiting for clients", text):
        joined = re.search(r"(\d+)/(\d+) clients joined", text)
        count = f"{joined[1]} of {joined[2]}" if joined else "not all"
        return LaunchError(
            f"{count} processes came to {address} in time; start every machine, each with its own --machine_rank and the"
            " same --num_machines and --num_processes"
        )
    if re.search(
        r"gai error|cannot be retrieved|failed to connect|trying to connect|connection refused", text, re.IGNORECASE
    ):
        return LaunchError(
            f"the first process, {address}, cannot be reached from here; --main_process_ip and --main_process_port must name"
            " the machine that has --machine_rank 0 and a port that no firewall closes"
        )
    return None
