"""The command `launch-config`: a launch configuration for the machine at hand and the model that is to be trained."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_accel.errors import OptionError, OutputError

if TYPE_CHECKING:
    from sparse_accel.runtime.launch_advice import Advice, Machine, ModelSize

_PRECISIONS = ("no", "bf16", "fp16")
_STRATEGIES = ("cpu", "single_gpu", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("launch_config")(launch_config_command)


def launch_config_command(
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Folder of the model; only its config and headers are read.", show_default=False),
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option("--parameters", help="Or how large it is: 110M, 1.3B.", metavar="NUMBER", show_default=False),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Folder of the teacher, if there is one.", show_default=False)
    ] = None,
    teacher_parameters: Annotated[
        str | None,
        typer.Option("--teacher_parameters", help="Or how large it is.", metavar="NUMBER", show_default=False),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision", metavar="no|bf16|fp16", help="What the training will be given: --bf16, --fp16 or neither."
        ),
    ] = "no",
    sparsity: Annotated[
        float,
        typer.Option(
            "--sparsity",
            help="Share of zeros in the prunable weights where only the others are stored and trained (compact weights):"
            " gradients, moments and masters then shrink to the kept share.",
        ),
    ] = 0.0,
    per_device_train_batch_size: Annotated[
        int, typer.Option("--per_device_train_batch_size", min=1, help="Features at a time on one GPU.")
    ] = 8,
    max_seq_length: Annotated[int, typer.Option("--max_seq_length", min=1, help="Tokens of a feature.")] = 384,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=0, help="GPUs of each machine. Left out: those that are here.", show_default=False),
    ] = None,
    gpu_memory_gb: Annotated[
        float | None,
        typer.Option("--gpu_memory_gb", help="Memory of one GPU. Left out: that of those here.", show_default=False),
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
    machine_rank: Annotated[int, typer.Option("--machine_rank", min=0, help="Which of them this one is.")] = 0,
    main_process_ip: Annotated[
        str | None,
        typer.Option("--main_process_ip", help="Name or address of the first machine.", show_default=False),
    ] = None,
    main_process_port: Annotated[
        int | None,
        typer.Option("--main_process_port", min=0, max=65535, help="A free port there.", show_default=False),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            metavar="|".join(_STRATEGIES),
            help="Take this one. Left out: the simplest that fits.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="File to write. Left out: standard output.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
) -> int:
    """Print the launch configuration for this machine: the simplest that the model fits in, and why."""
    for name, value, choices in (("precision", precision, _PRECISIONS), ("strategy", strategy, _STRATEGIES)):
        if value is not None and value not in choices:
            raise OptionError(f"--{name}: expected {'|'.join(choices)}, got {value!r}")
    if not 0 <= sparsity < 1:
        raise OptionError(f"--sparsity: expected a share between 0 and 1, got {sparsity:g}")
    if machine_rank >= nodes:
        raise OptionError(f"--machine_rank {machine_rank}: with --nodes {nodes} the last machine is {nodes - 1}")
    if nodes > 1 and main_process_ip is None:
        raise OptionError(f"--nodes {nodes}: name the first of them: --main_process_ip NAME")
    if main_process_ip is not None and not re.fullmatch(r"[\w.:-]+", main_process_ip):
        raise OptionError(f"--main_process_ip: expected a name or an address, got {main_process_ip!r}")
    if output is not None and output.exists() and not overwrite:
        raise OutputError(f"--output {output}: is there already; --overwrite replaces it")

    from sparse_accel.runtime.launch_advice import Workload, advise

    student = _size(model, parameters, "model", "parameters")
    taught_by = _size(teacher, teacher_parameters, "teacher", "teacher_parameters")
    workload = (
        Workload(
            student,
            num_teacher_parameters=taught_by.num_parameters if taught_by else 0,
            precision=precision,
            sparsity=sparsity,
            batch_size=per_device_train_batch_size,
            sequence_length=max_seq_length,
        )
        if student
        else None
    )
    advice = advise(_machine(gpus, gpu_memory_gb, nodes), workload, strategy)
    _explain(advice, precision)
    numbers = {"num_processes": str(advice.machine.num_processes)}
    if nodes > 1:
        numbers |= {"num_machines": str(nodes), "machine_rank": str(machine_rank)}
        numbers["main_process_ip"] = f'"{main_process_ip}"'
    if main_process_port is not None:
        numbers["main_process_port"] = str(main_process_port)
    _write(advice.config, numbers, output)
    return 0


def _size(folder: Path | None, text: str | None, folder_option: str, text_option: str) -> ModelSize | None:
    from sparse_accel.runtime.launch_advice import model_size, parameter_count, typical_size

    if folder is not None and text is not None:
        raise OptionError(f"--{folder_option} and --{text_option} both say how large a model is; give one of them")
    if folder is not None:
        return model_size(folder, f"--{folder_option}")
    return typical_size(parameter_count(text, f"--{text_option}")) if text is not None else None


def _machine(gpus: int | None, gpu_memory_gb: float | None, nodes: int) -> Machine:
    """The machine that is described; what is left out is that of this one."""
    from sparse_accel.runtime.launch_advice import Machine, detect_gpus

    if gpus == 0:
        return Machine(0, 0.0, nodes)
    here, gpu_bytes = detect_gpus() if gpus is None or gpu_memory_gb is None else (0, 0.0)
    count = here if gpus is None else gpus
    if gpu_memory_gb is not None:
        if not gpu_memory_gb > 0:
            raise OptionError(f"--gpu_memory_gb: expected a number above 0, got {gpu_memory_gb:g}")
        gpu_bytes = gpu_memory_gb * 1e9
    elif count and not gpu_bytes:
        raise OptionError(
            f"--gpus {count}: there is none here to look at; say how much memory one has: --gpu_memory_gb 80"
        )
    return Machine(count, gpu_bytes, nodes)


def _explain(advice: Advice, precision: str) -> None:
    """What was taken and why, on standard error: standard output holds the configuration alone."""
    from sparse_accel.runtime.launch_advice import table

    if advice.estimates:
        print(table(advice.estimates, advice.machine, advice.strategy), file=sys.stderr)
    print(f"{advice.config}.yaml: {advice.reason}", file=sys.stderr)
    if precision != "no":
        print(f"give the training --{precision}: the configuration leaves precision to it", file=sys.stderr)


def _write(config: str, numbers: dict[str, str], output: Path | None) -> None:
    """The shipped configuration with these numbers, into a file or to standard output."""
    from sparse_accel.runtime.launch_configs import launch_config, renamed, with_numbers

    text = with_numbers(launch_config(config).read_text("utf-8"), numbers)
    if output is None:
        print(text, end="")
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(renamed(text, config, str(output)), "utf-8")
    except OSError as error:
        raise OutputError(f"--output {output}: cannot be written: {error.strerror}") from None
    print(f"written to {output}", file=sys.stderr)
