"""The census: every parameter counted once, zeros and kinds as a person would count them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from sparse_accel.compress.census import Census
from tests.unit.qat_bert import bert, tutorial_plan


def test_counts_of_a_pruned_quantized_bert() -> None:
    model = bert(layers=2, sparsity=0.75)
    census = Census.of(model, tutorial_plan(model))
    assert census.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    prunable = 2 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 16
    assert (census.prunable.numel, census.prunable.zeros) == (prunable, int(0.75 * prunable))
    assert census.sparsity == 0.75
    assert census.num_quantizers == 44
    kinds = {row.kind: row for row in census.kinds()}
    assert list(kinds) == ["embeddings", "attention", "feed-forward", "head", "other"]
    assert (kinds["attention"].numel, kinds["attention"].sparsity, kinds["attention"].quantized) == (
        2 * 4 * 256,
        0.75,
        12,
    )
    assert (kinds["feed-forward"].numel, kinds["feed-forward"].quantized) == (2 * 2 * 16 * 24, 4)
    assert (kinds["head"].numel, kinds["head"].quantized) == (32, 1)
    # The padding row of the word table is the only other zero among the matrices.
    assert (kinds["embeddings"].numel, kinds["embeddings"].zeros) == ((50 + 20 + 2) * 16, 16)
    assert sum(row.numel for row in kinds.values()) == census.num_parameters


def test_a_state_dict_counts_as_its_model() -> None:
    model = bert(sparsity=0.5)
    expected, found = Census.of(model), Census.of(model.state_dict())
    assert (found.sparsity, found.kinds()) == (expected.sparsity, expected.kinds())


def test_a_shared_weight_is_counted_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 2), "decoder": nn.Linear(2, 5, bias=False)})
    model["decoder"].weight = model["embed"].weight
    assert Census.of(model).num_parameters == 10
    assert Census.of(model).prunable.numel == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("distilbert.transformer.layer.0.attention.q_lin.weight", "attention"),
        ("distilbert.transformer.layer.0.ffn.lin1.weight", "feed-forward"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attention"),
        ("bert.encoder.layer.0.output.dense.weight", "feed-forward"),
        ("model.layers.0.self_attn.k_proj.weight", "attention"),
        ("transformer.h.0.mlp.c_fc.weight", "feed-forward"),
        ("transformer.wte.weight", "embeddings"),
        ("electra.embeddings_project.weight", "embeddings"),
        ("classifier.out_proj.weight", "head"),
        ("bert.pooler.dense.weight", "head"),
        ("something.weight", "other"),
    ],
)
def test_kinds_follow_from_names(name: str, kind: str) -> None:
    assert Census.of({name: torch.ones(2, 2)}).parameters[0].kind == kind


def test_an_empty_model_has_no_sparsity() -> None:
    assert Census.of({}).sparsity == 0.0
    assert Census.of({}).kinds() == []


def test_the_json_says_what_the_table_says() -> None:
    model = bert(sparsity=0.5)
    data = json.loads(json.dumps(Census.of(model, tutorial_plan(model)).to_json()))
    assert data["sparsity"] == 0.5
    assert data["quantizers"] == 26
    assert data["kinds"]["head"] == {"parameters": 32, "zeros": 16, "sparsity": 0.5, "quantized_modules": 1}
    assert data["by_parameter"]["qa_outputs.weight"]["zeros"] == 16
