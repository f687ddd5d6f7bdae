"""Which masked weights become compact: where it pays, where it is wanted, and never where a mask may change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_accel.compress.masks import magnitude_mask
from sparse_accel.compress.plan import CompressionPlan, install
from sparse_accel.compress.positions import pack_positions
from sparse_accel.compress.weight_storage import WeightZeros, compact_where_it_pays, model_zeros
from sparse_accel.errors import ModelError, OptionError, RecipeError
from sparse_accel.modifiers.constant_pruning import ConstantPruningModifier
from tests.unit.qat_bert import bert

ENCODER = "bert.encoder.layer.0"
HELD = "__ALL_PRUNABLE__"


def pruned_bert() -> nn.Module:
    """Nine in ten weights of the encoder are zero, four in ten of one layer, none of the head."""
    model = bert(sparsity=0.9)
    with torch.no_grad():
        model.qa_outputs.weight.fill_(1.0)
        output = model.get_submodule(f"{ENCODER}.output.dense").weight
        output.fill_(1.0).mul_(magnitude_mask(torch.rand(output.shape), 0.4))
    return model


def planned(model: nn.Module, *modifiers: ConstantPruningModifier) -> CompressionPlan:
    plan = CompressionPlan()
    for modifier in modifiers or (ConstantPruningModifier(start_epoch=0.0, params=HELD),):
        modifier.plan(plan, model)
    return plan


def compact(plan: CompressionPlan) -> set[str]:
    return {name.removeprefix(f"{ENCODER}.") for name, c in plan.modules.items() if c.compact}


SPARSE = {
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
}


def test_auto_takes_the_layers_of_which_half_is_zero() -> None:
    model = pruned_bert()
    plan = planned(model)
    notes = compact_where_it_pays(plan, model_zeros(model), "auto")
    assert compact(plan) == SPARSE
    kept = 4 * 26 + 38
    assert notes == [f"of {4 * 256 + 384:,} masked weights in 5 layers, the {kept} that are kept are stored"]
    assert plan.masked_by(ConstantPruningModifier(start_epoch=0.0, params=HELD))  # owners are still known
    install(model, plan)


@pytest.mark.parametrize(
    ("zeros", "pays"), [(0, False), (4, False), (5, True), (9, True), (10, False)], ids=lambda value: str(value)
)
def test_compact_pays_from_half_zeros_to_one_kept_weight(zeros: int, pays: bool) -> None:
    assert WeightZeros(10, zeros).pays is pays


@pytest.mark.parametrize(
    "changing",
    [
        ConstantPruningModifier(start_epoch=1.0, params=["qa_outputs.weight"]),
        ConstantPruningModifier(start_epoch=0.0, end_epoch=2.0, params=["qa_outputs.weight"]),
    ],
    ids=["starts late", "ends early"],
)
def test_a_mask_that_changes_keeps_auto_away_and_is_refused_where_compact_is_wanted(
    changing: ConstantPruningModifier,
) -> None:
    model = pruned_bert()
    lasting = ConstantPruningModifier(start_epoch=0.0, params=["re:.*query.weight", "re:.*key.weight"])
    plan = planned(model, lasting, changing)
    assert compact_where_it_pays(plan, model_zeros(model), "auto") == []
    assert compact(plan) == set()
    with pytest.raises(RecipeError, match="qa_outputs cannot be stored compact: its mask does not hold from the first"):
        compact_where_it_pays(plan, model_zeros(model), "compact")


def test_a_mask_is_lasting_only_if_all_who_ask_for_it_hold_it() -> None:
    plan = CompressionPlan()
    plan.add_mask("a", "first", lasting=True)
    assert plan.mask_is_lasting("a")
    plan.add_mask("a", "second")
    assert not plan.mask_is_lasting("a")
    assert not plan.mask_is_lasting("b")
    assert not CompressionPlan.from_json(plan.to_json()).mask_is_lasting("a")


def test_masked_takes_none() -> None:
    model = pruned_bert()
    plan = planned(model)
    assert compact_where_it_pays(plan, model_zeros(model), "masked") == []
    assert compact(plan) == set()


def test_compact_takes_every_linear_layer_and_tells_of_the_others() -> None:
    model = pruned_bert()
    params = [HELD, "bert.embeddings.word_embeddings.weight"]
    plan = planned(model, ConstantPruningModifier(start_epoch=-1, params=params))
    first, *others = compact_where_it_pays(plan, model_zeros(model), "compact")
    assert compact(plan) == SPARSE | {"output.dense", "qa_outputs"}
    assert "in 7 layers" in first
    assert others == ["bert.embeddings.word_embeddings stays masked: it is no nn.Linear but Embedding"]
    install(model, plan)


def test_shared_weights_stay_masked() -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    model["other"].weight = model["one"].weight
    with torch.no_grad():
        model["one"].weight[:3] = 0.0
    modifier = ConstantPruningModifier(start_epoch=0.0, params=["one.weight"])
    plan = planned(model, modifier)
    plan.add_mask("other", modifier, lasting=True)
    assert model_zeros(model)["one"] == WeightZeros(16, 12, "it shares its weight with other")
    assert compact_where_it_pays(plan, model_zeros(model), "auto") == []
    assert compact_where_it_pays(plan, model_zeros(model), "compact") == [
        "one stays masked: it shares its weight with other",
        "other stays masked: it shares its weight with one",
    ]
    plan.make_compact("one")
    plan.make_compact("other")
    with pytest.raises(ModelError, match="one and other share one weight, which therefore cannot be compact"):
        install(model, plan)


def test_a_recipe_without_masks_has_nothing_to_store_compact() -> None:
    model = pruned_bert()
    assert compact_where_it_pays(CompressionPlan(), model_zeros(model), "auto") == []
    (note,) = compact_where_it_pays(CompressionPlan(), model_zeros(model), "compact")
    assert "masks none" in note


def test_an_unknown_storage_names_the_known_ones() -> None:
    with pytest.raises(OptionError, match="not stored 'compct'; did you mean 'compact'"):
        compact_where_it_pays(CompressionPlan(), {}, "compct")


def test_zeros_are_those_of_given_positions_where_weights_are_not_here() -> None:
    model = pruned_bert()
    expected = model_zeros(model)
    masks = {name: model.get_submodule(name).weight != 0 for name in expected}
    absent = pruned_bert().to("meta")
    assert model_zeros(absent, masks) == expected
    assert model_zeros(absent, {name: pack_positions(mask) for name, mask in masks.items()}) == expected
    assert model_zeros(absent)["qa_outputs"].zeros == 0
