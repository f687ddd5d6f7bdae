"""EpochRange, SetWeightDecay, TrainableParams and ConstantPruning on a tiny BERT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering

from sparse_accel.compress.plan import CompressionPlan, install, prunable_parameters
from sparse_accel.errors import RecipeError
from sparse_accel.modifiers.constant_pruning import ConstantPruningModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.session import Session
from sparse_accel.timeline import Clock

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForQuestionAnswering(config)


def modifiers(*entries: str) -> Recipe:
    return Recipe.load("a_modifiers:\n" + "".join(f"  - !{entry}\n" for entry in entries))


def session_of(recipe: Recipe, model: nn.Module) -> Session:
    """A run of `recipe`: planned and installed, with an optimizer of two groups."""
    plan = CompressionPlan()
    recipe.plan(plan, model)
    install(model, plan)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": learning[:1]}, {"params": learning[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    return Session(
        accelerator=None,
        model=model,
        module=model,
        optimizer=optimizer,
        recipe=recipe,
        plan=plan,
        task=None,
        options=None,
        loader=None,
    )


def train(session: Session, steps: range, steps_per_epoch: int) -> None:
    """Optimizer steps on fixed data, moved by weight decay and momentum."""
    tokens = torch.arange(12).reshape(2, 6)
    for step in steps:
        session.recipe.on_step_start(session, Clock(step, steps_per_epoch))
        outputs = session.model(input_ids=tokens, start_positions=tokens[:, 1], end_positions=tokens[:, 2])
        outputs.loss.backward()
        session.optimizer.step()
        session.optimizer.zero_grad()


def zero_half(model: nn.Module) -> dict[str, torch.Tensor]:
    """Zeroes every other entry of the prunable weights and returns where the zeros are."""
    zeros = {}
    parameters = dict(model.named_parameters())
    for name in prunable_parameters(model):
        with torch.no_grad():
            parameters[name].view(-1)[::2] = 0.0
        zeros[name] = parameters[name] == 0.0
    return zeros


def test_the_length_of_a_run_is_the_last_epoch_that_a_modifier_names_rounded_up() -> None:
    assert modifiers("EpochRangeModifier {start_epoch: 0, end_epoch: 2.1}").num_epochs == 3.0
    assert modifiers("EpochRangeModifier {start_epoch: 0, end_epoch: -1}").num_epochs is None
    assert modifiers("SetWeightDecayModifier {weight_decay: 0}").num_epochs is None
    assert modifiers("SetWeightDecayModifier {weight_decay: 0, start_epoch: 4.5}").num_epochs == 5.0
    rounding = Recipe.load("n: 0.1\nm_modifiers:\n  - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(n * 3)}\n")
    assert modifiers("EpochRangeModifier {start_epoch: 0, end_epoch: 3.0000000000000004}").num_epochs == 3.0
    assert rounding.num_epochs == 1.0


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("EpochRangeModifier {start_epoch: 0}", "the field 'end_epoch' is missing"),
        ("EpochRangeModifier {start_epoch: 4, end_epoch: 3}", "end_epoch 3.0 lies before start_epoch 4.0"),
        ("EpochRangeModifier {start_epoch: 0, end_epoch: .inf}", "end_epoch must be an epoch from 0 on"),
        ("SetWeightDecayModifier {weight_decay: -1}", "weight_decay must be greater than or equal to 0"),
        ("SetWeightDecayModifier {weight_decay: 0, end_epoch: 3}", "end_epoch must be -1"),
        ("TrainableParamsModifier {params: [a], start_epoch: 1}", "for the whole run"),
        ("TrainableParamsModifier {params: [a], end_epoch: 1}", "for the whole run"),
        ("TrainableParamsModifier {params: [a], trainable: maybe}", "trainable must be a valid boolean"),
        ("ConstantPruningModifier {start_epoch: 0}", "the field 'params' is missing"),
        ("ConstantPruningModifier {params: __PRUNABLE__}", "params must be __ALL__, __ALL_PRUNABLE__ or a list"),
        ("ConstantPruningModifier {params: []}", "params must be __ALL__, __ALL_PRUNABLE__ or a list"),
        ("ConstantPruningModifier {params: [3]}", "params must be __ALL__, __ALL_PRUNABLE__ or a list"),
        ("ConstantPruningModifier {params: __ALL__, start_epoch: 3, end_epoch: 3}", "must lie after start_epoch"),
    ],
)
def test_fields_that_make_no_sense_are_errors_with_their_line(entry: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        modifiers(entry)
    assert str(caught.value).startswith("<recipe>:2: ")
    assert said in str(caught.value)


def test_weight_decay_is_set_in_every_group_from_its_start_on(model: nn.Module) -> None:
    recipe = modifiers("SetWeightDecayModifier {weight_decay: 1e-2, start_epoch: 1.0}")
    session = session_of(recipe, model)
    recipe.on_step_start(session, Clock(1, 2))
    assert [group["weight_decay"] for group in session.optimizer.param_groups] == [0.01, 0.0]
    session.optimizer.param_groups[0]["weight_decay"] = 0.3
    recipe.on_step_start(session, Clock(2, 2))
    assert [group["weight_decay"] for group in session.optimizer.param_groups] == [0.01, 0.01]


def test_of_two_weight_decays_the_later_start_wins(model: nn.Module) -> None:
    recipe = modifiers(
        "SetWeightDecayModifier {weight_decay: 0.2, start_epoch: 1}", "SetWeightDecayModifier {weight_decay: 0.1}"
    )
    session = session_of(recipe, model)
    seen = []
    for step in range(3):
        recipe.on_step_start(session, Clock(step, 1))
        seen.append(session.optimizer.param_groups[1]["weight_decay"])
    assert seen == [0.1, 0.2, 0.2]


def test_frozen_parameters_do_not_move_and_the_others_do(model: nn.Module) -> None:
    recipe = modifiers(
        "TrainableParamsModifier {params: __ALL__, trainable: False, params_strict: True}",
        "TrainableParamsModifier {params: ['re:qa_outputs'], trainable: True}",
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(session_of(recipe, model), range(3), 3)
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == ["qa_outputs.weight", "qa_outputs.bias"]
    (warning,) = recipe.warnings
    assert warning.startswith("<recipe>:2: TrainableParamsModifier: params_strict is ignored: ")


def test_freezing_everything_leaves_nothing_to_train(model: nn.Module) -> None:
    with pytest.raises(RecipeError, match="nothing is left to train"):
        session_of(modifiers("TrainableParamsModifier {params: __ALL__, trainable: False}"), model)


@pytest.mark.parametrize(
    ("params", "masked"),
    [
        ("__ALL_PRUNABLE__", None),
        (f"[{QUERY}.weight]", [QUERY]),
        (f"[{QUERY}.module.weight]", [QUERY]),
        (f"['re:{QUERY}']", [QUERY]),
        ("['re:.*word_embeddings', re:qa_outputs]", ["bert.embeddings.word_embeddings", "qa_outputs"]),
    ],
)
def test_constant_pruning_masks_the_weights_that_its_params_mean(
    model: nn.Module, params: str, masked: list[str] | None
) -> None:
    recipe = modifiers(f"ConstantPruningModifier {{params: {params}}}")
    plan = CompressionPlan()
    recipe.plan(plan, model)
    expected = masked or [name.removesuffix(".weight") for name in prunable_parameters(model)]
    assert list(plan.masked_by(recipe.modifiers[0])) == expected
    assert [name for name, compression in plan.modules.items() if compression.mask] == expected


def test_all_masks_every_weight_that_can_be_masked_and_leaves_biases_and_norms(model: nn.Module) -> None:
    recipe = modifiers("ConstantPruningModifier {params: __ALL__}")
    plan = CompressionPlan()
    recipe.plan(plan, model)
    kinds = {type(model.get_submodule(name)) for name in plan.modules}
    assert kinds == {nn.Linear, nn.Embedding}
    assert len(plan.modules) == sum(isinstance(module, nn.Linear | nn.Embedding) for module in model.modules())


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (f"[{QUERY}.bias]", "cannot be masked"),
        ("['re:.*LayerNorm']", "cannot be masked"),
        (f"[{QUERY}]", f"matched no parameter; did you mean 're:{QUERY}'"),
        ("['re:.*attn.*weight']", "matched no parameter"),
    ],
)
def test_params_that_cannot_be_masked_are_errors_with_their_place(model: nn.Module, params: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        modifiers(f"ConstantPruningModifier {{params: {params}}}").plan(CompressionPlan(), model)
    assert str(caught.value).startswith("<recipe>:2: params: ")
    assert said in str(caught.value)


def test_zeros_stay_zero_from_the_start_on_under_adamw_with_weight_decay(model: nn.Module) -> None:
    zeros = zero_half(model)
    recipe = modifiers(
        "ConstantPruningModifier {start_epoch: 0.0, params: __ALL_PRUNABLE__}",
        "SetWeightDecayModifier {weight_decay: 0.1}",
    )
    train(session_of(recipe, model), range(6), 3)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name] == 0.0, where) for name, where in zeros.items())


def test_the_mask_is_let_go_at_the_end(model: nn.Module) -> None:
    zeros = zero_half(model)
    recipe = modifiers("ConstantPruningModifier {start_epoch: 0.0, end_epoch: 1.0, params: __ALL_PRUNABLE__}")
    session = session_of(recipe, model)
    train(session, range(3), 3)
    parameters = dict(model.named_parameters())
    assert all((parameters[name][where] == 0.0).all() for name, where in zeros.items())
    train(session, range(3, 5), 3)
    assert not any((parameters[name][where] == 0.0).all() for name, where in zeros.items())


def test_two_masks_in_turn_hold_the_same_weights(model: nn.Module) -> None:
    zeros = zero_half(model)
    recipe = modifiers(
        "ConstantPruningModifier {start_epoch: 1.0, params: ['re:bert', 're:qa_outputs']}",
        "ConstantPruningModifier {start_epoch: 0.0, end_epoch: 1.0, params: __ALL_PRUNABLE__}",
    )
    train(session_of(recipe, model), range(6), 3)
    parameters = dict(model.named_parameters())
    assert all((parameters[name][where] == 0.0).all() for name, where in zeros.items())


def test_two_masks_on_one_weight_at_one_time_are_an_error_that_names_both(model: nn.Module) -> None:
    recipe = modifiers(
        "ConstantPruningModifier {params: __ALL_PRUNABLE__}", "ConstantPruningModifier {params: ['re:qa_outputs']}"
    )
    with pytest.raises(RecipeError, match=r"<recipe>:3: .*<recipe>:2 both mask qa_outputs at the same time"):
        recipe.plan(CompressionPlan(), model)
    with pytest.raises(RecipeError, match="both set mask:__ALL_PRUNABLE__"):
        modifiers(*["ConstantPruningModifier {params: __ALL_PRUNABLE__}"] * 2)


def test_a_mask_that_starts_after_the_last_epoch_is_a_problem_of_the_run() -> None:
    recipe = modifiers("ConstantPruningModifier {params: __ALL__, start_epoch: 3}")
    with pytest.raises(RecipeError, match=r"^<recipe>:2: ConstantPruningModifier: starts at epoch 3.0"):
        recipe.check(3)
    assert recipe.of(ConstantPruningModifier) == recipe.modifiers
