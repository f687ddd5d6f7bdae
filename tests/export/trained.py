"""Tiny trained folders for the tests of export: any architecture, with or without masks and quantizers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from sparse_accel.compress.attention import MATMULS
from sparse_accel.compress.masks import magnitude_mask
from sparse_accel.compress.plan import (
    CompressionPlan,
    fold,
    install,
    needs_quantized_attention,
    prunable_parameters,
    quantization_state,
    set_phase,
)
from sparse_accel.compress.ranges import Phase, begin_step, calibrating, end_step
from sparse_accel.folders.trained import PLAN_FILE, RANGES_FILE, use_own_attention
from sparse_accel.modifiers.quantization import QuantizationModifier
from tests.tiny import tiny_bert, tiny_rows

KINDS = ("bert", "distilbert", "roberta", "electra", "albert")


def trained_folder(
    folder: Path,
    kind: str = "bert",
    *,
    sparsity: float = 0.0,
    quantized: bool = True,
    per_channel: bool = False,
    embeddings: bool = True,
    attention: bool = True,
    layers: int = 1,
) -> Path:
    """A random model as training would leave it: its zeros, its plan, and ranges of real text."""
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    tiny_bert(folder, seed=3, layers=layers, kind=kind, dropout=0.0)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    with torch.no_grad():
        for name in prunable_parameters(model):
            weight = model.get_parameter(name)
            weight[~magnitude_mask(weight, sparsity)] = 0.0
    plan = planned(model, per_channel, embeddings, attention) if quantized else CompressionPlan()
    if quantized:
        if needs_quantized_attention(plan):
            assert use_own_attention(model)
        install(model, plan)
        set_phase(model, Phase.FROZEN)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = tiny_rows(16)
        batch = tokenizer([row["question"] for row in rows], [row["context"] for row in rows], padding=True)
        inputs = {name: torch.tensor(values) for name, values in batch.items()}
        with torch.no_grad(), calibrating(model):
            begin_step(model, 0)
            model(**inputs)
            end_step(model, lambda vector: vector)
        save_file(quantization_state(model), folder / RANGES_FILE)
        plan.save(folder / PLAN_FILE)
        fold(model)
    model.save_pretrained(folder)
    return folder


def planned(model: nn.Module, per_channel: bool, embeddings: bool, attention: bool) -> CompressionPlan:
    """The tutorial's placement on any architecture."""
    plan = CompressionPlan()
    modifier = QuantizationModifier(
        start_epoch=0.0,
        quantize_embeddings=embeddings,
        quantize_embedding_activations=embeddings,
        quantize_linear_activations=False,
        exclude_module_types=["LayerNorm"],
    )
    modifier.plan(plan, model)
    for name, compression in list(plan.modules.items()):
        if name.rpartition(".")[2] in MATMULS and not attention:
            del plan.modules[name]
        elif per_channel and compression.weight is not None and compression.inputs:
            plan.modules[name] = replace(compression, weight=replace(compression.weight, channel_axis=0))
    return plan
