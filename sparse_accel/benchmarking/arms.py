"""All arms by name: what each is, what of its numerics differs, and how it is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sparse_accel.benchmarking.baselines import Trained, build_b1, build_b3
from sparse_accel.benchmarking.heads import QUESTION_ANSWERING
from sparse_accel.benchmarking.other_tools import TOOLS, build_tool
from sparse_accel.benchmarking.own import OWN_ARMS, Bench, build_own
from sparse_accel.benchmarking.sparseml_style import build_b2
from sparse_accel.errors import OptionError, suggestion
from sparse_accel.tasks import resolve_task

_OWN_NUMERICS: Final = "padding takes no part in losses, softmax and ranges"

_FUSED_NUMERICS: Final = "; attention's scores and probabilities are not quantized in training"


@dataclass(frozen=True)
class Arm:
    """One arm of a benchmark. `has_teacher` is whether a teacher runs in every step, `is_compiled` whether torch.compile makes
    its steps; `numerics` says what is not as in Hugging Face's or SparseML's training, or nothing. `is_general` is whether it
    trains other tasks than question answering."""

    what: str
    build: Callable[[Bench], Trained]
    has_teacher: bool = False
    numerics: str = ""
    is_compiled: bool = False
    is_general: bool = True


def _own(name: str) -> Arm:
    arm = OWN_ARMS[name]
    numerics = _OWN_NUMERICS + (_FUSED_NUMERICS if arm.attention == "fused" else "")
    return Arm(arm.what, lambda bench: build_own(arm, bench), arm.teacher == "live", numerics, arm.compiles)


def _by_tool(name: str) -> Arm:
    tool = TOOLS[name]
    return Arm(tool.what, lambda bench: build_tool(tool, bench), numerics=tool.numerics, is_general=False)


_SPARSEML: Final = "SparseML's recipe: masks by hooks, live teacher, torch.ao FakeQuantize, padded"
_STAND_IN: Final = "SparseML's operations in its loop, written anew: it does not install beside this torch"

ARMS: Final[Mapping[str, Arm]] = {
    **{name: _own(name) for name in OWN_ARMS},
    "b1": Arm("Hugging Face's script for the task (run_qa_no_trainer and its like): padded, SDPA, AdamW", build_b1),
    "b1_teacher": Arm(
        "the same with a live teacher of the same size", lambda bench: build_b1(bench, with_teacher=True), True
    ),
    "b2": Arm(f"{_SPARSEML}, fp32", build_b2, True, _STAND_IN, is_general=False),
    "b2_bf16": Arm(
        f"{_SPARSEML}, bf16", lambda bench: build_b2(bench, autocast=True), True, _STAND_IN, is_general=False
    ),
    "b3": Arm("b1 with batches of similar length, compiled", build_b3, is_compiled=True, is_general=False),
    **{name: _by_tool(name) for name in TOOLS},
}


def check_arms(names: Sequence[str], task: str) -> None:
    """Raise OptionError for an arm that is unknown, or that cannot train the task."""
    for name in names:
        if name not in ARMS:
            raise OptionError(f"--arms: no arm is called {name!r}{suggestion(name, ARMS)}")
        obstacle = obstacle_to_arm(name, task)
        if obstacle is not None:
            raise OptionError(f"--arms: {name}: {obstacle}")


def obstacle_to_arm(name: str, task: str) -> str | None:
    """Why an arm cannot train a task; None if it can."""
    if task != QUESTION_ANSWERING and not ARMS[name].is_general:
        able = ", ".join(other for other, arm in ARMS.items() if arm.is_general and other not in OWN_ARMS)
        return f"this baseline trains question answering alone, and the workload's task is {task}; of the baselines {able} train it"
    is_cached = name in OWN_ARMS and OWN_ARMS[name].teacher == "cached"
    if is_cached and not resolve_task(task).features_are_fixed:
        return (
            f"its teacher is asked once and its answers kept, and the features of {task} are others in every epoch; kd_live and "
            "recipe_live have a teacher in every step"
        )
    return None
