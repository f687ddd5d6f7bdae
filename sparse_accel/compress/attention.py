"""Attention whose two matrix products are quantized, behind the attention interface of Hugging Face models."""

from __future__ import annotations

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
    """softmax(query @ key.T * scaling + mask) @ value, with both products quantized where the plan says so.

    query, key and value are [batch, heads, length, head_dim]; the mask is additive, or bool with True for "attend",
    broadcastable to [batch, heads, queries, keys]. As SparseML places them: the scores are quantized before scaling,
    the probabilities after dropout. Returns the context [batch, length, heads, head_dim] and the probabilities (None
    where the fused kernel served because nothing is quantized at present). `kwargs` are what the model passes to any
    attention.
    """
    if scaling is None:
        scaling = query.size(-1) ** -0.5
    groups = query.size(1) // key.size(1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    causal = attention_mask is None and query.size(2) > 1 and bool(kwargs.get("is_causal", _is_causal(module)))
    scores_matmul: Any = getattr(module, SCORES_MATMUL, None)
    context_matmul: Any = getattr(module, CONTEXT_MATMUL, None)
    if _is_active(scores_matmul) or _is_active(context_matmul):
        if _is_active(scores_matmul):
            scores = scores_matmul(
                query, key.transpose(2, 3), left_tokens=(2,), right_tokens=(3,), output_tokens=(2, 3)
            )
        else:
            scores = torch.matmul(query, key.transpose(2, 3))
        scores = scores * scaling
        if causal:
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
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
    )
    return context.transpose(1, 2).contiguous(), None


def _is_active(product: Any) -> bool:
    return isinstance(product, QuantizedMatMul) and not product.is_idle


def _is_causal(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", False))
