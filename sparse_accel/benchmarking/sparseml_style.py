"""SparseML's way to the same weights: masks by hooks, a live teacher, torch.ao's FakeQuantize, all in Hugging Face's loop.

Each weight is multiplied by its fp32 mask before every forward and each gradient in every micro-batch; the teacher runs on
a deep copy of every micro-batch; what the recipe quantizes goes through torch.ao.quantization.FakeQuantize with a
moving-average observer, attention's probabilities among it, so that attention is computed by two plain products. SparseML
itself does not install beside today's torch: these are its operations, read from its source.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_accel.benchmarking.baselines import (
    Loop,
    constant_schedule,
    distillation_loss,
    hugging_face_optimizer,
    padded_dataset,
    pruned_masks,
    shuffled,
)
from sparse_accel.benchmarking.models import random_model, random_teacher
from sparse_accel.benchmarking.own import Bench, quantized_plan
from sparse_accel.compress.attention import CONTEXT_MATMUL, SCORES_MATMUL
from sparse_accel.compress.fakequant import QuantSpec

_ATTENTION = "sparseml_style"


def build_b2(bench: Bench, *, autocast: bool = False) -> Loop:
    """All of SparseML's recipe at once: zeros held, a live teacher, ranges followed; in fp32 as published, or under bf16
    autocast, which SparseML switches off when it quantizes."""
    settings, device, within = bench.settings, bench.device, bench.stopwatch.within
    workload = settings.workload
    model = random_model(workload.shape, settings.seed, sparsity=workload.sparsity).to(device)
    masks = {name: mask.to(device) for name, mask in pruned_masks(model).items()}
    hook_masks(model, masks, bench)
    quantize(model, bench)
    teacher = random_teacher(workload.shape, settings.seed + 1).to(device).requires_grad_(False)
    teacher.set_attn_implementation("sdpa")
    optimizer = hugging_face_optimizer(model)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            with within("teacher"):
                inputs = copy.deepcopy(batch)
                with torch.no_grad():
                    wanted = teacher(**inputs)
            with within("forward"):
                outputs = model(**batch)
        return distillation_loss(outputs, wanted, temperature=5.0)

    return Loop(
        model,
        model,
        optimizer,
        constant_schedule(optimizer),
        shuffled(bench, padded_dataset(bench.features, workload.max_length)),
        loss,
        lambda value: value.backward(),
        workload.micro_batches,
        device,
        bench.stopwatch,
        clip=1.0,
        asks_for_nan=True,
        masks=masks,
    )


def hook_masks(model: nn.Module, masks: dict[str, Tensor], bench: Bench) -> None:
    """SparseML's two hooks for each mask: the weight before its module's forward, the gradient when it is there."""
    within = bench.stopwatch.within

    def before_forward(mask: Tensor) -> Any:
        def multiply(module: nn.Module, args: Any) -> None:
            weight: Any = module.weight
            with within("mask"):
                weight.data.mul_(mask)

        return multiply

    def on_gradient(mask: Tensor) -> Any:
        def multiply(gradient: Tensor) -> Tensor:
            with within("mask"):
                return gradient.mul_(mask)

        return multiply

    for name, mask in masks.items():
        module: Any = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(before_forward(mask))
        module.weight.register_hook(on_gradient(mask))


def quantize(model: Any, bench: Bench) -> None:
    """Give every tensor that the recipe quantizes a FakeQuantize of torch.ao, and attention its two products."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(_ATTENTION, materialised_attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    model.set_attn_implementation(_ATTENTION)
    for name, compression in quantized_plan(model).modules.items():
        if name.rpartition(".")[2] in (SCORES_MATMUL, CONTEXT_MATMUL):
            owner, _, product = name.rpartition(".")
            left, right = compression.inputs
            specs = (left, right, compression.output)
            model.get_submodule(owner).add_module(product, QATMatMul(*(fake_quantize(spec, bench) for spec in specs)))
            continue
        module = model.get_submodule(name)
        if compression.weight is not None:
            module.weight_fake_quant = fake_quantize(compression.weight, bench)
            module.__class__ = _QATLinear if isinstance(module, nn.Linear) else _QATEmbedding
        if compression.inputs:
            module.input_fake_quant = fake_quantize(compression.inputs[0], bench)
        if compression.output is not None:
            module.output_fake_quant = fake_quantize(compression.output, bench)
    model.to(bench.device)


def fake_quantize(spec: QuantSpec | None, bench: Bench) -> nn.Module:
    """torch.ao's module for a grid, in a phase of the stopwatch; nothing for None."""
    if spec is None:
        return nn.Identity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization announces its removal
        from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

        made: nn.Module = FakeQuantize(
            observer=MovingAverageMinMaxObserver,
            quant_min=spec.quant_min,
            quant_max=spec.quant_max,
            dtype=torch.qint8 if spec.signed else torch.quint8,
            qscheme=torch.per_tensor_symmetric if spec.symmetric else torch.per_tensor_affine,
            averaging_constant=spec.averaging_constant,
        )
    forward = made.forward

    def timed(x: Tensor) -> Tensor:
        with bench.stopwatch.within("quant"):
            quantized: Tensor = forward(x)
        return quantized

    made.forward = timed
    return made


class _QATLinear(nn.Linear):
    """torch.ao's QAT Linear behind SparseML's wrapper: input, weight and output through their fake quantizers."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        x = _through(self, "input_fake_quant", input)
        y = F.linear(x, _through(self, "weight_fake_quant", self.weight), self.bias)
        return _through(self, "output_fake_quant", y)


class _QATEmbedding(nn.Embedding):
    """torch.ao's QAT Embedding: the whole table is fake-quantized in every forward."""

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] to [..., embedding_dim]."""
        rows = F.embedding(input, _through(self, "weight_fake_quant", self.weight), self.padding_idx)
        return _through(self, "output_fake_quant", rows)


class QATMatMul(nn.Module):
    """SparseML's wrapper of an attention product."""

    def __init__(self, left: nn.Module, right: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.left, self.right, self.output = left, right, output

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """left [..., m, k] @ right [..., k, n]."""
        product: Tensor = self.output(torch.matmul(self.left(left), self.right(right)))
        return product


def materialised_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(query @ key.T * scaling + mask) @ value by plain products; see `compress.attention.attention_by_products`.
    `kwargs` are what the model passes to any attention."""
    scores = getattr(module, SCORES_MATMUL)(query, key.transpose(2, 3))
    scores = scores * (query.size(-1) ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.dropout(torch.softmax(scores, dim=-1), p=dropout, training=module.training)
    context = getattr(module, CONTEXT_MATMUL)(probabilities, value)
    return context.transpose(1, 2).contiguous(), probabilities


def _through(module: nn.Module, name: str, x: Tensor) -> Tensor:
    quantizer = getattr(module, name, None)
    return x if quantizer is None else quantizer(x)
