"""What a GPU does below a training step: matrix products, copies, launches, attention, AdamW, compact weights.

    python benchmarks/gpu_basics.py --results benchmarks/results/gpu_basics.json

These are the numbers that estimates of a step's time are made of; the first thing to run on a new kind of GPU, a minute or two.
Times are of CUDA events around many repetitions, the median of seven. On a machine without a GPU it runs with small sizes,
which shows that it works and says nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sparse_accel.benchmarking import circumstances
from sparse_accel.benchmarking.lengths import spread_lengths
from sparse_accel.compress.attention import packed_attention
from sparse_accel.compress.compact import CompactLinear, make_compact
from sparse_accel.compress.positions import pack_positions

REPEATS = 7


def main() -> None:
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    document = {
        "command": "python benchmarks/gpu_basics.py",
        "versions": circumstances.versions(),
        "machine": circumstances.machine(device),
        "matrix_products": matrix_products(device),
        "copy_bytes_per_second": copying(device),
        "seconds_per_small_operation": launching(device),
        "attention_seconds": attention(device),
        "adamw_seconds": adamw(device),
        "compact_seconds": compact(device),
    }
    text = json.dumps(document, indent=1)
    print(text)
    if arguments.results:
        arguments.results.write_text(text + "\n", "utf-8")


def seconds(work: Callable[[], Any], device: torch.device, calls: int = 20) -> float:
    """Of one call: the median of several stretches of `calls`."""
    if device.type == "cpu":
        calls = 1
    work()
    found = []
    for _ in range(REPEATS):
        if device.type == "cpu":
            begun = time.perf_counter()
            work()
            found.append(time.perf_counter() - begun)
            continue
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(calls):
            work()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / 1000 / calls)
    return statistics.median(found)


def matrix_products(device: torch.device) -> dict[str, float]:
    """bf16 operations a second of [tokens, k] @ [k, n], for the encoder's shapes and SQuAD's tokens in a batch."""
    found = {}
    for tokens in (2816, 5632) if device.type == "cuda" else (64,):
        for k, n in ((768, 3072), (1024, 4096)):
            left = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
            right = torch.randn(k, n, device=device, dtype=torch.bfloat16)
            taken = seconds(lambda left=left, right=right: left @ right, device)
            found[f"{tokens}x{k}x{n}"] = 2.0 * tokens * k * n / taken
    return found


def copying(device: torch.device) -> float:
    """Bytes read and written a second in a copy of a large tensor."""
    source = torch.randn(1 << (28 if device.type == "cuda" else 18), device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / seconds(lambda: target.copy_(source), device)


def launching(device: torch.device) -> float:
    """Seconds of an operation that has nothing to do, one after the other: what a launch costs."""
    small = torch.zeros(8, device=device)

    def many() -> None:
        for _ in range(1000):
            small.add_(1.0)

    return seconds(many, device, calls=1) / 1000


def attention(device: torch.device) -> dict[str, float]:
    """Forward and backward of attention over 32 sequences of SQuAD's lengths: packed as we do it, and padded to 384."""
    count, heads, dim = (32, 12, 64) if device.type == "cuda" else (4, 2, 16)
    lengths = spread_lengths("squad_v1", count, longest=384)
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    packed = torch.randn(1, heads, int(lengths.sum()), dim, device=device, dtype=dtype, requires_grad=True)
    padded = torch.randn(count, heads, 384, dim, device=device, dtype=dtype, requires_grad=True)
    mask = (torch.arange(384) < torch.from_numpy(lengths)[:, None])[:, None, None, :].to(device)

    def run_packed() -> None:
        packed_attention(packed, packed, packed, bounds, int(lengths.max()), 0.1, dim**-0.5).sum().backward()

    def run_padded() -> None:
        F.scaled_dot_product_attention(padded, padded, padded, attn_mask=mask, dropout_p=0.1).sum().backward()

    return {"packed": seconds(run_packed, device), "padded": seconds(run_padded, device)}


def adamw(device: torch.device) -> dict[str, float]:
    """A fused step over as many numbers as BERT-base has, and over those that are kept at 90 % zeros."""
    found = {}
    for name, count in (("whole", 108_893_186), ("compact", 32_450_000)):
        values = nn.Parameter(torch.randn(count if device.type == "cuda" else count // 1000, device=device))
        values.grad = torch.randn_like(values)
        found[name] = seconds(torch.optim.AdamW([values], lr=1e-5, fused=True).step, device)
    return found


def compact(device: torch.device) -> dict[str, float]:
    """Making a compact [3072, 768] weight with 90 % zeros whole, and taking its gradient back."""
    layer: Any = nn.Linear(768, 3072).to(device)
    make_compact(layer, pack_positions(torch.rand(3072, 768, device=device) < 0.1))
    assert isinstance(layer, CompactLinear)
    gradient = torch.randn(3072, 768, device=device)

    def both_ways() -> None:
        layer.masked_weight().backward(gradient)

    return {"whole": seconds(layer.masked_weight, device), "whole and back": seconds(both_ways, device)}


if __name__ == "__main__":
    main()
