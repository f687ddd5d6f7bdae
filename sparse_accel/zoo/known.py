"""What is known without a catalogue: models on the Hugging Face hub, and which shipped recipe a stub means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from sparse_accel.zoo.stubs import TASK_OF_SUB_DOMAIN, Stub

_BERT: Final = "obert-base/pytorch/huggingface"
_UPSTREAM: Final = f"nlp/masked_language_modeling/{_BERT}/wikipedia_bookcorpus"
_SUB_DOMAINS: Final = {
    "squad": "question_answering",
    "mnli": "text_classification",
    "qqp": "text_classification",
    "sst2": "sentiment_analysis",
    "conll2003": "token_classification",
}
_BLOCK_PRUNED: Final = (
    "nlp/masked_language_modeling/bert-base/pytorch/huggingface/wikipedia_bookcorpus/12layer_pruned80_quant-none-vnni"
)


@dataclass(frozen=True)
class HubModel:
    """A model on the hub that takes a stub's place; `difference` says in what it is not the stub's own."""

    name: str
    difference: str | None = None


def _hub_models() -> dict[str, HubModel]:
    """By stub. Source: the tables in research/optimal_BERT_surgeon_oBERT/README.md of neuralmagic/sparseml."""
    models = {
        f"{_UPSTREAM}/base-none": HubModel("neuralmagic/oBERT-12-upstream-pretrained-dense"),
        f"{_UPSTREAM}/pruned90-none": HubModel("neuralmagic/oBERT-12-upstream-pruned-unstructured-90-v2"),
        f"{_UPSTREAM}/pruned97-none": HubModel("neuralmagic/oBERT-12-upstream-pruned-unstructured-97-v2"),
    }
    for dataset, published in (("squad", "squadv1"), ("mnli", "mnli"), ("qqp", "qqp")):
        stem = f"nlp/{_SUB_DOMAINS[dataset]}/{_BERT}/{dataset}"
        models[f"{stem}/base-none"] = HubModel(f"neuralmagic/oBERT-teacher-{published}")
        transferred = f"neuralmagic/oBERT-12-upstream-pruned-unstructured-90-finetuned-{published}-v2"
        models[f"{stem}/pruned90_quant-none"] = HubModel(
            transferred,
            "pruned to the same sparsity for the same data, but not quantized",
        )
    return models


HUB_MODELS: Final = _hub_models()

# Stubs that SparseML's documentation uses most, whether or not their weights can still be had.
KNOWN_STUBS: Final = tuple(
    dict.fromkeys(
        [
            *HUB_MODELS,
            *(
                f"nlp/{sub_domain}/{_BERT}/{dataset}/{tag}"
                for dataset, sub_domain in _SUB_DOMAINS.items()
                for tag in ("base-none", "pruned90_quant-none")
            ),
            _BLOCK_PRUNED,
        ]
    )
)

# Types of a recipe that say no more than the stub of a task does.
_PLAIN_TYPES: Final = (None, "original", "transfer", "transfer_learn", "transfer_learning")
_UPSTREAM_TASK: Final = "masked_language_modeling"


def recipe_types(stub: Stub) -> tuple[str, ...]:
    """The types of a shipped recipe that one may ask a stub for."""
    transfers = tuple(
        f"transfer-{task}" for task in dict.fromkeys(TASK_OF_SUB_DOMAIN.values()) if task != _UPSTREAM_TASK
    )
    if stub.task == _UPSTREAM_TASK:
        return ("original", *transfers)
    return () if stub.task is None else ("original", "transfer", f"transfer-{stub.task}")


def recipe_name(stub: Stub) -> str | None:
    """The name of the recipe of ours that does what a stub's recipe did, whether or not it ships; None where the stub or
    its type of recipe names nothing of the kind."""
    kind = _kind_of(stub.tag)
    if kind is None or stub.task is None:
        return None
    asked = stub.recipe_type
    transfer_to = None if asked is None or "-" not in asked else TASK_OF_SUB_DOMAIN.get(asked.partition("-")[2])
    if asked is not None and asked.startswith("transfer-"):
        fits = transfer_to is not None and transfer_to != _UPSTREAM_TASK and stub.task in (transfer_to, _UPSTREAM_TASK)
        return f"{transfer_to}/{kind}" if fits else None
    if asked not in _PLAIN_TYPES or (stub.task == _UPSTREAM_TASK and asked not in (None, "original")):
        return None
    if stub.task == _UPSTREAM_TASK and kind.startswith("pruned"):
        return f"{_UPSTREAM_TASK}/pruned{sparsity_percent(stub.tag) or ''}"
    return f"{stub.task}/{kind}"


def _kind_of(tag: str) -> str | None:
    """What a tag such as `pruned90_quant-none` says was done to the model, as our recipes are named."""
    if re.match(r"(?:\d+layer_)?pruned", tag):
        return "pruned_quant" if "quant" in tag else "pruned"
    if tag.startswith("base"):
        return "quant" if "quant" in tag else "dense"
    return None


def sparsity_percent(tag: str) -> int | None:
    """The percentage of zeros that a tag names."""
    found = re.search(r"pruned(\d+)", tag)
    return int(found[1]) if found else None
