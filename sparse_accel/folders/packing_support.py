"""Whether a model can be trained on packed batches: found by trying it on a few tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from sparse_accel.folders.packed_pooling import pool_by_sequence
from sparse_accel.folders.trained import use_own_attention
from sparse_accel.packing import BOUNDS, LONGEST

# Lengths of the sequences that are tried.
_LENGTHS = (7, 4)
_TOLERANCE = 1e-4
_NOT_BY_TOKEN = "gives no outputs by token, nor by sequence"


def first_position(model: Any) -> int:
    """The position id of a sequence's first token: RoBERTa's kind starts counting behind its padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


@torch.no_grad()
def obstacle_to_packing(model: Any, output_keys: tuple[str, ...]) -> str | None:
    """Why the model cannot take packed batches, a clause; None where it can, and from then on computes attention through
    `quantized_attention`, and pools each sequence's first token.

    Two short sequences are run alone and packed: the outputs must be the same, and those of the first must not move by a
    bit when the second is another. Attention that does not know bounds would mix sequences without a word.
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name} takes no position_ids"
    before, was_training = model.config._attn_implementation, model.training
    if not use_own_attention(model):
        return f"{name} does not go through transformers' attention interface"
    model.eval()
    problem = _problem(model, output_keys)
    if problem == _NOT_BY_TOKEN:
        hooks = pool_by_sequence(model)
        if hooks and _problem(model, output_keys) is None:
            problem, hooks = None, []
        for hook in hooks:
            hook.remove()
    model.train(was_training)
    if problem is not None:
        model.set_attn_implementation(before)
        return f"{name} {problem}"
    return None


def _problem(model: Any, output_keys: tuple[str, ...]) -> str | None:
    try:
        return _tried(model, output_keys)
    except Exception as error:  # a model that was not made for this raises whatever it likes
        return f"fails on a packed batch ({type(error).__name__})"


def _tried(model: Any, output_keys: tuple[str, ...]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    first, second, other = (
        torch.randint(model.config.vocab_size // 2, model.config.vocab_size, (1, length), generator=generator)
        for length in (*_LENGTHS, _LENGTHS[1])
    )
    first, second, other = (ids.to(model.device) for ids in (first, second, other))
    alone = [model(input_ids=ids, attention_mask=torch.ones_like(ids)) for ids in (first, second)]
    together, changed = (_packed(model, torch.cat([first, ids], dim=1)) for ids in (second, other))
    for key in output_keys:
        is_by_token = alone[0][key].shape[1] != alone[1][key].shape[1]
        expected = torch.cat([outputs[key] for outputs in alone], dim=1 if is_by_token else 0)
        if together[key].shape != expected.shape:
            return _NOT_BY_TOKEN
        part = (slice(None), slice(_LENGTHS[0])) if is_by_token else (slice(1),)
        if not torch.equal(together[key][part], changed[key][part]):
            return "lets sequences see each other"
        if not torch.allclose(together[key], expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())):
            return "computes something else of packed sequences"
    return None


def _packed(model: Any, ids: torch.Tensor) -> Any:
    positions = torch.cat([torch.arange(length) for length in _LENGTHS]) + first_position(model)
    bounds = torch.tensor([0, _LENGTHS[0], sum(_LENGTHS)], dtype=torch.int32)
    return model(
        input_ids=ids,
        position_ids=positions[None].to(ids.device),
        **{BOUNDS: bounds.to(ids.device), LONGEST: max(_LENGTHS)},
    )
