"""Models that classify a sequence by its first token, on packed batches: each sequence's own, not the batch's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_accel.packing import BOUNDS


class _FirstTokens:
    """Hooks of the model below the head, which knows the bounds, and of what reads hidden_states[:, 0] (a pooler or a head):
    of a packed batch, [1, T, hidden], that is given the first tokens of the N sequences, [N, 1, hidden]."""

    def __init__(self) -> None:
        self.bounds: Tensor | None = None

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the bounds of this call, if it is one of a packed batch."""
        self.bounds = kwargs.get(BOUNDS)

    def choose(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The first tokens in the place of all."""
        if self.bounds is None:
            return None
        firsts = args[0][0].index_select(0, self.bounds[:-1].long())
        self.bounds = None
        return (firsts.unsqueeze(1), *args[1:])


def pool_by_sequence(model: Any) -> list[RemovableHandle]:
    """Let a model that pools the first token take packed batches; no hooks where nothing that pools is found. Batches that are
    not packed are what they were."""
    pooler = getattr(model.base_model, "pooler", None)
    reader = pooler if isinstance(pooler, nn.Module) else getattr(model, "classifier", None)
    if model.base_model is model or not isinstance(reader, nn.Module):
        return []
    hooks = _FirstTokens()
    return [
        model.base_model.register_forward_pre_hook(hooks.before, with_kwargs=True),
        reader.register_forward_pre_hook(hooks.choose),
    ]


def pools_by_sequence(model: Any) -> bool:
    """Whether `pool_by_sequence` was called for the model."""
    hooks = model.base_model._forward_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), _FirstTokens) for hook in hooks)
