"""Whole tensors of a model that is spread over ranks: for checkpoints, checks and the final folder.

Every rank calls these together. What is whole ends up on the main process; what goes back in, every rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.compact_state import fitting_state
from sparse_accel.compress.layers import compressed_layers
from sparse_accel.compress.masks import held
from sparse_accel.compress.plan import copy_requests
from sparse_accel.errors import ModelError, OutputError
from sparse_accel.session import Session

Kept = Callable[[Tensor], Tensor]


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor itself, which training changes in place."""
    return tensor


def whole_state(session: Session, kept: Kept = as_it_is) -> dict[str, Tensor]:
    """The state dict of the model in training, whole; empty but on the main process. `kept` makes of a tensor that training
    goes on with what stands here for it: itself, or a copy. Zeros under masks are written, as the model computes with them."""
    module, backend = session.module, session.backend
    is_main = session.accelerator.is_main_process
    masks = {
        f"{name}.weight": layer.mask
        for name, layer in compressed_layers(module).items()
        if not isinstance(layer, CompactLinear) and layer.mask is not None and layer.has_stray_values
    }
    whole = {}
    for name, tensor in backend.whole_parameters(module):
        if is_main:
            if name in masks:
                tensor = held(tensor, masks[name].to(tensor.device))
            whole[name] = tensor.to("cpu", copy=True) if backend.shards_weights else kept(tensor)
    if not is_main:
        return {}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        key: whole[names[id(value)]] if id(value) in names else kept(value.detach())
        for key, value in module.state_dict(keep_vars=True).items()
    }


def put_state(session: Session, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Store a whole state dict, which every rank has read from `source`. Raises OutputError when it is that of another
    model; nothing is changed then."""
    module = session.module
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    state = module.state_dict(keep_vars=True)
    shapes = parameter_shapes(module)
    problems = [f"{key} is missing" for key in state if key not in tensors]
    problems += [f"{key} is not known" for key in tensors if key not in state]
    problems += [
        f"{key} is {list(tensors[key].shape)} there and {list(shapes[key])} here"
        for key in state
        if key in tensors and tensors[key].shape != shapes[key]
    ]
    if problems:
        more = f" ({len(problems)} differences)" if len(problems) > 1 else ""
        raise OutputError(f"{source} does not fit the model of this run: {problems[0]}{more}")
    values = {names[id(value)]: tensors[key] for key, value in state.items() if id(value) in names}
    session.backend.put_parameters(module, values)
    # Not only their numbers: modules that load forget what they knew of the old ones.
    buffers = {key: tensors[key] for key, value in state.items() if id(value) not in names}
    module.load_state_dict(buffers, strict=False)


def as_stored(session: Session, tensors: Mapping[str, Tensor], source: Path) -> Mapping[str, Tensor]:
    """Saved tensors of the model or its optimizer in the form in which this run stores its masked weights. Raises
    OutputError for zeros that are not those of this run's model."""
    try:
        return fitting_state(session.module, tensors)
    except ModelError as error:
        raise OutputError(f"{source}: {error}") from error


def parameter_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The whole shape of every entry of the state dict; ZeRO-3 keeps that of a parameter beside it."""
    return {
        key: torch.Size(getattr(value, "ds_shape", value.shape))
        for key, value in module.state_dict(keep_vars=True).items()
    }


def whole_optimizer(session: Session, kept: Kept = as_it_is) -> dict[str, Tensor]:
    """The optimizer's states as `<parameter name>/<state name>`, whole; empty but on the main process. `kept` as for
    `whole_state`."""
    is_main, shards = session.accelerator.is_main_process, session.backend.name != "DDP"
    whole = {}
    for name, tensor in session.backend.whole_optimizer(session.module, session.optimizer):
        if is_main:
            whole[name] = tensor.to("cpu", copy=True) if shards else kept(tensor)
    return whole


def whole_module(session: Session) -> nn.Module | None:
    """The model in training, whole, with its masks and quantizers as they are now; None but on the main process."""
    if not session.backend.shards_weights:
        return session.module if session.accelerator.is_main_process else None
    return whole_copy(session)


def whole_copy(session: Session) -> nn.Module | None:
    """The same as a model of its own, on the CPU, however training holds it."""
    state = whole_state(session)
    if not session.accelerator.is_main_process:
        return None
    assert session.build_whole is not None, "a session that trains knows how to build its model"
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and training may go on
        module = session.build_whole()
    module.load_state_dict(state)
    copy_requests(session.module, module)
    return module
