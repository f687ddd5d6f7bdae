"""DeepSpeed ZeRO: optimizer states are cut over ranks (stage 1), gradients too (2), parameters too (3).

Reaches into DeepSpeed where it has no door: `deepspeed.utils` gives and takes whole master weights and states, but an
optimizer that has not stepped yet has no states to take them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_accel.errors import LaunchError
from sparse_accel.runtime.backends.base import run_in_bf16
from sparse_accel.runtime.backends.plain import find


class ZeroBackend:
    """See `Backend`. `precision` is what the launch and the flags ask for; DeepSpeed's own half precisions stay off, so
    that parameters are float32 and autocast casts them as it does under DDP. Raises LaunchError for settings of the launch
    that would not do what they say."""

    def __init__(self, accelerator: Any, precision: str) -> None:
        self.accelerator = accelerator
        self.precision = precision
        self.plugin = accelerator.state.deepspeed_plugin
        self.stage = int(self.plugin.zero_stage)
        self.name = f"DeepSpeed ZeRO-{self.stage}"
        # Stage 1 and 2 gather the updated parameters in the optimizer's step; a forward is each rank's own business.
        self.shards_weights = self.stage == 3
        if self.stage == 0:
            raise LaunchError(
                "the launch asks for DeepSpeed with ZeRO stage 0, which is plain DDP; use launch_configs/ddp.yaml"
            )
        _forget_zero3()
        _hush()

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, micro_batch_size: int, max_grad_norm: float
    ) -> tuple[nn.Module, Any]:
        """See `Backend`."""
        config = self.plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = micro_batch_size
        # A step's loss is normalised by its features before DeepSpeed sees it.
        config["gradient_accumulation_steps"] = 1
        config["gradient_clipping"] = float(max_grad_norm)
        # Offloaded states are updated by the same optimizer, which is vectorised on CPUs, and needs no compiler.
        config["zero_force_ds_cpu_optimizer"] = False
        if self.precision == "bf16":
            run_in_bf16(model, self.accelerator.device)
        prepared: tuple[nn.Module, Any] = self.accelerator.prepare(model, optimizer)
        return prepared

    def whole_parameters(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """See `Backend`."""
        import deepspeed

        for name, parameter in module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                yield name, parameter.detach()

    @torch.no_grad()
    def put_parameters(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """See `Backend`."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in module.named_parameters():
            value = tensors[name].to(self.accelerator.device)
            if self.stage < 3:
                parameter.data.copy_(value)
                safe_set_full_fp32_param(parameter, value)
                continue
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, _own_part(value, parameter))

    def whole_optimizer(self, module: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        """See `Backend`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        zero = optimizer.optimizer
        states = [zero.optimizer.state[flat] for flat in _masters(zero) if zero.optimizer.state.get(flat)]
        if not states:
            return
        self._link_states(zero)
        moments = [key for key, value in states[0].items() if key != "step" and isinstance(value, Tensor)]
        step = torch.as_tensor(states[0]["step"], dtype=torch.float32) if "step" in states[0] else None
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if step is not None:
                yield f"{name}/step", step
            for key in moments:
                yield f"{name}/{key}", safe_get_full_optimizer_state(parameter, key)

    def put_optimizer(self, module: nn.Module, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
        """See `Backend`."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        zero = optimizer.optimizer
        parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        named = [(*find(parameters, full_name), value) for full_name, value in tensors.items()]
        if not named:
            return
        moments = {key for _, key, _ in named} - {"step"}
        step = next((value for _, key, value in named if key == "step"), None)
        fused = any(group.get("fused") for group in zero.optimizer.param_groups)
        for flat in _masters(zero):
            state = {key: torch.zeros_like(flat.data) for key in moments}
            if step is not None:
                state["step"] = step.to(flat.device if fused else "cpu").clone()
            zero.optimizer.state[flat] = state
        self._link_states(zero)
        for parameter, key, value in named:
            if key == "step":
                continue
            value = value.to(self.accelerator.device)
            if self.stage < 3:
                safe_set_full_optimizer_state(parameter, value, key)
            else:
                safe_set_local_optimizer_state(parameter, _own_part(value, parameter), key)

    def _link_states(self, zero: Any) -> None:
        """Let DeepSpeed find the states of every group: by itself it looks once, when the first group has stepped."""
        if self.stage < 3:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()


def _masters(zero: Any) -> list[Tensor]:
    """The flat float32 tensors of this rank that the optimizer updates."""
    masters: list[Tensor] = (
        zero.fp32_partitioned_groups_flat
        if hasattr(zero, "fp32_partitioned_groups_flat")
        else zero.single_partition_of_fp32_groups
    )
    return masters


def _own_part(value: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a whole parameter; the last one's end is padding."""
    size = parameter.ds_tensor.numel()
    padded = value.new_zeros(size * torch.distributed.get_world_size())
    padded[: value.numel()] = value.flatten()
    return padded[size * torch.distributed.get_rank() :][:size]


def _hush() -> None:
    """Leave out what DeepSpeed says of its own workings and no user can act on: that torch's AdamW is not among the
    optimizers that it was tested with, and, at every step, that torch has new names for two of its collectives."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
    names = "all_gather_into_tensor|reduce_scatter_tensor|all_gather|reduce_scatter"
    warnings.filterwarnings("ignore", message=rf".torch\.distributed\.({names}). is deprecated", category=FutureWarning)


def _forget_zero3() -> None:
    """As long as transformers knows of a ZeRO-3 configuration it loads models as empty parts; masks and plans look at
    whole ones."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
