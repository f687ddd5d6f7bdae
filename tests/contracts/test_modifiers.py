"""What every modifier promises, checked for each row of MODIFIERS on a tiny model, the real loop and real checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from sparse_accel.compress.layers import compressed_layers
from sparse_accel.compress.plan import CompressionPlan, install
from sparse_accel.compress.ranges import quantizers
from sparse_accel.modifiers import MODIFIERS
from sparse_accel.modifiers.base import Modifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime import checkpoint, gathering
from sparse_accel.runtime.backends import PlainBackend
from sparse_accel.runtime.batches import StepLoader, StepSampler
from sparse_accel.runtime.setup import accepted_inputs, build_optimizer
from sparse_accel.runtime.teachers.replicated import replicated
from sparse_accel.runtime.training import TrainState, set_flag_values, train
from sparse_accel.session import LossTerms, Session
from sparse_accel.tasks import resolve_task
from sparse_accel.timeline import Clock, Interval
from tests.unit.qat_bert import batch, bert

EPOCHS = 3
STEPS_PER_EPOCH = 4
STEPS = EPOCHS * STEPS_PER_EPOCH

# The canonical example of each modifier: it starts late and ends early, wherever the modifier can.
EXAMPLES: dict[str, str] = {
    "ConstantPruningModifier": """
        start_epoch: 1.0
        end_epoch: 2.0
        params: __ALL_PRUNABLE__
    """,
    "DistillationModifier": """
        start_epoch: 1.0
        end_epoch: 2.0
        hardness: 0.75
        temperature: 5.0
        distill_output_keys: [start_logits, end_logits]
    """,
    "EpochRangeModifier": """
        start_epoch: 0.0
        end_epoch: 3.0
    """,
    "GMPruningModifier": """
        start_epoch: 1.0
        end_epoch: 2.0
        update_frequency: 0.5
        init_sparsity: 0.55
        final_sparsity: 0.8
        params: __ALL_PRUNABLE__
        leave_enabled: False
    """,
    "GlobalMagnitudePruningModifier": """
        start_epoch: 1.0
        end_epoch: 2.0
        update_frequency: -1
        init_sparsity: 0.55
        final_sparsity: 0.8
        params: ['re:.*attention', 're:.*word_embeddings']
        leave_enabled: False
        inter_func: linear
        mask_type: block4
    """,
    "LearningRateFunctionModifier": """
        start_epoch: 1.0
        end_epoch: 2.0
        lr_func: linear
        init_lr: 2e-3
        final_lr: 1e-4
    """,
    "MagnitudePruningModifier": """
        start_epoch: 1.0
        end_epoch: 2.0
        update_frequency: 0.25
        init_sparsity: __FROM_PARAM__
        final_sparsity: {0.7: ['re:.*query', 're:.*key'], 0.9: ['re:.*dense']}
        inter_func: inverse_cubic
    """,
    "QuantizationModifier": """
        start_epoch: 1.0
        disable_quantization_observer_epoch: 2.0
        freeze_bn_stats_epoch: 2.0
        quantize_embeddings: 1
        quantize_linear_activations: 0
        exclude_module_types: ['LayerNorm']
        submodules:
          - bert.embeddings
          - bert.encoder
          - qa_outputs
    """,
    "SetLearningRateModifier": """
        start_epoch: 1.0
        learning_rate: 5e-3
    """,
    "SetWeightDecayModifier": """
        start_epoch: 1.0
        weight_decay: 0.125
    """,
    "TrainableParamsModifier": """
        params: ['re:bert\\.embeddings\\..*']
        trainable: false
    """,
}

# What is set and stays set when a modifier's time is over, as SparseML leaves it.
STAYS_SET = {"lr", "weight_decay"}

every_modifier = pytest.mark.parametrize("name", sorted(MODIFIERS))


def test_every_modifier_has_an_example_here() -> None:
    assert sorted(EXAMPLES) == sorted(MODIFIERS)


def recipe_of(name: str) -> Recipe:
    return Recipe.load(f"training_modifiers:\n  - !{name}{EXAMPLES[name]}")


def modifier_of(name: str) -> Modifier:
    (modifier,) = recipe_of(name).modifiers
    return modifier


# --- a small run of the real loop -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _accelerator_of_this_module() -> Iterator[None]:
    yield
    uninterrupted.cache_clear()
    AcceleratorState._reset_state(True)


def session_of(recipe: Recipe, *, planned_by: Recipe | None = None) -> Session:
    """A run of `recipe` before its first step, on a pruned one-layer BERT with dropout; 4 steps of 2 micro-batches each
    make an epoch. The structure may be that of another recipe."""
    accelerator = Accelerator(cpu=True)
    task = resolve_task("question_answering")
    model = bert(sparsity=0.5, dropout=0.1)
    plan = CompressionPlan()
    (planned_by or recipe).plan(plan, model)
    install(model, plan)
    options: Any = SimpleNamespace(
        max_grad_norm=1.0,
        distill_include_padding=False,
        distill_top_k=0,
        optim="adamw_torch",
        learning_rate=1e-3,
        weight_decay=0.01,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
    )
    optimizer = build_optimizer(options, model)
    features = batch(size=24, padding=2)
    accepts = accepted_inputs(model) - set(task.label_keys)
    return Session(
        accelerator=accelerator,
        model=model,
        module=model,
        optimizer=optimizer,
        recipe=recipe,
        plan=plan,
        task=task,
        options=options,
        loader=StepLoader(
            StepSampler(num_features=24, micro_batch_size=3, accumulation=2, seed=5, rank=0, world_size=1),
            features,  # type: ignore[arg-type]  # which the collator alone looks at
            lambda columns, indices, epoch: {key: column[indices] for key, column in columns.items()},
            task,
            device=torch.device("cpu"),
        ),
        teacher=replicated(bert(seed=9), accelerator, accepts),
        backend=PlainBackend(accelerator, "no"),
        accepts=accepts,
        base_lr=lambda step: 1e-3 * (1 - step / 100),
        base_weight_decay=[group["weight_decay"] for group in optimizer.param_groups],
    )


def knobs(session: Session, clock: Clock) -> dict[str, Any]:
    """All that a modifier might turn, by the name under which it would own it; `elsewhere` nobody owns."""
    module = session.module
    inputs = batch(size=2)
    with torch.no_grad():
        outputs = {key: torch.zeros(inputs["input_ids"].shape) for key in session.task.output_keys}
        terms = session.recipe.on_loss(LossTerms.task(torch.ones(())), inputs, outputs, session, clock)
    return {
        "lr": [group["lr"] for group in session.optimizer.param_groups],
        "weight_decay": [group["weight_decay"] for group in session.optimizer.param_groups],
        "mask": {name: layer.mask_request for name, layer in compressed_layers(module).items()},
        "quant": {name: quantizer.phase for name, quantizer in quantizers(module).items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "distillation": {term: part.weight for term, part in terms.terms.items()},
        "elsewhere": {
            "settings": [
                {key: value for key, value in group.items() if key not in ("params", "lr", "weight_decay")}
                for group in session.optimizer.param_groups
            ],
            "modes": {name: part.training for name, part in module.named_modules()},
        },
    }


def at(session: Session, step: int) -> dict[str, Any]:
    """The knobs as the loop sets them at the start of a step."""
    clock = Clock(step, STEPS_PER_EPOCH)
    set_flag_values(session, clock)
    session.recipe.on_step_start(session, clock)
    return knobs(session, clock)


def without(name: str) -> Session:
    """The model of the modifier's run, masks and quantizers in place, and nobody who asks for anything."""
    session = session_of(Recipe.empty(), planned_by=recipe_of(name))
    for parameter in session.module.parameters():
        parameter.requires_grad_(True)
    return session


@dataclass
class History:
    """What was seen of a run: knobs and state-dict keys after each step, and all numbers at the end."""

    knobs: list[dict[str, Any]]
    keys: list[list[str]]
    end: dict[str, Tensor]


def numbers(session: Session) -> dict[str, Tensor]:
    """Weights, masks, ranges and the optimizer's state, as checkpoints have them."""
    state = gathering.whole_state(session, kept=torch.clone)
    return state | {name: tensor.clone() for name, tensor in gathering.whole_optimizer(session).items()}


def run(session: Session, state: TrainState, after: Callable[[TrainState], None] = lambda state: None) -> History:
    """The real loop to its end."""
    seen = History([], [], {})

    def after_step(session: Session, state: TrainState) -> None:
        seen.knobs.append(knobs(session, Clock(state.clock.step - 1, STEPS_PER_EPOCH)))
        seen.keys.append(list(session.module.state_dict()))
        after(state)

    train(session, state, after_step)
    return replace(seen, end=numbers(session))


def fresh(last_step: int = STEPS) -> TrainState:
    torch.manual_seed(11)  # dropout
    return TrainState(clock=Clock(0, STEPS_PER_EPOCH), last_step=last_step)


@cache
def uninterrupted(name: str) -> History:
    return run(session_of(recipe_of(name)), fresh())


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Names under which the two do not hold the same bits."""
    names = sorted({*ours, *theirs})
    return [name for name in names if name not in ours or name not in theirs or not ours[name].equal(theirs[name])]


# --- the contracts --------------------------------------------------------------------------------------------------


@every_modifier
def test_a_modifier_survives_being_written_down(name: str) -> None:
    recipe = recipe_of(name)
    again = Recipe.load(recipe.to_yaml())
    assert type(again.modifiers[0]) is MODIFIERS[name]
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert recipe.warnings == again.warnings == []
    recipe.check(EPOCHS)


@every_modifier
def test_a_modifier_cannot_be_changed_nor_hold_what_it_does_not_know(name: str) -> None:
    modifier = modifier_of(name)
    with pytest.raises(ValueError, match="frozen"):
        modifier.start_epoch = 0.5
    with pytest.raises(ValueError, match="Extra inputs"):
        type(modifier).model_validate({**modifier.model_dump(), "strenght": 1})


@every_modifier
def test_a_modifier_does_nothing_outside_its_interval(name: str) -> None:
    modifier = modifier_of(name)
    outside = [s for s in range(STEPS + 4) if not modifier.interval.contains(Clock(s, STEPS_PER_EPOCH))]
    assert outside or modifier.interval == Interval(), "an example should start late or end early where it can"
    session, nobody = session_of(recipe_of(name)), without(name)
    for step in range(STEPS + 4):
        found, expected = at(session, step), at(nobody, step)
        if step in outside:
            is_over = Clock(step, STEPS_PER_EPOCH).has_reached(modifier.interval.start)
            stays = {owned.partition(":")[0] for owned in modifier.owns()} & STAYS_SET if is_over else set()
            assert {knob for knob in found if found[knob] != expected[knob]} <= stays, f"step {step}"


@every_modifier
def test_a_modifier_turns_its_own_knobs_and_no_others(name: str) -> None:
    owned = {knob.partition(":")[0] for knob in modifier_of(name).owns()}
    nobody, turned = without(name), set()
    for step, found in enumerate(uninterrupted(name).knobs):
        expected = at(nobody, step)
        turned |= {knob for knob in found if found[knob] != expected[knob]}
    assert turned == owned


@every_modifier
def test_what_holds_at_a_step_follows_from_the_clock_alone(name: str) -> None:
    """A session that was never in an earlier step stands as the one that took all of them."""
    for step in (0, 3, 4, 7, 8, 11):
        assert at(session_of(recipe_of(name)), step) == uninterrupted(name).knobs[step], f"step {step}"


class Twice(Recipe):
    """States at every step what should hold, and states it again."""

    def on_step_start(self, session: Session, clock: Clock) -> None:
        super().on_step_start(session, clock)
        before, numbers_before = knobs(session, clock), numbers(session)
        super().on_step_start(session, clock)
        assert knobs(session, clock) == before
        assert differing(numbers(session), numbers_before) == []


@every_modifier
def test_stating_twice_what_should_hold_equals_stating_it_once(name: str) -> None:
    recipe = recipe_of(name)
    twice = run(session_of(Twice(recipe.modifiers, places=recipe.places)), fresh())
    assert differing(twice.end, uninterrupted(name).end) == []
    assert twice.knobs == uninterrupted(name).knobs


@every_modifier
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """At the start, within and at the ends of the epoch in which the examples act, and in the last step."""
    expected = uninterrupted(name)
    stopped = session_of(recipe_of(name))
    stops = (1, 3, 4, 5, 8, 11)

    def save(state: TrainState) -> None:
        if state.clock.step in stops:
            checkpoint.save(stopped, state, tmp_path, extra=lambda folder: None)

    run(stopped, fresh(max(stops)), after=save)
    for stop in stops:
        torch.manual_seed(77)  # whatever was drawn before, the checkpoint's state counts
        session = session_of(recipe_of(name))
        resumed = run(session, checkpoint.load(session, tmp_path / f"checkpoint-{stop}", STEPS))
        assert differing(resumed.end, expected.end) == [], f"stopped at {stop}"
        assert resumed.knobs == expected.knobs[stop:], f"stopped at {stop}"


@every_modifier
def test_names_of_parameters_are_left_alone_and_the_keys_of_the_state_never_change(name: str) -> None:
    plain = bert()
    session = session_of(recipe_of(name))
    assert [n for n, _ in session.module.named_parameters()] == [n for n, _ in plain.named_parameters()]
    before = list(session.module.state_dict())
    assert [key for key in before if key in plain.state_dict()] == list(plain.state_dict())
    assert uninterrupted(name).keys == [before] * STEPS
