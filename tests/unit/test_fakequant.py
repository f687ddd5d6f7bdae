"""Fake quantization: torch.ao's observers and kernels are the reference."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_accel.compress.fakequant import QuantSpec, fake_quantize, scale_and_zero_point
from sparse_accel.errors import ModelError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch announces that torch.ao will move; as a reference it still serves
    from torch.ao.quantization import MovingAverageMinMaxObserver

FLOATS = st.floats(-1e4, 1e4, width=32)
ALL_SPECS = [QuantSpec(b, symmetric=s, signed=g) for b in (4, 7, 8) for s in (True, False) for g in (True, False)]


def reference_observer(spec: QuantSpec) -> Any:
    """torch.ao's observer for a spec; the range is given to it only where SparseML gives it: off 8 bits."""
    scheme = torch.per_tensor_symmetric if spec.symmetric else torch.per_tensor_affine
    limits = {} if spec.bits == 8 else {"quant_min": spec.quant_min, "quant_max": spec.quant_max}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MovingAverageMinMaxObserver(
            averaging_constant=spec.averaging_constant,
            dtype=torch.qint8 if spec.signed else torch.quint8,
            qscheme=scheme,
            **limits,
        )


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
@settings(deadline=None, max_examples=60)
@given(bounds=st.tuples(FLOATS, FLOATS))
def test_scale_and_zero_point_are_those_of_torch_ao(spec: QuantSpec, bounds: tuple[float, float]) -> None:
    low, high = torch.tensor(min(bounds)), torch.tensor(max(bounds))
    observer = reference_observer(spec)
    observer(torch.stack([low, high]))
    expected_scale, expected_zero_point = observer.calculate_qparams()
    scale, zero_point = scale_and_zero_point(low, high, spec)
    assert scale.item() == expected_scale.item()
    assert zero_point.item() == expected_zero_point.item()
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)


def test_the_numbers_of_sparseml() -> None:
    low, high = torch.tensor(-1.0), torch.tensor(3.0)
    cases = {
        QuantSpec(symmetric=True, signed=True): (3 / 127.5, 0),
        QuantSpec(symmetric=True): (3 / 127.5, 128),
        QuantSpec(): (4 / 255, 64),
        QuantSpec(4, symmetric=True, signed=True): (3 / 7.5, 0),
        QuantSpec(4): (4 / 15, 4),
    }
    for spec, (scale, zero_point) in cases.items():
        found_scale, found_zero_point = scale_and_zero_point(low, high, spec)
        assert found_scale.item() == pytest.approx(scale, rel=1e-6)
        assert found_zero_point.item() == zero_point


def test_the_grid_has_two_to_the_bits_values() -> None:
    assert (QuantSpec(4).quant_min, QuantSpec(4).quant_max) == (0, 15)
    assert (QuantSpec(4, signed=True).quant_min, QuantSpec(4, signed=True).quant_max) == (-8, 7)
    assert (QuantSpec(8, signed=True).quant_min, QuantSpec(8, signed=True).quant_max) == (-128, 127)


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(symmetric=True, signed=True)], ids=str)
def test_an_affine_range_reaches_zero_and_nothing_is_without_scale(spec: QuantSpec) -> None:
    scale, zero_point = scale_and_zero_point(torch.tensor(2.0), torch.tensor(4.0), spec)
    assert scale.item() == pytest.approx(4 / 255 if not spec.symmetric else 4 / 127.5)
    assert zero_point.item() == 0
    scale, _ = scale_and_zero_point(torch.tensor(0.0), torch.tensor(0.0), spec)
    assert scale.item() == torch.finfo(torch.float32).eps
    scale, zero_point = scale_and_zero_point(torch.tensor(torch.inf), torch.tensor(-torch.inf), spec)
    assert (scale.item(), zero_point.item()) == (1.0, 0)


def test_every_channel_has_its_own_numbers() -> None:
    spec = QuantSpec(symmetric=True, signed=True, channel_axis=0)
    low, high = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 4.0])
    scale, _ = scale_and_zero_point(low, high, spec)
    torch.testing.assert_close(scale, torch.tensor([1 / 127.5, 4 / 127.5]))


@settings(deadline=None, max_examples=60)
@given(values=st.lists(FLOATS, min_size=2, max_size=40), spec=st.sampled_from(ALL_SPECS))
def test_fake_quantize_is_the_textbook_formula(values: list[float], spec: QuantSpec) -> None:
    x = torch.tensor(values)
    scale, zero_point = scale_and_zero_point(x.min() / 2, x.max() / 2, spec)  # half the range: some values clamp
    inverse = 1.0 / scale
    grid = (torch.round(x * inverse) + zero_point).clamp(spec.quant_min, spec.quant_max)
    assert torch.equal(fake_quantize(x, scale, zero_point, spec), (grid - zero_point) * scale)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), axis=st.sampled_from([0, 1]))
def test_the_per_channel_form_equals_torchs_kernel_in_value_and_gradient(seed: int, axis: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 7, generator=generator)
    spec = QuantSpec(symmetric=True, signed=True, channel_axis=axis)
    high = x.abs().amax(1 - axis) * 0.7
    scale, zero_point = scale_and_zero_point(-high, high, spec)
    mine, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = fake_quantize(mine, scale, zero_point, spec)
    theirs = torch.fake_quantize_per_channel_affine(reference, scale, zero_point, axis, -128, 127)
    assert torch.equal(ours, theirs)
    upstream = torch.randn(5, 7, generator=generator)
    ours.backward(upstream)
    theirs.backward(upstream)
    assert torch.equal(mine.grad, reference.grad)


def test_the_gradient_passes_inside_the_range_and_stops_outside() -> None:
    spec = QuantSpec(symmetric=True, signed=True)
    x = torch.tensor([-5.0, -0.3, 0.0, 0.7, 5.0], requires_grad=True)
    scale, zero_point = scale_and_zero_point(torch.tensor(-1.0), torch.tensor(1.0), spec)
    fake_quantize(x, scale, zero_point, spec).backward(torch.arange(1.0, 6.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


@settings(deadline=None, max_examples=60)
@given(
    bounds=st.tuples(FLOATS, FLOATS),
    spec=st.sampled_from(ALL_SPECS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_zero_stays_exactly_zero_on_every_grid(
    bounds: tuple[float, float], spec: QuantSpec, dtype: torch.dtype
) -> None:
    scale, zero_point = scale_and_zero_point(torch.tensor(min(bounds)), torch.tensor(max(bounds)), spec)
    assert fake_quantize(torch.zeros(3, dtype=dtype), scale, zero_point, spec).tolist() == [0.0, 0.0, 0.0]


def test_half_precision_is_computed_in_float32_and_given_back_in_its_own_type() -> None:
    spec = QuantSpec()
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale, zero_point = scale_and_zero_point(x.float().min(), x.float().max(), spec)
    found = fake_quantize(x, scale, zero_point, spec)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, fake_quantize(x.float(), scale, zero_point, spec).bfloat16())


def test_a_spec_survives_json() -> None:
    spec = QuantSpec(4, symmetric=True, signed=True, channel_axis=0, averaging_constant=0.1)
    assert QuantSpec.from_json(spec.to_json()) == spec


def test_a_spec_from_a_bad_file_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="no field 'bit'; did you mean 'bits'"):
        QuantSpec.from_json({"bit": 8})
    with pytest.raises(ModelError, match="2 to 16 bits, got 1"):
        QuantSpec.from_json({"bits": 1})
    with pytest.raises(ModelError, match="malformed"):
        QuantSpec.from_json({"bits": "many"})
    with pytest.raises(ModelError, match="averaging constant"):
        QuantSpec.from_json({"averaging_constant": 0})
