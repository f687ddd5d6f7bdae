"""A census of a model: how many weights there are, how many are zero, and how much is quantized."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.plan import CompressionPlan, prunable_parameters

# Kind of a matrix by its name, first match: the head before attention, since it may have an out_proj of its own.
# Vectors (biases, norms) and what fits nothing are "other".
_KINDS = {
    "embeddings": re.compile(r"embed|\bw[tp]e\b"),
    "head": re.compile(r"\b(qa_outputs|classifier|pre_classifier|pooler|score|cls|lm_head|predictions|vocab_\w+)\b"),
    "attention": re.compile(r"attention|attn|\b[qkvo]_(proj|lin)\b|\bout_(proj|lin)\b"),
    "feed-forward": re.compile(r"intermediate|\boutput\.dense\b|\b(ffn\w*|mlp|fc1|fc2|lin1|lin2|c_fc|wi|wo)\b"),
}
_OTHER = "other"
_ROWS = ("embeddings", "attention", "feed-forward", "head", _OTHER)


@dataclass(frozen=True)
class Count:
    """Weights and how many of them are zero."""

    numel: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros in [0, 1]."""
        return self.zeros / self.numel if self.numel else 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.numel + other.numel, self.zeros + other.zeros)


@dataclass(frozen=True)
class ParameterCount(Count):
    """One parameter. `kind` is embeddings, attention, feed-forward, head or other; `prunable` as `__ALL_PRUNABLE__`."""

    name: str
    kind: str
    prunable: bool


@dataclass(frozen=True)
class KindCount(Count):
    """All parameters of one kind, and how many modules of that kind are quantized."""

    kind: str
    quantized: int


@dataclass(frozen=True)
class Census:
    """Counts of every parameter (each once, also where two modules share it) and of the quantized modules of a plan."""

    parameters: tuple[ParameterCount, ...]
    quantized_modules: tuple[str, ...] = ()
    num_quantizers: int = 0

    @classmethod
    def of(cls, model: nn.Module | Mapping[str, Tensor], plan: CompressionPlan | None = None) -> Census:
        """Count a model, compact weights as if they were whole, or a state dict of a plain one (where a matrix called
        `.weight` that is no embedding counts as prunable).

        Waits for the device.
        """
        tensors = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
        compact: dict[str, CompactLinear] = {}
        if isinstance(model, nn.Module):
            prunable = set(prunable_parameters(model))
            compact = {f"{n}.values": m for n, m in model.named_modules() if isinstance(m, CompactLinear)}
        else:
            prunable = {
                name
                for name, tensor in tensors.items()
                if tensor.dim() > 1 and name.endswith("weight") and _kind(name, tensor) != "embeddings"
            }
        zeros = torch.stack([(t == 0).sum().cpu() for t in tensors.values()]).tolist() if tensors else []
        quantized = {n: c for n, c in plan.modules.items() if c.is_quantized} if plan is not None else {}
        return cls(
            tuple(
                _count_compact(name, compact[name], count)
                if name in compact
                else ParameterCount(tensor.numel(), count, name, _kind(name, tensor), name in prunable)
                for (name, tensor), count in zip(tensors.items(), zeros, strict=True)
            ),
            tuple(quantized),
            sum(compression.num_quantizers for compression in quantized.values()),
        )

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def prunable(self) -> Count:
        """What `__ALL_PRUNABLE__` covers, summed."""
        return sum((p for p in self.parameters if p.prunable), Count(0, 0))

    @property
    def sparsity(self) -> float:
        """Share of zeros among the prunable weights."""
        return self.prunable.sparsity

    def kinds(self) -> list[KindCount]:
        """One row for each kind that occurs."""
        rows = []
        for kind in _ROWS:
            members = [p for p in self.parameters if p.kind == kind]
            if members:
                total = sum(members, Count(0, 0))
                quantized = sum(kind_of_name(name) == kind for name in self.quantized_modules)
                rows.append(KindCount(total.numel, total.zeros, kind, quantized))
        return rows

    def to_json(self) -> dict[str, Any]:
        """Totals, kinds and every parameter as plain values."""
        return {
            "parameters": self.num_parameters,
            "prunable": self.prunable.numel,
            "prunable_zeros": self.prunable.zeros,
            "sparsity": self.sparsity,
            "quantized_modules": len(self.quantized_modules),
            "quantizers": self.num_quantizers,
            "kinds": {
                row.kind: {
                    "parameters": row.numel,
                    "zeros": row.zeros,
                    "sparsity": row.sparsity,
                    "quantized_modules": row.quantized,
                }
                for row in self.kinds()
            },
            "by_parameter": {
                p.name: {"parameters": p.numel, "zeros": p.zeros, "sparsity": p.sparsity} for p in self.parameters
            },
        }


def _count_compact(name: str, layer: CompactLinear, zeros: int) -> ParameterCount:
    """The weight as it is when it is whole, from how many of its `values` are zero."""
    name = f"{name.removesuffix('.values')}.weight"
    numel = layer.num_weights
    # Outside forward ZeRO-3 has no values here.
    zeros_kept = zeros - (layer.num_values - layer.num_kept) if layer.values.numel() else 0
    return ParameterCount(numel, numel - layer.num_kept + zeros_kept, name, kind_of_name(name), prunable=True)


def _kind(name: str, tensor: Tensor) -> str:
    return kind_of_name(name) if tensor.dim() > 1 else _OTHER


def kind_of_name(name: str) -> str:
    """The kind of a matrix: embeddings, attention, feed-forward, head or other."""
    lowered = name.lower()
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(lowered)), _OTHER)
