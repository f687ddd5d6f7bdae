"""Quantized attention over packed sequences equals the plain form: values, gradients, ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_accel.compress.attention import MATMULS, attention_by_products, packed_attention_by_products
from sparse_accel.compress.fakequant import QuantSpec
from sparse_accel.compress.layers import QuantizedMatMul
from sparse_accel.compress.packed_products import has_packed_products
from sparse_accel.compress.ranges import ObservationContext, Phase, end_step, quantization_state, set_phase
from sparse_accel.packing import LONGEST
from tests.unit.qat_bert import alone

HEADS, WIDTH = 3, 32
UINT8, UINT8_SYMMETRIC = QuantSpec(), QuantSpec(symmetric=True)


def attention_module(active: tuple[str, ...] = MATMULS, narrow: bool = False) -> nn.Module:
    """What the tutorial's plan makes of an attention module; `narrow` grids clamp some of everything."""
    module, context = nn.Module(), ObservationContext()
    for name in active:
        module.add_module(name, QuantizedMatMul(UINT8, UINT8_SYMMETRIC, UINT8, context, torch.device("cpu")))
    set_phase(module, Phase.OBSERVE)
    for product in module.children():
        for name, quantizer in product.named_children():
            wide = 0.01 if (product is module._modules.get(MATMULS[1]) and name == "left_quantizer") else 0.1
            quantizer.scale.fill_(wide / 8 if narrow else wide)  # type: ignore[operator, union-attr]
            quantizer.zero_point.fill_(100 if name != "left_quantizer" or wide == 0.1 else 0)  # type: ignore[operator, union-attr]
    return module.train()


def operands(total: int) -> list[Tensor]:
    """Query, key and value [1, heads, T, head_dim] as a model makes them: views of [T, heads, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, total, HEADS, WIDTH, generator=generator) for _ in range(3)]
    return [x.transpose(1, 2).requires_grad_() for x in made]


def run(form: Callable[..., Any], module: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    out = form(module, *inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(out, inputs, upstream)
    end_step(module, alone)
    return out.detach(), list(gradients)


def plain(lengths: tuple[int, ...], dropout: float = 0.0) -> Callable[..., Tensor]:
    """Each sequence by itself through the form for padded batches."""

    def form(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([attention_by_products(module, *part, None, dropout=dropout)[0] for part in parts], dim=1)

    return form


def packed(lengths: tuple[int, ...], dropout: float = 0.0) -> Callable[..., Tensor]:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()

    def form(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert has_packed_products(query)
        return packed_attention_by_products(module, query, key, value, bounds, None, dropout, **{LONGEST: max(lengths)})

    return form


@pytest.mark.parametrize("narrow", [False, True], ids=["on the grid", "clamped"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("active", [MATMULS, MATMULS[:1], MATMULS[1:]], ids=["both", "scores", "context"])
def test_packed_products_equal_those_of_each_sequence(active: tuple[str, ...], dropout: float, narrow: bool) -> None:
    lengths = (40, 1, 65)
    modules = attention_module(active, narrow), attention_module(active, narrow)
    forms = packed(lengths, dropout), plain(lengths, dropout)
    found, expected = (run(form, module, operands(sum(lengths))) for form, module in zip(forms, modules, strict=True))
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    ranges = [quantization_state(module) for module in modules]
    torch.testing.assert_close(*ranges, rtol=0, atol=0)
