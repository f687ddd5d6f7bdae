"""What a recipe does when, worked out before training: epochs as optimizer steps, and what holds from each to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from sparse_accel.compress.plan import Phase
from sparse_accel.modifiers.base import Modifier
from sparse_accel.modifiers.constant_pruning import ConstantPruningModifier
from sparse_accel.modifiers.distillation import DistillationModifier
from sparse_accel.modifiers.gradual_pruning import GradualPruning
from sparse_accel.modifiers.learning_rate import LearningRateFunctionModifier, SetLearningRateModifier
from sparse_accel.modifiers.quantization import QuantizationModifier
from sparse_accel.modifiers.trainable_params import TrainableParamsModifier
from sparse_accel.modifiers.weight_decay import SetWeightDecayModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.timeline import Clock

# Where no data is known an epoch is cut this finely; its steps then mean nothing and are not shown.
NOMINAL_STEPS: Final = 100_000

RateModifier = LearningRateFunctionModifier | SetLearningRateModifier
# The share of zeros in the weights that each pruning modifier holds, where a model is known.
Held = Mapping[ConstantPruningModifier, float]


@dataclass(frozen=True)
class Stretch:
    """The optimizer steps from `first` up to `end` (exclusive), in which nothing changes but the learning rate and sparsity along
    their functions. `rates` has the modifier that sets it, for each of the timeline's groups; None is the flags' own."""

    first: Clock
    end: Clock
    rates: tuple[RateModifier | None, ...]
    masking: tuple[ConstantPruningModifier, ...]
    pruning: tuple[GradualPruning, ...]
    phase: Phase
    distillation: DistillationModifier | None
    weight_decay: SetWeightDecayModifier | None


@dataclass(frozen=True)
class Timeline:
    """A whole run. `groups` are the param_groups whose learning rates differ, or None for all together."""

    recipe: Recipe
    num_epochs: float
    steps_per_epoch: int
    groups: tuple[int | None, ...]
    stretches: tuple[Stretch, ...]
    warnings: tuple[str, ...] = ()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return Clock(0, self.steps_per_epoch).step_of(self.num_epochs)


def timeline(recipe: Recipe, num_epochs: float, steps_per_epoch: int) -> Timeline:
    """The timeline of a run of `num_epochs`, each `steps_per_epoch` optimizer steps long."""
    start = Clock(0, steps_per_epoch)
    total = start.step_of(num_epochs)
    edges = {0, total}
    for modifier in recipe.modifiers:
        edges.update(start.step_of(epoch) for epoch in _epochs(modifier))
    inside = sorted(edge for edge in edges if 0 <= edge <= total)
    groups = _groups(recipe)
    stretches: list[Stretch] = []
    for first, end in pairwise(inside):
        found = _stretch(recipe, groups, Clock(first, steps_per_epoch), Clock(end, steps_per_epoch))
        if stretches and _goes_on(stretches[-1], found):
            found = _stretch(recipe, groups, stretches.pop().first, found.end)
        stretches.append(found)
    warnings = tuple(_in_vain(recipe, start, total))
    return Timeline(recipe, num_epochs, steps_per_epoch, groups, tuple(stretches), warnings)


def rate_modifier(recipe: Recipe, group: int | None, clock: Clock) -> RateModifier | None:
    """The modifier whose learning rate a param_group has at this step: of those that have begun, the last to begin."""
    speaking = [
        modifier
        for modifier in _rate_modifiers(recipe)
        if (modifier.param_groups is None or group in modifier.param_groups)
        and clock.has_reached(modifier.interval.start)
    ]
    return sorted(speaking, key=_start)[-1] if speaking else None


def _rate_modifiers(recipe: Recipe) -> list[RateModifier]:
    return [*recipe.of(LearningRateFunctionModifier), *recipe.of(SetLearningRateModifier)]


def gradual_pruning(recipe: Recipe) -> tuple[GradualPruning, ...]:
    """The modifiers whose sparsity follows a function."""
    return tuple(modifier for modifier in recipe.modifiers if isinstance(modifier, GradualPruning))


def _start(modifier: Modifier) -> float:
    return -1.0 if modifier.start_epoch is None else modifier.start_epoch


def _epochs(modifier: Modifier) -> list[float]:
    """The moments that a modifier names."""
    named = (getattr(modifier, name) for name in type(modifier).model_fields if name.endswith("_epoch"))
    return [epoch for epoch in named if epoch is not None]


def _groups(recipe: Recipe) -> tuple[int | None, ...]:
    named = {index for modifier in _rate_modifiers(recipe) for index in modifier.param_groups or ()}
    return tuple(range(max(named | {1}) + 1)) if named else (None,)


def _stretch(recipe: Recipe, groups: Sequence[int | None], first: Clock, end: Clock) -> Stretch:
    quantizations = recipe.of(QuantizationModifier)
    decays = [modifier for modifier in recipe.of(SetWeightDecayModifier) if modifier.interval.contains(first)]
    distilling = [modifier for modifier in recipe.of(DistillationModifier) if modifier.interval.contains(first)]
    return Stretch(
        first=first,
        end=end,
        rates=tuple(rate_modifier(recipe, group, first) for group in groups),
        masking=tuple(m for m in recipe.of(ConstantPruningModifier) if m.interval.contains(first)),
        pruning=tuple(m for m in gradual_pruning(recipe) if m.interval.contains(first)),
        phase=quantizations[0].phase(first) if quantizations else Phase.OFF,
        distillation=distilling[0] if distilling else None,
        weight_decay=sorted(decays, key=_start)[-1] if decays else None,
    )


def _goes_on(before: Stretch, after: Stretch) -> bool:
    """Whether nothing changes from one stretch to the next."""
    for one, other in zip(before.rates, after.rates, strict=True):
        if one is not other:
            return False
        end = None if one is None else one.end_epoch
        if end is not None and before.first.has_reached(end) != after.first.has_reached(end):
            return False
    if any(
        before.first.has_reached(pruning.end_epoch or 0.0) != after.first.has_reached(pruning.end_epoch or 0.0)
        for pruning in before.pruning
    ):
        return False
    return (before.masking, before.pruning, before.phase, before.distillation, before.weight_decay) == (
        after.masking,
        after.pruning,
        after.phase,
        after.distillation,
        after.weight_decay,
    )


def _in_vain(recipe: Recipe, start: Clock, total: int) -> Iterator[str]:
    """Modifiers that hold at no step of a run of this length."""
    for modifier, place in zip(recipe.modifiers, recipe.places, strict=True):
        first = start.step_of(modifier.interval.start)
        name = type(modifier).__name__
        if first >= total:
            yield f"{place}: {name}: starts at epoch {modifier.start_epoch:g}, after the last step has begun: it never holds"
        elif modifier.interval.end is not None and start.step_of(modifier.interval.end) <= first:
            yield (
                f"{place}: {name}: epochs {modifier.interval.start:g} to {modifier.interval.end:g} hold no optimizer step "
                f"({start.steps_per_epoch:,} an epoch)"
            )


# --- in words --------------------------------------------------------------------------------------------------------


PHASES: Final = {Phase.OFF: "-", Phase.OBSERVE: "ranges move", Phase.FROZEN: "ranges fixed"}


def table(plan: Timeline, held: Held | None = None) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, a row a stretch. What never changes has no column: `notes` has it. Steps that mean nothing are left
    out."""
    columns: list[tuple[str, list[str]]] = [("epochs", [_span(plan, stretch) for stretch in plan.stretches])]
    if plan.steps_per_epoch != NOMINAL_STEPS:
        steps = [f"{stretch.first.step:,} - {stretch.end.step:,}" for stretch in plan.stretches]
        columns.append(("steps", steps))
    for index, group in enumerate(plan.groups):
        heading = "learning rate" if group is None else f"rate of group {group}"
        columns.append((heading, [_rate_text(stretch, index) for stretch in plan.stretches]))
    columns += [(heading, cells) for heading, cells in _states(plan, held).items() if len(set(cells)) > 1]
    rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    return [heading for heading, _ in columns], rows


def notes(plan: Timeline, held: Held | None = None) -> list[str]:
    """What holds for the whole run, and what needs more words than a cell has."""
    lines = [
        f"{heading}: {cells[0]} in the whole run"
        for heading, cells in _states(plan, held).items()
        if len(set(cells)) == 1 and cells[0] != "-"
    ]
    for freezing in plan.recipe.of(TrainableParamsModifier):
        verb = "learn" if freezing.trainable else "do not learn"
        lines.append(f"parameters: {_targets(freezing.params)} {verb}")
    for pruning in plan.recipe.of(ConstantPruningModifier):
        lines.append(f"zeros are held in {_targets(pruning.params)}")
    for growing in gradual_pruning(plan.recipe):
        lines.append(_pruning_note(growing))
    for distilling in plan.recipe.of(DistillationModifier):
        keys = ", ".join(distilling.distill_output_keys or ()) or "the task's outputs"
        lines.append(f"distillation compares {keys}")
    if any(rate is None for stretch in plan.stretches for rate in stretch.rates):
        which = (
            "--learning_rate says" if _rate_modifiers(plan.recipe) else "--learning_rate and --lr_scheduler_type say"
        )
        lines.append(f"flags: {which} the learning rate there")
    return lines


def _states(plan: Timeline, held: Held | None) -> dict[str, list[str]]:
    """What the recipe says besides learning rates, in each stretch."""
    return {
        "zeros": [_zeros_text(stretch, held, plan.num_epochs) for stretch in plan.stretches],
        "QAT": [PHASES[stretch.phase] for stretch in plan.stretches],
        "teacher": [_distillation_text(stretch.distillation) for stretch in plan.stretches],
        "weight decay": [_decay_text(stretch.weight_decay) for stretch in plan.stretches],
    }


def number(value: float) -> str:
    """A learning rate as people write it: 1.75e-4.

    >>> number(0.000175), number(5e-5), number(0.0), number(0.01)
    ('1.75e-4', '5e-5', '0', '0.01')
    """
    if value == 0.0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _span(plan: Timeline, stretch: Stretch) -> str:
    end = plan.num_epochs if stretch.end.step == plan.total_steps else stretch.end.epoch
    return f"{stretch.first.epoch:.4g} - {end:.4g}"


def corners(stretch: Stretch, index: int) -> tuple[float, float] | None:
    """The learning rate of the timeline's group `index` at the start of a stretch and where it arrives at its end; None where
    the flags say it."""
    modifier = stretch.rates[index]
    if modifier is None:
        return None
    first, last = modifier.learning_rate_at(stretch.first), modifier.learning_rate_at(stretch.end)
    assert first is not None and last is not None  # it has begun
    return first, last


def _rate_text(stretch: Stretch, index: int) -> str:
    found = corners(stretch, index)
    if found is None:
        return "flags"
    modifier = stretch.rates[index]
    if isinstance(modifier, LearningRateFunctionModifier) and modifier.lr_func == "cyclic_linear":
        if not stretch.first.has_reached(modifier.interval.end or 0.0):
            return f"{number(modifier.init_lr)} → {number(modifier.final_lr)} every {modifier.cycle_epochs:g}"
    first, last = map(number, found)
    return first if first == last else f"{first} → {last}"


def _zeros_text(stretch: Stretch, held: Held | None, num_epochs: float) -> str:
    texts = [_course_text(modifier, stretch, num_epochs) for modifier in stretch.pruning]
    if stretch.masking and held is None:
        texts.append("held")
    elif stretch.masking and held is not None:
        texts.append(f"held ({' and '.join(f'{held[modifier]:.1%}' for modifier in stretch.masking)})")
    return " and ".join(texts) or "-"


def _course_text(modifier: GradualPruning, stretch: Stretch, num_epochs: float) -> str:
    """From which sparsity to which a stretch goes. What begins at a weight's own sparsity is known by its end alone."""
    texts = []
    for final in modifier.final_sparsities:
        first, last = (modifier.course(clock, num_epochs, final) for clock in (stretch.first, stretch.end))
        corner = ["own zeros" if share is None else f"{share:.1%}" for share in (first, last)]
        texts.append(corner[0] if corner[0] == corner[1] else " → ".join(corner))
    return " and ".join(texts)


def _pruning_note(modifier: GradualPruning) -> str:
    targets = " and ".join(_targets(names) for _, names in modifier.groups)
    how = "together by magnitude" if modifier.is_global else "each by magnitude"
    pattern = "" if modifier.mask_type == "unstructured" else f", {modifier.mask_text}"
    every = (
        "at every step"
        if modifier.update_frequency <= 0.0
        else f"every {modifier.update_frequency:g} epochs and at the end"
    )
    after = "" if modifier.leave_enabled else "; its zeros are let go at the end"
    return f"{targets}: pruned {how}{pattern}, {modifier.inter_func}, {every}{after}"


def _distillation_text(modifier: DistillationModifier | None) -> str:
    return "-" if modifier is None else f"hardness {modifier.hardness:g}, T {modifier.temperature:g}"


def _decay_text(modifier: SetWeightDecayModifier | None) -> str:
    return "-" if modifier is None else f"{modifier.weight_decay:g}"


def _targets(params: str | tuple[str, ...]) -> str:
    if isinstance(params, str):
        return params
    return ", ".join(params) if len(params) <= 3 else f"{', '.join(params[:3])} and {len(params) - 3} more"
