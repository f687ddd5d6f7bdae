"""GMPruningModifier, MagnitudePruningModifier and GlobalMagnitudePruningModifier on a tiny BERT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from sparse_accel.compress.layers import CompressedLinear, Pruned, effective_weight
from sparse_accel.compress.masks import UNSTRUCTURED, global_magnitude_masks, magnitude_mask
from sparse_accel.compress.plan import CompressionPlan, check_masks, fold, install, prunable_parameters, request_masks
from sparse_accel.compress.weight_storage import compact_where_it_pays, model_zeros
from sparse_accel.errors import RecipeError
from sparse_accel.modifiers.gradual_pruning import GMPruningModifier, MagnitudePruningModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime.backends import PlainBackend
from sparse_accel.session import Session
from sparse_accel.timeline import Clock
from tests.unit.qat_bert import batch, bert

STEPS_PER_EPOCH = 4


@pytest.fixture(scope="module", autouse=True)
def _accelerator_of_this_module() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


def recipe(tag: str, **fields: Any) -> Recipe:
    """A recipe with one such modifier, from 20% to 70% in epochs 1 to 3 unless told otherwise."""
    given = {
        "start_epoch": 1.0,
        "end_epoch": 3.0,
        "init_sparsity": 0.2,
        "final_sparsity": 0.7,
        "update_frequency": 0.5,
        "params": "__ALL_PRUNABLE__",
        **fields,
    }
    lines = "".join(f"    {name}: {value}\n" for name, value in given.items() if value is not None)
    return Recipe.load(f"m_modifiers:\n  - !{tag}\n{lines}  - !EpochRangeModifier {{start_epoch: 0, end_epoch: 4}}\n")


def session_of(recipe: Recipe, model: nn.Module) -> Session:
    plan = CompressionPlan()
    recipe.plan(plan, model)
    install(model, plan)
    accelerator = Accelerator(cpu=True)
    return Session(
        accelerator=accelerator,
        model=model,
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
        recipe=recipe,
        plan=plan,
        task=None,
        options=None,
        loader=None,
        backend=PlainBackend(accelerator, "no"),
    )


def take_steps(session: Session, first: int, end: int) -> None:
    for step in range(first, end):
        session.recipe.on_step_start(session, Clock(step, STEPS_PER_EPOCH))
        session.model(**batch(seed=step)).loss.backward()
        session.optimizer.step()
        session.optimizer.zero_grad()


def zeros(session: Session) -> dict[str, int]:
    """How many entries of each effective weight are zero, under the masks that hold."""
    names = [name for m in session.recipe.modifiers for name in session.plan.masked_by(m)]
    return {name: int((effective_weight(session.module.get_submodule(name)) == 0).sum()) for name in names}


def numels(session: Session) -> dict[str, int]:
    return {name: session.module.get_parameter(f"{name}.weight").numel() for name in zeros(session)}


# --- when and how much ------------------------------------------------------------------------------------------------


def courses(text: Recipe, num_epochs: float, steps_per_epoch: int, final: float = 0.7) -> list[float | None]:
    (modifier,) = (m for m in text.modifiers if isinstance(m, MagnitudePruningModifier))
    steps = range(round(num_epochs * steps_per_epoch))
    return [modifier.course(Clock(step, steps_per_epoch), num_epochs, final) for step in steps]


def test_a_schedule_stands_between_updates_and_arrives_at_its_end() -> None:
    found = courses(recipe("MagnitudePruningModifier", inter_func="linear"), 4.0, 4)
    expected = [None] * 4 + [0.2] * 2 + [0.325] * 2 + [0.45] * 2 + [0.575] * 2 + [0.7] * 4
    assert found == [share if share is None else pytest.approx(share, abs=1e-12) for share in expected]
    assert found[-1] == 0.7, "exactly"


@pytest.mark.parametrize("end", [4.0, 3.9])
def test_the_last_step_arrives_where_no_step_stands_at_the_end(end: float) -> None:
    found = courses(recipe("MagnitudePruningModifier", end_epoch=end), 4.0, 4)
    assert found[-1] == 0.7 and found[-2] is not None and found[-2] < 0.7


def test_a_frequency_that_is_no_whole_number_of_steps_waits_for_the_next() -> None:
    """0.4 epochs of 4 steps: SparseML updates at 1.0, 1.5, 2.0 ..., since each wait begins at the update before."""
    found = courses(recipe("MagnitudePruningModifier", update_frequency=0.4, inter_func="linear"), 4.0, 4)
    assert found[4:12] == [pytest.approx(x) for x in (0.2, 0.2, 0.325, 0.325, 0.45, 0.45, 0.575, 0.575)]


def test_frequencies_computed_from_decimals_do_not_slip_by_a_step() -> None:
    """0.1 + 0.2 is more than 0.3 in floating point."""
    found = courses(recipe("MagnitudePruningModifier", update_frequency=0.1, inter_func="linear"), 4.0, 10)
    assert len(set(found[10:31])) == 21


# --- on a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["GMPruningModifier", "GlobalMagnitudePruningModifier"])
@pytest.mark.parametrize("mask_type", ["unstructured", "block4"])
def test_zeros_only_grow_and_arrive_exactly(tag: str, mask_type: str) -> None:
    """Momentum and decay move what is stored under the masks, and nothing of it comes back."""
    session = session_of(recipe(tag, mask_type=mask_type, update_frequency=-1), bert(dropout=0.1))
    seen: dict[str, torch.Tensor] = {}
    for step in range(4 * STEPS_PER_EPOCH):
        take_steps(session, step, step + 1)
        for name in zeros(session):
            pattern = effective_weight(session.module.get_submodule(name)) == 0
            assert not (seen.get(name, pattern) & ~pattern).any(), f"{name} at step {step}"
            seen[name] = pattern
    dropped, sizes = zeros(session), numels(session)
    unit = 4 if mask_type == "block4" else 1
    # The head's 16 inputs and all others are multiples of 4.
    if tag == "GMPruningModifier":
        assert dropped == {name: unit * round(0.7 * sizes[name] / unit) for name in sizes}
    else:
        assert sum(dropped.values()) == unit * round(0.7 * sum(sizes.values()) / unit)
        assert len({round(dropped[name] / sizes[name], 2) for name in sizes}) > 1, "some are sparser than others"
    assert set(check_masks(session.module).values()) <= {0}
    fold(session.module)
    assert {name: int((session.module.get_parameter(f"{name}.weight") == 0).sum()) for name in sizes} == dropped


def test_the_first_masks_are_those_of_the_weights_as_they_are() -> None:
    model = bert()
    weights = {name: model.get_parameter(name).detach().clone() for name in prunable_parameters(model)}
    local = session_of(recipe("MagnitudePruningModifier", start_epoch=0.0, init_sparsity=0.5), model)
    take_steps(local, 0, 1)
    for name, weight in weights.items():
        assert torch.equal(model.get_buffer(name.removesuffix("weight") + "mask"), magnitude_mask(weight, 0.5))
    other = bert()
    whole = session_of(recipe("GlobalMagnitudePruningModifier", start_epoch=0.0, init_sparsity=0.5), other)
    take_steps(whole, 0, 1)
    for name, mask in global_magnitude_masks(weights, 0.5).items():
        assert torch.equal(other.get_buffer(name.removesuffix("weight") + "mask"), mask)


def test_nm_holds_its_pattern_from_the_start() -> None:
    session = session_of(recipe("GMPruningModifier", mask_type="'2:4'", init_sparsity=0.5, final_sparsity=0.5), bert())
    take_steps(session, 0, 5)
    for name, size in numels(session).items():
        kept = effective_weight(session.module.get_submodule(name)).view(-1, 4).ne(0).sum(1)
        assert kept.eq(2).all() and size % 4 == 0


def test_released_weights_grow_from_zero_and_not_from_what_was_stored_under_the_mask() -> None:
    session = session_of(recipe("GMPruningModifier", leave_enabled=False), bert())
    end = 3 * STEPS_PER_EPOCH
    take_steps(session, 0, end)
    layer = session.module.get_submodule("bert.encoder.layer.0.output.dense")
    assert isinstance(layer, CompressedLinear)
    pruned = ~layer.mask
    assert layer.weight[pruned].abs().max() > 1e-2, "what was pruned is still stored"
    session.recipe.on_step_start(session, Clock(end, STEPS_PER_EPOCH))
    assert int((layer.weight == 0).sum()) == round(0.7 * layer.weight.numel()), "the last update comes first"
    assert (layer.weight[pruned] == 0).all() and layer.mask.all() and not layer.captured
    take_steps(session, end, end + 1)
    assert (layer.weight[pruned] != 0).any()


def test_a_weight_may_begin_at_its_own_sparsity_and_arrive_at_one_of_its_own() -> None:
    mapping = "{0.9: ['re:.*query'], 0.8: ['re:.*attention.*weight']}"
    text = recipe("MagnitudePruningModifier", params="[]", final_sparsity=mapping, init_sparsity="__FROM_PARAM__")
    session = session_of(text, bert(sparsity=0.6))
    own = round(0.6 * 256) / 256
    ranges = session.plan.pruned_from_to
    assert {name.rpartition(".")[2]: found for name, found in ranges.items()} == {
        "query": (own, 0.9),
        "key": (own, 0.8),
        "value": (own, 0.8),
        "dense": (own, 0.8),
    }
    take_steps(session, 4, 5)
    assert set(zeros(session).values()) == {round(0.6 * 256)}
    take_steps(session, 5, 13)
    assert sorted(zeros(session).values()) == [205, 205, 205, 230]


def test_the_logged_sparsity_is_that_of_the_masks() -> None:
    session = session_of(recipe("GlobalMagnitudePruningModifier"), bert())
    for step in range(16):
        take_steps(session, step, step + 1)
        clock = Clock(step, STEPS_PER_EPOCH)
        share = sum(zeros(session).values()) / sum(numels(session).values())
        assert session.recipe.metrics(session, clock) == {"sparsity": pytest.approx(share, abs=1e-12)}


def test_a_tied_decoder_is_left_out_with_its_embeddings() -> None:
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForMaskedLM(config)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    session = session_of(recipe("GMPruningModifier", start_epoch=0.0, params=None), model)
    masked = session.plan.masked_by(session.recipe.of(GMPruningModifier)[0])
    assert "cls.predictions.transform.dense" in masked and "bert.encoder.layer.0.output.dense" in masked
    assert not [name for name in masked if "decoder" in name or "embeddings" in name]
    session.recipe.on_step_start(session, Clock(0, STEPS_PER_EPOCH))
    ids = torch.arange(12).view(2, 6)
    session.model(input_ids=ids, labels=ids).loss.backward()
    session.optimizer.step()
    fold(model)
    table = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is table and int((table[1:] == 0).sum()) == 0


def test_weights_whose_masks_grow_are_never_stored_compact() -> None:
    model, plan = bert(sparsity=0.8), CompressionPlan()
    recipe("MagnitudePruningModifier", init_sparsity=0.8, final_sparsity=0.9).plan(plan, model)
    zeros_before = model_zeros(model)
    assert compact_where_it_pays(plan, zeros_before, "auto") == []
    with pytest.raises(
        RecipeError, match="cannot be stored compact: its mask does not hold from the first step to the last as it is"
    ):
        compact_where_it_pays(plan, zeros_before, "compact")


def test_a_request_is_served_once_and_remembered_by_the_state() -> None:
    model, plan = nn.Sequential(nn.Linear(6, 5)), CompressionPlan()
    plan.add_mask("0", "test")
    install(model, plan)
    request_masks(model, ["0"], Pruned(0.5, UNSTRUCTURED))
    model(torch.randn(2, 6))
    mask, version = model[0].mask.clone(), model[0].mask._version
    with torch.no_grad():
        model[0].weight.mul_(torch.randn(5, 6))
    model(torch.randn(2, 6))
    request_masks(model, ["0"], Pruned(0.3, UNSTRUCTURED))  # what is pruned stays pruned
    model(torch.randn(2, 6))
    assert (model[0].mask._version, int((~mask).sum())) == (version, 15)
    resumed = nn.Sequential(nn.Linear(6, 5))
    install(resumed, plan)
    resumed(torch.randn(2, 6))
    resumed.load_state_dict(model.state_dict())
    request_masks(resumed, ["0"], Pruned(0.5, UNSTRUCTURED))
    resumed(torch.randn(2, 6))
    assert torch.equal(resumed[0].mask, mask)


def test_a_mask_that_lost_zeros_is_a_broken_promise() -> None:
    model, plan = nn.Sequential(nn.Linear(6, 5)), CompressionPlan()
    plan.add_mask("0", "test")
    install(model, plan)
    request_masks(model, ["0"], Pruned(0.5, UNSTRUCTURED))
    model(torch.randn(2, 6))
    assert check_masks(model) == {"0": 0}
    model[0].mask[0] = True
    assert check_masks(model)["0"] > 0


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"end_epoch": -1}, "end_epoch must be an epoch"),
        ({"end_epoch": 1.0}, "end_epoch must lie after start_epoch (1.0); got 1.0"),
        (
            {"init_sparsity": 80},
            "init_sparsity must be a sparsity from 0 on and less than 1, or __FROM_PARAM__; 80 percent is 0.8",
        ),
        ({"init_sparsity": "__FROM__"}, "or __FROM_PARAM__; got '__FROM__'"),
        ({"final_sparsity": 1.0}, "final_sparsity must be a sparsity greater than 0 and less than 1; got 1.0"),
        ({"final_sparsity": "{0.8: query}"}, "must give each sparsity a list"),
        ({"final_sparsity": "{0.8: ['re:.*query']}"}, "params must be [] where final_sparsity names the parameters"),
        (
            {"params": "['re:.*layer(']"},
            "params has a bad pattern: 're:.*layer(' is not a regular expression: missing )",
        ),
        ({"final_sparsity": "{0.8: ['re:(']}", "params": "[]"}, "final_sparsity has a bad pattern: 're:(' is not"),
        ({"final_sparsity": 0.1}, "init_sparsity (0.2) must not be above final_sparsity (0.1)"),
        ({"update_frequency": -2}, "update_frequency must be a number of epochs, or -1 for every step"),
        ({"update_frequency": None}, "the field 'update_frequency' is missing"),
        ({"inter_func": "cosine"}, "inter_func must be 'linear', 'cubic' or 'inverse_cubic'"),
        ({"mask_type": "filter"}, "mask_type must be unstructured, block4, N:M"),
        ({"mask_type": "2:4"}, "mask_type must be in quotes: '2:4'"),
        ({"mask_type": "'4:2'"}, "N:M with N less than M"),
        ({"mask_type": "[4]"}, "must be the rows and columns of a block"),
        ({"mask_type": "'2:4'", "init_sparsity": 0.5}, "final_sparsity must be 0.5 for mask_type 2:4; got 0.7"),
        ({"mask_type": "tensorrt", "final_sparsity": 0.5}, "init_sparsity must be 0.5 for mask_type tensorrt"),
        ({"score_type": "movement"}, "score_type must be magnitude"),
        ({"phased": True}, "phased must be false"),
        ({"global_sparsity": True, "init_sparsity": "__FROM_PARAM__"}, "one sparsity for all parameters together"),
        ({"final_sparsities": 0.5}, "there is no field 'final_sparsities'; did you mean 'final_sparsity'"),
    ],
)
def test_fields_that_make_no_sense_are_errors(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe("GMPruningModifier", **fields)
    assert str(caught.value).startswith("<recipe>:") and said in str(caught.value), str(caught.value)


def test_fields_of_sparsemls_own_recipes_are_read() -> None:
    text = recipe("GMPruningModifier", params="[]", init_sparsity=0, phased=False, score_type="magnitude")
    assert text.warnings == [] and text.of(GMPruningModifier)[0].init_sparsity == 0.0
    assert "phased" not in text.to_yaml() and Recipe.load(text.to_yaml()) == text
    jump = recipe("GMPruningModifier", mask_type="'2:4'", init_sparsity=0.0, final_sparsity=0.5, update_frequency=2)
    assert courses_of(jump) == {None, 0.0, 0.5}


def courses_of(text: Recipe) -> set[float | None]:
    modifier = text.of(GMPruningModifier)[0]
    return {modifier.course(Clock(step, 4), 4.0, 0.5) for step in range(16)}


def test_a_pattern_that_does_not_fit_names_the_weight() -> None:
    text = recipe("GMPruningModifier", mask_type="[3, 1]", params="['re:.*query']")
    with pytest.raises(
        RecipeError, match=r"mask_type \[3, 1\] does not fit bert.*query.weight: its 16 rows are no multiple"
    ):
        text.plan(CompressionPlan(), bert())


AFTER = "  - !ConstantPruningModifier {start_epoch: 3, params: __ALL_PRUNABLE__}\n"
GROWING = (
    "m_modifiers:\n  - !GMPruningModifier {start_epoch: 1, end_epoch: 3, init_sparsity: 0.1, final_sparsity: 0.5, "
    "update_frequency: 1, params: __ALL_PRUNABLE__}\n"
)


def test_nothing_may_mask_what_gradual_pruning_has_masked() -> None:
    with pytest.raises(RecipeError, match="nothing may after GMPruningModifier, which holds its zeros to the end"):
        Recipe.load(GROWING + AFTER)
    with pytest.raises(RecipeError, match="both set mask:__ALL_PRUNABLE__ at the same time"):
        Recipe.load(GROWING + AFTER.replace("start_epoch: 3", "start_epoch: 2"))
    hidden = Recipe.load(GROWING + AFTER.replace("__ALL_PRUNABLE__", "['re:bert']"))
    with pytest.raises(RecipeError, match=r"both mask bert\.encoder.*, and nothing may after"):
        hidden.plan(CompressionPlan(), bert())


def test_zeros_that_were_held_first_are_pruned_further() -> None:
    text = Recipe.load(
        GROWING + "  - !ConstantPruningModifier {start_epoch: 0, end_epoch: 1, params: __ALL_PRUNABLE__}\n"
    )
    session = session_of(text, bert(sparsity=0.4))
    patterns = {name: session.module.get_parameter(f"{name}.weight") == 0 for name in zeros(session)}
    take_steps(session, 0, 16)
    for name, count in zeros(session).items():
        effective = effective_weight(session.module.get_submodule(name))
        assert (effective[patterns[name]] == 0).all() and count == round(0.5 * effective.numel())
