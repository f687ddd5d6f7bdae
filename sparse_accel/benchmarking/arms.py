"""All arms by name: what each is, what of its numerics differs, and how it is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from sparse_accel.benchmarking.baselines import Trained, build_b1, build_b3
from sparse_accel.benchmarking.other_tools import TOOLS, build_tool
from sparse_accel.benchmarking.own import OWN_ARMS, Bench, build_own
from sparse_accel.benchmarking.sparseml_style import build_b2

_OWN_NUMERICS: Final = "padding takes no part in losses, softmax and ranges"

_FUSED_NUMERICS: Final = "; attention's scores and probabilities are not quantized in training"


@dataclass(frozen=True)
class Arm:
    """One arm of a benchmark. `has_teacher` is whether a teacher runs in every step, `is_compiled` whether torch.compile makes
    its steps; `numerics` says what is not as in Hugging Face's or SparseML's training, or nothing."""

    what: str
    build: Callable[[Bench], Trained]
    has_teacher: bool = False
    numerics: str = ""
    is_compiled: bool = False


def _own(name: str) -> Arm:
    arm = OWN_ARMS[name]
    numerics = _OWN_NUMERICS + (_FUSED_NUMERICS if arm.attention == "fused" else "")
    return Arm(arm.what, lambda bench: build_own(arm, bench), arm.teacher == "live", numerics, arm.compiles)


def _by_tool(name: str) -> Arm:
    tool = TOOLS[name]
    return Arm(tool.what, lambda bench: build_tool(tool, bench), numerics=tool.numerics)


_SPARSEML: Final = "SparseML's recipe: masks by hooks, live teacher, torch.ao FakeQuantize, padded"
_STAND_IN: Final = "SparseML's operations in its loop, written anew: it does not install beside this torch"

ARMS: Final[Mapping[str, Arm]] = {
    **{name: _own(name) for name in OWN_ARMS},
    "b1": Arm("Hugging Face's run_qa_no_trainer: padded, SDPA, AdamW", build_b1),
    "b1_teacher": Arm(
        "the same with a live teacher of the same size", lambda bench: build_b1(bench, with_teacher=True), True
    ),
    "b2": Arm(f"{_SPARSEML}, fp32", build_b2, True, _STAND_IN),
    "b2_bf16": Arm(f"{_SPARSEML}, bf16", lambda bench: build_b2(bench, autocast=True), True, _STAND_IN),
    "b3": Arm("b1 with batches of similar length, compiled", build_b3, is_compiled=True),
    **{name: _by_tool(name) for name in TOOLS},
}
