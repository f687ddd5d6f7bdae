"""The fast forms of fake quantization equal the plain one to the bit, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_accel.compress.fakequant import QuantSpec, fake_quantize, reference_fake_quantize, scale_and_zero_point
from sparse_accel.compress.kernels.rows import row_extremes
from sparse_accel.compress.ranges import observed_range

SPECS = [QuantSpec(b, symmetric=s, signed=g) for b in (4, 8, 16) for s in (True, False) for g in (True, False)]
SHARES = {"none clamped": 1.01, "few clamped": 0.9, "many clamped": 0.2}


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, of which each sixteenth row reaches far beyond the others."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1, shape[-1])[::16] *= 8
    return x.to(dtype)


def both(x: Tensor, spec: QuantSpec, high: float | Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradient of `x` by the fast form and by the plain one, for a grid that reaches from -high/2 to high."""
    high = torch.as_tensor(high, dtype=torch.float32)
    scale, zero_point = scale_and_zero_point(-high / 2, high, spec)
    found = []
    for form in (fake_quantize, reference_fake_quantize):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        # As a function of a leaf that is not contiguous where x is not.
        value = form(leaf * 1, scale, zero_point, spec)
        upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
        (gradient,) = torch.autograd.grad(value, leaf, upstream)
        found.append([value.detach(), gradient])
    return found[0], found[1]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=0, equal_nan=True, check_stride=False)


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_row_form_has_the_bits_of_the_plain_one(spec: QuantSpec, dtype: torch.dtype, share: float) -> None:
    x = values(64, 128, dtype=dtype)
    assert row_extremes(x) is not None
    assert_same_bits(*both(x, spec, 2 * share * float(x.abs().max())))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scale_for_each_channel_has_the_bits_of_the_plain_form(axis: int) -> None:
    x = values(64, 128)
    spec = QuantSpec(symmetric=True, signed=True, channel_axis=axis)
    assert_same_bits(*both(x, spec, 0.9 * x.abs().amax(1 - axis)))


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "heads": lambda: values(2, 40, 4, 32).transpose(1, 2),
    "keys": lambda: values(2, 40, 4, 32).permute(0, 2, 3, 1),
    "transposed": lambda: values(96, 64).t(),
    "every other column": lambda: values(64, 256)[:, ::2],
    "expanded": lambda: values(1, 128).expand(64, 128),
    "a dim of one": lambda: values(64, 1, 128).transpose(0, 1),
    "one row": lambda: values(5003),
    "short rows": lambda: values(5003, 1),
    "small": lambda: values(3, 5),
    "one value": lambda: torch.tensor(0.7),
    "no value": lambda: torch.empty(0, 128),
}


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory_gives_the_same(layout: str, share: float) -> None:
    x = LAYOUTS[layout]()
    assert_same_bits(*both(x, QuantSpec(), 2 * share * float(x.abs().max() if x.numel() else 1)))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf, 3.4e38])
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(symmetric=True, signed=True)], ids=str)
@pytest.mark.parametrize("everywhere", [True, False])
def test_what_is_no_number_and_what_overflows_comes_out_as_in_the_plain_form(
    odd: float, spec: QuantSpec, everywhere: bool
) -> None:
    x = values(64, 128)
    (x[:, 3] if everywhere else x[5, :2]).fill_(odd)
    assert_same_bits(*both(x, spec, 6.0))


def test_the_bounds_of_the_grid_are_found_exactly() -> None:
    """Values on both sides of the last rounding step: one neighbour is clamped, the other is not."""
    spec = QuantSpec()
    scale, zero_point = scale_and_zero_point(torch.tensor(-1.0), torch.tensor(2.0), spec)
    edges = torch.tensor([255.5, -0.5]).sub(zero_point) * scale
    steps = torch.arange(-40, 41, dtype=torch.int32)
    near = (edges.view(torch.int32)[:, None] + steps).view(torch.float32).flatten()
    x = torch.zeros(64, 128)
    x[::3, :81], x[1::3, 40:121] = near[:81], near[81:]
    assert_same_bits(*both(x, spec, 2.0))


def test_a_tensor_on_its_grid_hands_its_gradient_on_as_it_is() -> None:
    x = values(64, 128).requires_grad_()
    scale, zero_point = scale_and_zero_point(x.min(), x.max(), QuantSpec())
    y = fake_quantize(x, scale, zero_point, QuantSpec())
    upstream = torch.ones(64, 128)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert gradient.data_ptr() == upstream.data_ptr()


def test_the_value_and_the_upstream_gradient_are_left_as_they_were() -> None:
    x = values(64, 128).requires_grad_()
    before, upstream = x.detach().clone(), torch.randn(64, 128)
    sent = upstream.clone()
    scale, zero_point = scale_and_zero_point(torch.tensor(-9.0), torch.tensor(9.0), QuantSpec())
    fake_quantize(x, scale, zero_point, QuantSpec()).backward(sent)
    assert torch.equal(x, before)
    assert torch.equal(sent, upstream)


@pytest.mark.parametrize(
    ("x", "token_dims"),
    [
        (values(4, 16, 128), (1,)),
        (values(4, 16, 4, 64).transpose(1, 2), (2,)),
        (values(1, 16, 512), (1,)),
        (values(4, 4, 16, 16), (2, 3)),
        (values(16, 4, 128).transpose(0, 1), (1,)),
    ],
    ids=lambda part: str(tuple(part.shape)) if isinstance(part, Tensor) else "",
)
@pytest.mark.parametrize("padded", [True, False])
def test_the_extremes_of_rows_give_the_range_of_real_tokens(
    x: Tensor, token_dims: tuple[int, ...], padded: bool
) -> None:
    tokens = torch.ones(4, 16, dtype=torch.bool)
    tokens[0] = False
    tokens[2, 7:] = False
    mask = tokens if padded else None
    assert observed_range(x, mask, token_dims, row_extremes(x)) == observed_range(x, mask, token_dims)
