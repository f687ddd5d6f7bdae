"""Random BERT models of exact shapes, and how many floating-point operations they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from sparse_accel.benchmarking.heads import HEADS, QUESTION_ANSWERING
from sparse_accel.compress.masks import magnitude_mask

# Named shapes; what is left out is as in BERT-base.
SHAPES: Final[Mapping[str, Mapping[str, int]]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 1000,
    },
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
    "bert_base": {},
    "bert_large": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}


@dataclass(frozen=True)
class Size:
    """What the cost of a forward depends on: the weights of the encoder's linear layers, its layers and its width."""

    encoder_weights: int
    layers: int
    width: int

    def forward_flops(self, tokens: float, squares: float) -> float:
        """Operations of one forward of the encoder: 2 n W + 4 L h S for n tokens and the sum S of the squared lengths of their
        sequences. Embeddings, norms and the head are not counted."""
        return 2.0 * tokens * self.encoder_weights + 4.0 * self.layers * self.width * squares


@dataclass(frozen=True)
class Load:
    """Tokens, and the sum of the squared lengths of the sequences that they form."""

    tokens: int
    squares: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> Load:
        """That of sequences of these lengths."""
        return cls(int(lengths.sum()), int((lengths.astype(np.int64) ** 2).sum()))

    def __add__(self, other: Load) -> Load:
        return Load(self.tokens + other.tokens, self.squares + other.squares)


# By how much a teacher's logits are larger than those of a new head.
_CERTAINTY: Final = 25.0

NO_LOAD: Final = Load(0, 0)


def training_flops(size: Size, load: Load) -> float:
    """Operations of forward and backward: three forwards' worth, 3 (2 n W + 4 L h S)."""
    return 3.0 * size.forward_flops(load.tokens, load.squares)


def vocabulary_of(shape: str) -> int:
    """How many token ids a shape's embedding has."""
    return SHAPES[shape].get("vocab_size", 30522)


def shape_size(shape: str) -> Size:
    """The size of a named shape, without making a model."""
    from transformers import BertConfig

    config = BertConfig(**dict[str, Any](SHAPES[shape]))
    width, inner = config.hidden_size, config.intermediate_size
    per_layer = 4 * width * width + 2 * width * inner
    return Size(config.num_hidden_layers * per_layer, config.num_hidden_layers, width)


@torch.no_grad()
def random_model(
    shape: str,
    seed: int,
    task: str = QUESTION_ANSWERING,
    *,
    sparsity: float = 0.0,
    dropout: float | None = None,
) -> Any:
    """A BERT model of a named shape with the head of a task and random weights, on the CPU, in training mode.

    The share `sparsity` of each matrix of the encoder is zero, those of smallest magnitude. `dropout` takes the place of
    BERT's 0.1. The same arguments give the same weights.
    """
    import transformers

    head = HEADS[task]
    settings: dict[str, Any] = {**SHAPES[shape], **head.config}
    if dropout is not None:
        settings |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = getattr(transformers, head.model_class)(transformers.BertConfig(**settings))
    if sparsity:
        for weight in encoder_matrices(model).values():
            weight[~magnitude_mask(weight, sparsity)] = 0.0
    return model.train()


def random_teacher(shape: str, seed: int, task: str = QUESTION_ANSWERING) -> Any:
    """A model like `random_model`'s in evaluation mode, sure of its answers: of one that is not, and a student that is not
    either, the divergence would be little more than rounding."""
    model = random_model(shape, seed, task)
    with torch.no_grad():
        model.get_parameter(HEADS[task].scale).mul_(_CERTAINTY)
    return model.eval()


def encoder_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is pruned: the weights of the encoder's linear layers, by name."""
    return {name: weight for name, weight in model.named_parameters() if ".layer." in name and weight.dim() == 2}
