"""The Triton kernel equals the plain form of fake quantization to the bit, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: Triton decides when it is imported whether it interprets.
CHECK = """
import torch
from sparse_accel.compress.fakequant import QuantSpec, reference_fake_quantize, scale_and_zero_point
from sparse_accel.compress.kernels.triton_grid import Observed, fake_quantize_and_observe, is_dense
from sparse_accel.compress import ranges
from sparse_accel.compress.kernels import triton_grid
from sparse_accel.compress.ranges import observed_entries, observed_range

def same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, check_stride=False)

def check(x, spec, high, observed=None, expected=None):
    scale, zero_point = scale_and_zero_point(torch.tensor(-high / 2), torch.tensor(high), spec)
    grid = (scale, zero_point, spec.quant_min, spec.quant_max)
    assert is_dense(x)
    mine, other = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    value, low, up = fake_quantize_and_observe(mine, *grid, observed)
    reference = reference_fake_quantize(other, scale, zero_point, spec)
    upstream = torch.randn(x.shape).to(x.dtype)
    if x.dtype == torch.bfloat16:
        # The interpreter cuts a number off where a GPU rounds it to bfloat16.
        torch.testing.assert_close(value, reference, rtol=2**-7, atol=0)
    else:
        same(value, reference)
    same(torch.autograd.grad(value, mine, upstream)[0], torch.autograd.grad(reference, other, upstream)[0])
    if observed is not None:
        same(torch.stack([low, up]), torch.stack(expected))

torch.manual_seed(0)
for spec in (QuantSpec(), QuantSpec(symmetric=True, signed=True), QuantSpec(4, signed=True), QuantSpec(16)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(5, 7, 130).to(dtype)
        for high in (20.0, 2.0):
            check(x, spec, high, Observed(), observed_range(x, None, (1,)))
odd = torch.randn(3000)
odd[7], odd[2500], odd[11], odd[12] = torch.nan, torch.inf, -torch.inf, 3e38
check(odd, QuantSpec(), 2.0, Observed(), [torch.tensor(torch.nan)] * 2)
edges = torch.arange(-600, 600) * 0.5
scale = 2.0 / 255
check((edges * scale).float(), QuantSpec(), 2.0)
check(torch.randn(1), QuantSpec(), 2.0)
check(torch.randn(()), QuantSpec(), 2.0)
tokens = torch.rand(3, 16) > 0.4
tokens[1] = False
def check_tokens(x, tokens, token_dims):
    observed = Observed(*observed_entries(x, tokens, token_dims))
    check(x, QuantSpec(), 2.0, observed, observed_range(x, tokens, token_dims))

check_tokens(torch.randn(3, 16, 40), tokens, (1,))
check_tokens(torch.randn(3, 16, 40), torch.zeros_like(tokens), (1,))
check_tokens(torch.randn(1, 16, 40), tokens, (1,))
check_tokens(torch.randn(3, 16, 4, 10).transpose(1, 2), tokens, (2,))
check_tokens(torch.randn(1, 16, 4, 10).permute(0, 2, 3, 1), tokens[:1], (3,))
check_tokens(torch.randn(3, 2, 16, 16), tokens, (2, 3))

# A quantizer that runs through the kernel follows the one that does not.
def followed(by_kernel):
    ranges.kernel_for = lambda x: triton_grid if by_kernel else None
    quantizer = ranges.ActivationQuantizer(QuantSpec(), ranges.ObservationContext())
    model = torch.nn.Sequential(quantizer)
    ranges.set_phase(model, ranges.Phase.OBSERVE)
    generator, found = torch.Generator().manual_seed(0), []
    for step in range(3):
        for micro_batch in range(2):
            ranges.observe_tokens(model, micro_batch == 0 or step < 2)
            quantizer.context.tokens = tokens if step else None
            found.append(model(torch.randn(3, 16, 40, generator=generator)))
        ranges.end_step(model, lambda vector: vector)
    return [*found, *quantizer.buffers()]

for one, other in zip(followed(True), followed(False), strict=True):
    same(one, other)
assert not is_dense(torch.randn(4, 6)[:, ::2]) and not is_dense(torch.empty(0)) and not is_dense(torch.ones(1).expand(3))
print("the same bits")
"""


def test_the_kernel_has_the_bits_of_the_plain_form() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.stdout.strip() == "the same bits", result.stderr
