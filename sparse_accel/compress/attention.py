"""Attention whose two matrix products are quantized, behind the attention interface of Hugging Face models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_accel.compress.layers import QuantizedMatMul
from sparse_accel.compress.packed_products import has_packed_products, packed_products
from sparse_accel.compress.ranges import ActivationQuantizer
from sparse_accel.packing import BOUNDS, LONGEST, places

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
    probabilities). Arguments and results are those of `attention_by_products`.

    With bounds among `kwargs` the batch is packed: [1, heads, T, head_dim], where each sequence attends to itself alone and
    there is no other mask.
    """
    bounds = kwargs.get(BOUNDS)
    is_quantized = any(_is_active(getattr(module, product, None)) for product in MATMULS)
    if is_quantized and _is_fused(module):
        return _fused_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs), None
    if bounds is not None and attention_mask is not None:
        raise ValueError("a packed batch has bounds, and no attention mask")
    if bounds is not None and is_quantized:
        return packed_attention_by_products(module, query, key, value, bounds, scaling, dropout, **kwargs), None
    if is_quantized:
        return attention_by_products(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    return _float_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs), None


def _float_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> Tensor:
    key, value = _for_each_head(query, key), _for_each_head(query, value)
    is_causal = _needs_causal_mask(module, query, attention_mask, kwargs)
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    if BOUNDS in kwargs:
        return packed_attention(query, key, value, kwargs[BOUNDS], kwargs[LONGEST], dropout, scale, is_causal)
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=is_causal, scale=scale
    )
    return context.transpose(1, 2).contiguous()


def _is_fused(module: nn.Module) -> bool:
    """Whether the plan (`CompressionPlan.fuse_attention`) lets this training forward fuse."""
    probabilities = getattr(getattr(module, CONTEXT_MATMUL, None), "left_quantizer", None)
    if not isinstance(probabilities, ActivationQuantizer) or probabilities.spec.fixed_range is None:
        return False
    return module.training and not probabilities.calibrating


def _fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> Tensor:
    """Fused attention of quantized operands, and its quantized context."""
    scores_matmul, context_matmul = (getattr(module, product) for product in MATMULS)
    query = scores_matmul.left_quantizer(query, (2,))
    key = scores_matmul.right_quantizer(key, (2,))
    value = context_matmul.right_quantizer(value, (2,))
    context = _float_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    output: ActivationQuantizer | None = context_matmul.output_quantizer
    return context if output is None else output(context, (1,))


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


def packed_attention_by_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """`attention_by_products` of packed sequences [1, heads, T, head_dim], which are laid out [N, heads, S, head_dim] for it
    and back: [1, T, heads, head_dim]. No padding is observed."""
    num_tokens, longest = query.size(2), kwargs[LONGEST]
    if has_packed_products(query):
        scores_matmul, context_matmul = (
            product if _is_active(product) else None for product in (getattr(module, name, None) for name in MATMULS)
        )
        return packed_products(
            scores_matmul,
            context_matmul,
            query,
            _for_each_head(query, key),
            _for_each_head(query, value),
            bounds,
            query.size(-1) ** -0.5 if scaling is None else scaling,
            dropout if module.training else 0.0,
        )
    tokens, is_token, place = places(bounds, num_tokens, longest)
    with _observing(module, is_token):
        context, _ = attention_by_products(
            module,
            _laid_out(query, tokens),
            _laid_out(key, tokens),
            _laid_out(value, tokens),
            is_token[:, None, None, :],
            scaling,
            dropout,
            is_causal=False,
        )
    return context.flatten(0, 1).index_select(0, place)[None]


def _laid_out(packed: Tensor, tokens: Tensor) -> Tensor:
    """[1, heads, T, head_dim] as [N, heads, S, head_dim], by which of the T tokens stands at each place, [N, S]."""
    chosen = packed[0].index_select(1, tokens.flatten())
    return chosen.view(packed.size(1), *tokens.shape, packed.size(3)).transpose(0, 1)


@contextmanager
def _observing(module: nn.Module, is_token: Tensor) -> Iterator[None]:
    """Let the products' quantizers look at the places that hold a token."""
    quantizer = next(q for q in module.modules() if isinstance(q, ActivationQuantizer))
    context, before = quantizer.context, quantizer.context.tokens
    context.tokens = is_token
    try:
        yield
    finally:
        context.tokens = before


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    dropout: float,
    scale: float,
    is_causal: bool = False,
) -> Tensor:
    """softmax(query @ key.T * scale) @ value within each sequence of packed ones, [1, heads, T, head_dim] to
    [1, T, heads, head_dim].

    `bounds` int32 [N + 1] are where sequences begin and the last ends; none has more than `longest` tokens. On a GPU that
    is flash attention over unequal lengths, where there is one (half precision); on a CPU one fused attention for each
    sequence, the quickest of the exact forms there.
    """
    if query.device.type == "cpu":
        return attention_by_sequence(query, key, value, bounds, dropout, scale, is_causal)
    if _has_flash_attention(query):
        q, k, v = (packed[0].transpose(0, 1).contiguous() for packed in (query, key, value))
        # What torch.nn.attention.varlen calls too, but that has no dropout.
        context = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, dropout, is_causal, False, scale=scale
        )[0]
        return context[None]  # type: ignore[no-any-return]
    tokens, is_token, place = places(bounds, query.size(2), longest)
    q, k, v = (_laid_out(packed, tokens) for packed in (query, key, value))
    mask = is_token[:, None, None, :]
    if is_causal:
        mask = mask & torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril()
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return context.transpose(1, 2).flatten(0, 1).index_select(0, place)[None]


def attention_by_sequence(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, dropout: float, scale: float, is_causal: bool
) -> Tensor:
    """`packed_attention` with one fused attention for each sequence. Reads the bounds, and has as many parts as there are
    sequences: no compiler should look into it."""
    lengths = bounds.diff().tolist()
    # split, not slices: the gradients of all its parts are put together once, those of slices are as long as the whole.
    parts = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal, scale=scale)
        for q, k, v in zip(*(torch.split(packed, lengths, dim=2) for packed in (query, key, value)), strict=True)
        if q.size(2)
    ]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1)


def _has_flash_attention(query: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.size(-1) <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


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
