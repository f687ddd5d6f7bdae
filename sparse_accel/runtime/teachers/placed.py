"""A frozen model that answers for a teacher, however its weights are spread."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from sparse_accel.compress.attention import ATTENTION_NAME
from sparse_accel.packing import by_feature, is_packed, model_inputs, padded_inputs

_AUTOCAST_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Rank:
    """What a placement needs of the launch: accelerate's own `mixed_precision` is silent under DeepSpeed."""

    device: torch.device
    num_processes: int
    mixed_precision: str


@final
class PlacedTeacher:
    """`accepted` are the inputs that the model is given: no labels, which would only make it compute a loss that nobody
    reads. `spreader` is held as long as the teacher is, for a model that is alive only as long as what spread it.

    Where weights are spread over ranks every call is a collective: all ranks call equally often, with batches of any shape.
    """

    def __init__(
        self, model: nn.Module, accelerator: Any, accepted: frozenset[str], *, spreader: object = None
    ) -> None:
        self.model: Any = model
        self.device_type = accelerator.device.type
        self.autocast_dtype = _AUTOCAST_DTYPES.get(accelerator.mixed_precision)
        self.accepted = accepted
        self.spreader = spreader
        self.label_order: dict[str, Tensor] = {}
        self.takes_packed = getattr(getattr(model, "config", None), "_attn_implementation", None) == ATTENTION_NAME

    def reorder(self, label_order: Mapping[str, Sequence[int]], device: torch.device) -> None:
        """From now on entry n of an output's last dim is the teacher's entry `label_order[output][n]`."""
        self.label_order = {name: torch.tensor(order, device=device) for name, order in label_order.items()}

    def __call__(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The teacher's outputs in fp32 for the inputs of `batch` that it knows, laid out by feature."""
        return {name: value.float() for name, value in self.answers(batch).items()}

    @torch.no_grad()
    def answers(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same in the dtype in which they were computed. A teacher whose attention is not ours is given a packed batch's
        features padded."""
        if is_packed(batch) and not self.takes_packed:
            batch = padded_inputs(batch)
        with self._autocast():
            outputs = self.model(**model_inputs(batch, self.accepted))
        answers = by_feature(outputs, batch)
        for name, order in self.label_order.items():
            answers[name] = answers[name].index_select(-1, order)
        return answers

    def release(self) -> None:
        """Let go of the model; the teacher cannot be asked any more."""
        self.model = None
        self.spreader = None

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.autocast_dtype)


def freeze(model: nn.Module) -> None:
    """Eval mode, and no parameter that wants a gradient: what spreads the weights then keeps no place for one."""
    model.eval().requires_grad_(False)
