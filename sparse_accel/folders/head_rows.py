"""The head of a masked language model at some tokens alone: at the others nobody reads the scores of the vocabulary."""

from __future__ import annotations

import inspect
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

# What such a model is given beside its usual inputs: int64 [M], places among all B * S tokens of a batch. Its logits are then
# [1, M, vocabulary].
ROWS: Final = "head_rows"

_TOLERANCE: Final = 1e-4


class _ChosenRows:
    """Hooks of the model below the head: they take ROWS out of its inputs, and of its last hidden states leave those rows."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Remember the rows of this call, if it names any."""
        self.rows = kwargs.pop(ROWS, None)
        return args, kwargs

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """The output with [1, M, hidden] in the place of [B, S, hidden]."""
        if self.rows is None:
            return output
        chosen = output[0].flatten(0, 1).index_select(0, self.rows).unsqueeze(0)
        self.rows = None
        if isinstance(output, tuple):
            return (chosen, *output[1:])
        output["last_hidden_state"] = chosen
        return output


def hook_head(model: Any) -> list[RemovableHandle]:
    """Let a model that is able to take ROWS."""
    hooks = _ChosenRows()
    return [
        model.base_model.register_forward_pre_hook(hooks.before, with_kwargs=True),
        model.base_model.register_forward_hook(hooks.after),
    ]


@torch.no_grad()
def let_head_choose(model: Any) -> bool:
    """Let a model take ROWS, if it is able to: found by trying it on a few tokens. One that is not stays as it was."""
    passes_on = inspect.signature(model.forward).parameters.values()
    if model.base_model is model or not any(parameter.kind is parameter.VAR_KEYWORD for parameter in passes_on):
        return False
    handles = hook_head(model)
    was_training = model.training
    model.eval()
    try:
        is_able = _tried(model)
    except Exception:  # a model that was not made for this raises whatever it likes
        is_able = False
    finally:
        model.train(was_training)
    if not is_able:
        for handle in handles:
            handle.remove()
    return is_able


def _tried(model: Any) -> bool:
    ids = torch.arange(8, device=model.device).view(2, 4) % model.config.vocab_size
    rows = torch.tensor([1, 6, 7], device=model.device)
    whole, chosen = (model(input_ids=ids, **more)["logits"] for more in ({}, {ROWS: rows}))
    expected = whole.flatten(0, 1)[rows].unsqueeze(0)
    if chosen.shape != expected.shape:
        return False
    return torch.allclose(chosen, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max()))
