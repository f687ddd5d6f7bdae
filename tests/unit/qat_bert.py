"""A tiny BERT in memory with the tutorial's quantization, for the tests of compression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertForQuestionAnswering
from transformers.masking_utils import sdpa_mask

from sparse_accel.compress.attention import ATTENTION_NAME, quantized_attention
from sparse_accel.compress.masks import magnitude_mask
from sparse_accel.compress.plan import CompressionPlan, prunable_parameters
from sparse_accel.modifiers.quantization import QuantizationModifier

AttentionInterface.register(ATTENTION_NAME, quantized_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)

TUTORIAL: dict[str, Any] = {
    "start_epoch": 0.0,
    "submodules": ["bert.embeddings", "bert.encoder", "qa_outputs"],
    "quantize_embeddings": 1,
    "quantize_linear_activations": 0,
    "exclude_module_types": ["LayerNorm"],
}


def bert_config(layers: int = 1, dropout: float = 0.0, attention: str = ATTENTION_NAME) -> BertConfig:
    """A tiny shape whose matrices are all of different sizes where they can be."""
    return BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
        attn_implementation=attention,
    )


def bert(layers: int = 1, seed: int = 0, sparsity: float = 0.0, **shape: Any) -> BertForQuestionAnswering:
    """The model, in training mode, its prunable weights pruned by magnitude."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForQuestionAnswering(bert_config(layers, **shape))
    with torch.no_grad():
        for name in prunable_parameters(model) if sparsity else []:
            weight = model.get_parameter(name)
            weight.mul_(magnitude_mask(weight, sparsity))
    return model.train()


def tutorial_plan(model: nn.Module, masks: bool = False) -> CompressionPlan:
    """What the tutorial's QuantizationModifier asks for; with masks on every prunable weight, by the owner "test"."""
    plan = CompressionPlan()
    QuantizationModifier(**TUTORIAL).plan(plan, model)
    for name in prunable_parameters(model) if masks else []:
        plan.add_mask(name.removesuffix(".weight"), "test")
    return plan


def batch(size: int = 4, length: int = 8, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Random features; `padding` tokens of each row but the first are no tokens."""
    generator = torch.Generator().manual_seed(seed)
    attention_mask = torch.ones(size, length, dtype=torch.long)
    if padding:
        attention_mask[1:, length - padding :] = 0
    return {
        "input_ids": torch.randint(1, 50, (size, length), generator=generator),
        "attention_mask": attention_mask,
        "start_positions": torch.randint(0, length - padding, (size,), generator=generator),
        "end_positions": torch.randint(0, length - padding, (size,), generator=generator),
    }


def alone(vector: Tensor) -> Tensor:
    """reduce_max of a run with one rank."""
    return vector
