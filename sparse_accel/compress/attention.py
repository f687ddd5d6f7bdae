"""Attention whose two matrix products are quantized, behind the attention interface of Hugging Face models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_accel.compress.layers import QuantizedMatMul

# The name under which the runtime registers `quantized_attention` with the model library.
ATTENTION_NAME = "sparse_accel"

SCORES_MATMUL = "attention_scores_matmul"
CONTEXT_MATMUL = "context_layer_matmul"
MATMULS = (SCORES_MATMUL, CONTEXT_MATMUL)

# How models call the projections of one self-attention module.
_PROJECTIONS = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"))


def self_attention_modules(model: nn.Module) -> list[str]:
    """Names of the modules that compute attention: an "Attention" class with three linear projections as children."""
    return [
        name
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__
        and any(all(isinstance(getattr(module, p, None), nn.Linear) for p in names) for names in _PROJECTIONS)
    ]


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attention_by_products` while a product is quantized, torch's fused attention while none is (which gives no
    probabilities). Arguments and results are those of `attention_by_products`."""
    if any(_is_active(getattr(module, product, None)) for product in MATMULS):
        return attention_by_products(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    key, value = _for_each_head(query, key), _for_each_head(query, value)
    context = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=_needs_causal_mask(module, query, attention_mask, kwargs),
        scale=query.size(-1) ** -0.5 if scaling is None else scaling,
    )
    return context.transpose(1, 2).contiguous(), None


def attention_by_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """softmax(query @ key.T * scaling + mask) @ value, with both products quantized where the plan says so.

    query, key and value are [batch, heads, length, head_dim]; the mask is additive, or bool with True for "attend",
    broadcastable to [batch, heads, queries, keys]. As SparseML places them: the scores are quantized before scaling,
    the probabilities after dropout. Returns the context [batch, length, heads, head_dim] and the probabilities.
    `kwargs` are what the model passes to any attention.
    """
    scores_matmul: Any = getattr(module, SCORES_MATMUL, None)
    context_matmul: Any = getattr(module, CONTEXT_MATMUL, None)
    key, value = _for_each_head(query, key), _for_each_head(query, value)
    if _is_active(scores_matmul):
        scores = scores_matmul(query, key.transpose(2, 3), left_tokens=(2,), right_tokens=(3,), output_tokens=(2, 3))
    else:
        scores = torch.matmul(query, key.transpose(2, 3))
    scores = scores * (query.size(-1) ** -0.5 if scaling is None else scaling)
    if _needs_causal_mask(module, query, attention_mask, kwargs):
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None and attention_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.dropout(torch.softmax(scores, dim=-1), p=dropout, training=module.training)
    if _is_active(context_matmul):
        context = context_matmul(probabilities, value, left_tokens=(2, 3), right_tokens=(2,), output_tokens=(2,))
    else:
        context = torch.matmul(probabilities, value)
    return context.transpose(1, 2).contiguous(), probabilities


def _for_each_head(query: Tensor, shared: Tensor) -> Tensor:
    """Keys or values that groups of heads share, once for each head."""
    groups = query.size(1) // shared.size(1)
    return shared.repeat_interleave(groups, dim=1) if groups > 1 else shared


def _needs_causal_mask(
    module: nn.Module, query: Tensor, attention_mask: Tensor | None, kwargs: Mapping[str, Any]
) -> bool:
    return attention_mask is None and query.size(2) > 1 and bool(kwargs.get("is_causal", _is_causal(module)))


def _is_active(product: Any) -> bool:
    return isinstance(product, QuantizedMatMul) and not product.is_idle


def _is_causal(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", False))
