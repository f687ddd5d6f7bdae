"""What a launch says about DeepSpeed, in its configuration or in a DeepSpeed file, and what of that is not offered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sparse_accel.errors import LaunchError, OptionError

_FILE: Final = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_STAGE: Final = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
_OFFLOADS: Final = {
    "optimizer": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "param": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
}
_SPOKEN: Final = {"optimizer": "the optimizer", "param": "parameters"}

# Where `accelerate launch` leaves what its configuration says -> where a DeepSpeed file says the same.
_IN_FILE: Final = {
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    _STAGE: "zero_optimization.stage",
    _OFFLOADS["optimizer"]: "zero_optimization.offload_optimizer.device",
    _OFFLOADS["param"]: "zero_optimization.offload_param.device",
}
# Fields of an accelerate configuration that accelerate refuses beside a DeepSpeed file.
_EITHER_OR: Final = (
    *("gradient_accumulation_steps", "gradient_clipping", "zero_stage", "zero3_save_16bit_model", "mixed_precision"),
    *("offload_optimizer_device", "offload_param_device", "offload_optimizer_nvme_path", "offload_param_nvme_path"),
)
# What a DeepSpeed file may not say, since something else does.
_OURS: Final = {"optimizer": "--optim and --learning_rate", "scheduler": "the recipe or --lr_scheduler_type"}


def deepspeed_file(environ: Mapping[str, str]) -> dict[str, Any]:
    """The DeepSpeed file that the launch names, `{}` where it names none. Raises LaunchError for one that cannot be
    read."""
    name = environ.get(_FILE, "none")
    if name == "none":
        return {}
    try:
        settings = json.loads(Path(name).read_text("utf-8"))
    except OSError as error:
        raise LaunchError(f"deepspeed_config_file {name}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise LaunchError(f"deepspeed_config_file {name}: not JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise LaunchError(f"deepspeed_config_file {name}: has no zero_optimization, which names the stage")
    return settings


def launch_environment(environ: Mapping[str, str], file: Mapping[str, Any]) -> dict[str, str]:
    """`environ`, in which what the DeepSpeed file says stands under accelerate's own names, and what it does not say is
    not said."""
    overlaid = dict(environ)
    for variable, path in _IN_FILE.items() if file else ():
        said = _find(file, path)
        overlaid.pop(variable, None)
        if said is not None:
            overlaid[variable] = str(said).lower()
    return overlaid


def check_deepspeed(environ: Mapping[str, str], file: Mapping[str, Any], precision: str) -> None:
    """Refuse what DeepSpeed is asked for and would not do, or would do beside what the flags and the recipe say. `environ`
    is that of `launch_environment`, `precision` that of `mixed_precision`. Raises LaunchError and OptionError."""
    if precision == "fp16":
        raise OptionError("float16 is not offered with DeepSpeed; use --bf16 (DDP and FSDP2 take both)")
    for what, variable in _OFFLOADS.items():
        device = environ.get(variable, "none")
        if device not in ("none", "cpu"):
            raise LaunchError(
                f"the launch moves {_SPOKEN[what]} to {device}, which is not offered; set offload_{what}_device to cpu or none"
            )
    stage = environ.get(_STAGE, "2")
    if environ.get(_OFFLOADS["param"], "none") != "none" and stage != "3":
        raise LaunchError(
            f"the launch moves parameters to the CPU at ZeRO stage {stage}, and only stage 3 can; set zero_stage: 3, or"
            " offload_param_device: none"
        )
    where = f"deepspeed_config_file {environ.get(_FILE)}"
    twice = [name for name in environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",") if name in _EITHER_OR]
    if file and twice:
        raise LaunchError(
            f"{where}: the launch configuration says {' and '.join(twice)} itself; leave that out of it, or leave the"
            " DeepSpeed file out"
        )
    for name, ours in _OURS.items():
        if name in file:
            raise LaunchError(f"{where}: names its own {name}, which is for {ours} to say; leave it out")
    for own in ("fp16", "bf16"):
        if _find(file, f"{own}.enabled") is True:
            raise LaunchError(
                f"{where}: turns on DeepSpeed's own {own}, which keeps parameters in half precision; leave it out, or set"
                " enabled to auto, and give --bf16"
            )


def _find(file: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    found: Any = file
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
