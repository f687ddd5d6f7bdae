"""One process, or DistributedDataParallel: every rank holds everything."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_accel.errors import OutputError


class PlainBackend:
    """See `Backend`."""

    name = "DDP"
    shards_weights = False

    def __init__(self, accelerator: Any, precision: str) -> None:
        self.accelerator = accelerator
        self.precision = precision

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, micro_batch_size: int, max_grad_norm: float
    ) -> tuple[nn.Module, Any]:
        """See `Backend`."""
        with warnings.catch_warnings():
            # torch 2.13 announces another name for broadcast_buffers, which accelerate still passes under the old one.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            prepared: tuple[nn.Module, Any] = self.accelerator.prepare(model, optimizer)
        return prepared

    def whole_parameters(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """See `Backend`."""
        for name, parameter in module.named_parameters():
            yield name, parameter.detach()

    @torch.no_grad()
    def put_parameters(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """See `Backend`."""
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[name])

    def whole_optimizer(self, module: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        """See `Backend`."""
        for name, parameter in module.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{name}/{key}", torch.as_tensor(value).detach()

    def put_optimizer(self, module: nn.Module, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
        """See `Backend`."""
        parameters = dict(module.named_parameters())
        on_cpu = counts_on_cpu(optimizer)
        for full_name, value in tensors.items():
            parameter, key = find(parameters, full_name)
            kept = value if key == "step" and on_cpu else value.to(parameter.device)
            # Not the caller's own memory, which may be a file's.
            optimizer.state[parameter][key] = kept.clone()


def counts_on_cpu(optimizer: Any) -> bool:
    """AdamW counts its steps on the CPU unless it is fused: then beside the parameter, as its moments always are."""
    return not any(group.get("fused") for group in optimizer.param_groups)


def find(parameters: Mapping[str, nn.Parameter], full_name: str) -> tuple[nn.Parameter, str]:
    """The parameter and the state's name of `<parameter name>/<state name>`. Raises OutputError for an unknown one."""
    name, _, key = full_name.rpartition("/")
    if name not in parameters:
        raise OutputError(f"the checkpoint's optimizer knows {name}, which the model of this run does not train")
    return parameters[name], key
