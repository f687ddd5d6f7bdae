"""What the loop, checkpoints and checks need of a backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from sparse_accel.errors import OptionError


def run_in_bf16(model: Any, device: torch.device) -> None:
    """Let a model's forward compute in bfloat16 by autocast and give float32, as accelerate does under DDP."""
    model.forward = convert_outputs_to_fp32(torch.autocast(device.type, dtype=torch.bfloat16)(model.forward))


def recompute_activations(model: Any, asked_by: str) -> None:
    """Let a model's layers keep their inputs alone and compute the rest again in backward. Raises OptionError for a model
    that cannot."""
    if not model.supports_gradient_checkpointing:
        raise OptionError(f"{asked_by}: {type(model).__name__} does not support it")
    # transformers 5.23 gave it, and its argument, another name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


class Backend(Protocol):
    """How a model is spread over ranks. What is whole on one rank only in parts comes out whole here, and goes back in.

    `shards_weights` says that parameters are whole in forward alone, which then needs every rank at the same time.
    `precision` is `no`, `bf16` or `fp16`. Methods that take or give whole tensors are
    called by all ranks together, in the same order.
    """

    name: str
    shards_weights: bool
    precision: str

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, micro_batch_size: int, max_grad_norm: float
    ) -> tuple[nn.Module, Any]:
        """Shard a model on the CPU and hand it with its optimizer to accelerate."""
        ...

    def whole_parameters(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Each parameter by name, whole, one at a time; valid until the next is asked for."""
        ...

    def put_parameters(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Store whole values, the same on every rank, for all parameters."""
        ...

    def whole_optimizer(self, module: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        """`<parameter name>/<state name>` -> whole tensor, one at a time."""
        ...

    def put_optimizer(self, module: nn.Module, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
        """Store what `whole_optimizer` gave. Raises OutputError for a parameter that the optimizer does not train."""
        ...
