"""FSDP2: each parameter is cut along its first dimension, and whole inside the forward of its block only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from sparse_accel.errors import LaunchError
from sparse_accel.runtime.backends.base import recompute_activations
from sparse_accel.runtime.backends.plain import counts_on_cpu, find


class Fsdp2Backend:
    """See `Backend`. Raises LaunchError for settings of the launch that would not do what they say."""

    name = "FSDP2"
    shards_weights = True

    def __init__(self, accelerator: Any, precision: str) -> None:
        self.accelerator = accelerator
        self.precision = precision
        plugin = accelerator.state.fsdp_plugin
        if plugin.activation_checkpointing_offload:
            raise LaunchError("fsdp_activation_checkpointing_offload is not offered; leave it out of the launch")
        # accelerate would put a module around each block, and with that change the names that recipes and plans use: the
        # model's own way does the same.
        self.recomputes = bool(plugin.activation_checkpointing)
        plugin.activation_checkpointing = False
        # Parameters are gathered in float32 and cast by autocast, as under DDP: a weight that was rounded to bfloat16
        # before it is put on its grid may land on another point of it.
        plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, micro_batch_size: int, max_grad_norm: float
    ) -> tuple[nn.Module, Any]:
        """See `Backend`."""
        if self.recomputes:
            recompute_activations(model, "fsdp_activation_checkpointing")
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            # Left to the model, BERT's embeddings would be named too, whose table accelerate shards by itself.
            plugin.transformer_cls_names_to_wrap = block_classes(model)
        if self.precision != "no":
            # accelerate leaves this to the policy that is switched off above.
            with_autocast: Any = self.accelerator.autocast()
            model.forward = convert_outputs_to_fp32(with_autocast(model.forward))
        with _buffers_left_out(model), _head_in_root_group(model):
            prepared, prepared_optimizer = self.accelerator.prepare(model, optimizer)
        # Buffers alone: parameters are where they belong, which is the CPU where they are offloaded.
        for part in prepared.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(self.accelerator.device)
        return prepared, prepared_optimizer

    def whole_parameters(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """See `Backend`."""
        for name, parameter in _sharded(module):
            yield name, whole(parameter.detach())

    @torch.no_grad()
    def put_parameters(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """See `Backend`."""
        for name, parameter in _sharded(module):
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            part = part_of(tensors[name], parameter)
            local.copy_(part.to_local() if isinstance(part, DTensor) else part)

    def whole_optimizer(self, module: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        """See `Backend`."""
        for name, parameter in _sharded(module):
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{name}/{key}", whole(torch.as_tensor(value).detach())

    def put_optimizer(self, module: nn.Module, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
        """See `Backend`."""
        parameters = dict(_sharded(module))
        on_cpu = counts_on_cpu(optimizer)
        for full_name, value in tensors.items():
            parameter, key = find(parameters, full_name)
            if key == "step":
                optimizer.state[parameter][key] = (value if on_cpu else value.to(parameter.device)).clone()
            else:
                optimizer.state[parameter][key] = part_of(value, parameter)


def block_classes(model: nn.Module) -> list[str]:
    """The classes of a model's layers: what its longest list of modules holds."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return sorted({type(block).__name__ for block in max(lists, key=len, default=())})


def _sharded(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that the optimizer has. After a forward without backward the root's still stand whole in their
    place."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    yield from module.named_parameters()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """The whole `value`, which every rank has, cut as `like` is; nothing is sent."""
    if not isinstance(like, DTensor):
        return value.to(like.device).clone()
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def _head_in_root_group(model: Any) -> Iterator[None]:
    """Within, a head that shares its matrix with the embeddings is not put into a group of its own, with them: the head of BERT's
    kind shares its bias with the module around it as well, which would then stand in two groups, and torch refuses that."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = outputs is not None and getattr(inputs, "weight", None) is getattr(outputs, "weight", inputs)
    names = ("get_input_embeddings", "get_output_embeddings") if is_tied else ()
    for name in names:
        model.__dict__[name] = _nothing
    try:
        yield
    finally:
        for name in names:
            del model.__dict__[name]


def _nothing() -> None:
    """No embeddings."""


@contextmanager
def _buffers_left_out(model: nn.Module) -> Iterator[None]:
    """Within, no buffer counts as part of the state dict: accelerate's loading takes whatever it finds there for a
    sharded parameter. Masks and ranges are whole on every rank."""
    changed = []
    for module in model.modules():
        persistent = {name for name in module._buffers if name not in module._non_persistent_buffers_set}
        changed.append((module, persistent))
        module._non_persistent_buffers_set |= persistent
    try:
        yield
    finally:
        for module, persistent in changed:
            module._non_persistent_buffers_set -= persistent
