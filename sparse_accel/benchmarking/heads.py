"""What of a benchmark is a task's own: the head of its model, and its parts of the arms' recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

QUESTION_ANSWERING: Final = "question_answering"
TEXT_CLASSIFICATION: Final = "text_classification"
MASKED_LANGUAGE_MODELING: Final = "masked_language_modeling"

# Classes of a text: entailment, neutral, contradiction.
NUM_LABELS: Final = 3


@dataclass(frozen=True)
class Head:
    """A BERT model by the name of its class in transformers, and what a recipe says of it.

    `scale` is a parameter that the logits are proportional to, biases aside. `quantized` are the lines of a
    QuantizationModifier that say which parts of the model are quantized, `temperature` and `distill_top_k` (0: all logits) how
    it is distilled: all three as the shipped recipes of the task and their comments have them.
    """

    model_class: str
    scale: str
    quantized: str
    config: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 5.0
    distill_top_k: int = 0


HEADS: Final[Mapping[str, Head]] = {
    QUESTION_ANSWERING: Head(
        "BertForQuestionAnswering",
        "qa_outputs.weight",
        """\
    quantize_embeddings: 1
    exclude_module_types: ['LayerNorm']
    submodules: [bert.embeddings, bert.encoder, qa_outputs]
""",
    ),
    TEXT_CLASSIFICATION: Head(
        "BertForSequenceClassification",
        "classifier.weight",
        """\
    quantize_embeddings: 1
    exclude_module_types: ['LayerNorm', 'Tanh']
    submodules: [bert.embeddings, bert.encoder, bert.pooler, classifier]
""",
        config={"num_labels": NUM_LABELS},
    ),
    MASKED_LANGUAGE_MODELING: Head(
        "BertForMaskedLM",
        # Not the matrix of the vocabulary: that is the embeddings too.
        "cls.predictions.transform.LayerNorm.weight",
        """\
    quantize_embeddings: 0
    exclude_module_types: ['LayerNorm']
    submodules: [bert.encoder]
""",
        temperature=5.5,
        distill_top_k=32,
    ),
}
