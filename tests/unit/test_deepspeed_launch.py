"""What a launch says about DeepSpeed: its file under accelerate's names, and what is not offered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_accel.errors import LaunchError, OptionError
from sparse_accel.runtime.deepspeed_launch import check_deepspeed, deepspeed_file, launch_environment
from sparse_accel.runtime.launch import check_accumulation, gradient_clipping, mixed_precision

ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_MIXED_PRECISION": "no"}
NAMED = ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}
AUTO: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
}


def test_a_launch_without_a_file_is_left_as_it_is() -> None:
    assert deepspeed_file(ZERO3) == {}
    assert deepspeed_file(ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}) == {}
    assert launch_environment(ZERO3, {}) == ZERO3


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AUTO))
    assert deepspeed_file({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}) == AUTO


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "absent.json: cannot be read: No such file"),
        ("{", "not JSON"),
        ("[]", "has no zero_optimization"),
        ("{}", "has no zero_optimization"),
    ],
)
def test_a_file_that_is_none_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / ("absent.json" if text is None else "ds.json")
    if text is not None:
        path.write_text(text)
    with pytest.raises(LaunchError, match=message):
        deepspeed_file({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})


def test_a_file_that_leaves_the_step_to_the_flags_does() -> None:
    environ = launch_environment(NAMED, AUTO)
    assert environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert gradient_clipping(environ, 0.7, is_explicit=True) == 0.7
    check_accumulation(environ, 4)
    assert mixed_precision(environ, fp16=False, bf16=True, device_type="cuda") == "bf16"
    check_deepspeed(environ, AUTO, "bf16")


def test_a_file_that_speaks_of_the_step_is_compared_with_the_flags() -> None:
    environ = launch_environment(NAMED, AUTO | {"gradient_clipping": 0.5, "gradient_accumulation_steps": 4})
    assert gradient_clipping(environ, 1.0, is_explicit=False) == 0.5
    with pytest.raises(OptionError, match=r"the launch says 0\.5"):
        gradient_clipping(environ, 1.0, is_explicit=True)
    check_accumulation(environ, 4)
    with pytest.raises(OptionError, match="the launch says 4"):
        check_accumulation(environ, 1)


def test_what_a_file_does_not_say_is_left_to_the_flags() -> None:
    environ = launch_environment(NAMED | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {"zero_optimization": {"stage": 1}})
    check_accumulation(environ, 2)
    assert gradient_clipping(environ, 0.7, is_explicit=True) == 0.7


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "names its own optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "names its own scheduler"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "moves parameters to nvme"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "at ZeRO stage 2, and only stage 3"),
    ],
)
def test_what_is_not_offered_is_refused(more: dict[str, Any], message: str) -> None:
    file = AUTO | more
    with pytest.raises(LaunchError, match=message):
        check_deepspeed(launch_environment(NAMED, file), file, "no")


@pytest.mark.parametrize("own", ["bf16", "fp16"])
def test_deepspeeds_own_half_precision_is_refused(own: str) -> None:
    file = AUTO | {own: {"enabled": True}}
    with pytest.raises(LaunchError, match=f"turns on DeepSpeed.s own {own}"):
        check_deepspeed(launch_environment(NAMED, file), file, "no")
    for enabled in ("auto", False):
        file = AUTO | {own: {"enabled": enabled}}
        check_deepspeed(launch_environment(NAMED, file), file, "bf16")


def test_a_configuration_that_says_what_its_deepspeed_file_is_there_for_is_refused() -> None:
    environ = NAMED | {"ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,zero3_init_flag,mixed_precision"}
    with pytest.raises(LaunchError, match="the launch configuration says mixed_precision itself"):
        check_deepspeed(launch_environment(environ, AUTO), AUTO, "no")


def test_offloading_by_the_launch_itself() -> None:
    optimizer, param = "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"
    check_deepspeed(ZERO3 | {optimizer: "cpu", param: "none"}, {}, "no")
    check_deepspeed(ZERO3 | {optimizer: "cpu", param: "cpu"}, {}, "bf16")
    with pytest.raises(OptionError, match="float16 is not offered with DeepSpeed"):
        check_deepspeed(ZERO3, {}, "fp16")
    with pytest.raises(LaunchError, match="moves the optimizer to nvme"):
        check_deepspeed(ZERO3 | {optimizer: "nvme"}, {}, "no")
