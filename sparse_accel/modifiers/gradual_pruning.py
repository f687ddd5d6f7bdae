"""Gradual magnitude pruning: from dense to sparse, the smallest weights first, while training goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Final, Literal, Self, final

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator
from torch import Tensor, nn

from sparse_accel import schedules
from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.layers import CompressedEmbedding, CompressedLinear, Pruned
from sparse_accel.compress.masks import (
    BLOCK4,
    NM_TOLERANCE,
    UNSTRUCTURED,
    MaskType,
    global_keep,
    held,
    pruned_mask,
    sparsity,
    spread,
    unit_scores,
)
from sparse_accel.compress.plan import CompressionPlan, masked_layers, request_masks
from sparse_accel.errors import RecipeError
from sparse_accel.modifiers.base import Modifier
from sparse_accel.modifiers.parameter_targets import ParameterTargets, check_patterns, mask_knobs, maskable
from sparse_accel.session import Session
from sparse_accel.targets import ALL_PRUNABLE
from sparse_accel.timeline import Clock, Interval

FROM_PARAM: Final = "__FROM_PARAM__"

_INTERPOLATIONS: Final = {
    "linear": schedules.linear,
    "cubic": schedules.cubic,
    "inverse_cubic": schedules.inverse_cubic,
}
_MASK_TYPES: Final = {"unstructured": UNSTRUCTURED, "block4": BLOCK4, "tensorrt": MaskType(1, 4, kept=2)}
_NM: Final = re.compile(r"(\d+):(\d+)")

_Layer = CompressedLinear | CompressedEmbedding
_Groups = tuple[tuple[float, tuple[str, ...]], ...]


def _none_when_empty(value: Any) -> Any:
    """SparseML reads an empty list as every prunable weight."""
    return None if value == [] or value == () else value


def _number(value: Any) -> float | None:
    """What YAML gave for a number: strings that hold one (`5e-1`) are numbers too."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _in_percent(number: float | None) -> str:
    return f"; {number:g} percent is {number / 100:g}" if number is not None and 1.0 < number < 100.0 else ""


def _sparsity(value: Any) -> float:
    number = _number(value)
    if number is None or not 0.0 < number < 1.0:
        raise ValueError(f"must be a sparsity greater than 0 and less than 1{_in_percent(number)}")
    return number


def _final_sparsity(value: Any) -> float | _Groups:
    if not isinstance(value, Mapping) and not isinstance(value, tuple):
        return _sparsity(value)
    groups = []
    for share, params in value.items() if isinstance(value, Mapping) else value:
        if not isinstance(params, list | tuple) or not params or not all(isinstance(item, str) for item in params):
            raise ValueError("as a mapping must give each sparsity a list of parameter names and 're:' patterns")
        check_patterns(params)
        groups.append((_sparsity(share), tuple(params)))
    if not groups:
        raise ValueError("must be a sparsity or a mapping of sparsities to parameters")
    return tuple(groups)


def _as_mapping(value: float | _Groups) -> Any:
    return value if isinstance(value, float) else {share: list(params) for share, params in value}


def _init_sparsity(value: Any) -> float | str:
    if isinstance(value, str) and value.upper() == FROM_PARAM:
        return FROM_PARAM
    number = _number(value)
    if number is None or not 0.0 <= number < 1.0:
        raise ValueError(f"must be a sparsity from 0 on and less than 1, or {FROM_PARAM}{_in_percent(number)}")
    return number


def _mask_type(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        # YAML 1.1 counts in sixties: 2:4 without quotes is 124.
        raise ValueError(f"must be in quotes: '{value // 60}:{value % 60}'")
    if isinstance(value, list | tuple):
        if len(value) != 2 or any(isinstance(x, bool) or not isinstance(x, int) or x == 0 or x < -1 for x in value):
            raise ValueError("as a list must be the rows and columns of a block, such as [1, 4] (-1: all of them)")
        return tuple(value)
    match = _NM.fullmatch(value) if isinstance(value, str) else None
    if match is not None and 0 < int(match[1]) < int(match[2]):
        return value
    if value in _MASK_TYPES:
        return value
    raise ValueError(
        "must be unstructured, block4, N:M with N less than M (such as '2:4'), tensorrt or a block [rows, columns]"
    )


class GradualPruning(Modifier):
    """Interface of the modifiers below: of `params`, the share of zeros goes from `init_sparsity` at `start_epoch` to
    `final_sparsity` at `end_epoch`, along `inter_func`, and changes at the start, every `update_frequency` epochs (-1: at every
    step) and at the end.

    The smallest magnitudes go, and never come back while the mask is held. A schedule that would end with the run's last epoch
    reaches its final sparsity in the last step. `leave_enabled` holds the zeros to the end of the run; without it they are zero
    at `end_epoch` and may grow from there.
    """

    init_sparsity: Annotated[float | Literal["__FROM_PARAM__"], BeforeValidator(_init_sparsity)]
    final_sparsity: Annotated[
        float | _Groups, BeforeValidator(_final_sparsity), PlainSerializer(_as_mapping, return_type=Any)
    ]
    update_frequency: Annotated[float, Field(allow_inf_nan=False)]
    # None stands for every prunable weight, or for those that a mapping in `final_sparsity` names.
    params: Annotated[ParameterTargets | None, BeforeValidator(_none_when_empty)] = None
    leave_enabled: bool = True
    inter_func: Literal["linear", "cubic", "inverse_cubic"] = "cubic"
    mask_type: Annotated[str | tuple[int, int], BeforeValidator(_mask_type)] = "unstructured"

    @field_validator("update_frequency")
    @classmethod
    def _is_a_frequency(cls, value: float) -> float:
        if value < 0.0 and value != -1.0:
            raise ValueError("must be a number of epochs, or -1 for every step")
        return value

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.end_epoch is None:
            raise ValueError("end_epoch must be an epoch (pruning needs to know where it arrives); got -1")
        if self.end_epoch <= self.interval.start:
            raise ValueError(f"end_epoch must lie after start_epoch ({self.interval.start}); got {self.end_epoch}")
        if not isinstance(self.final_sparsity, float) and self.params is not None:
            raise ValueError("params must be [] where final_sparsity names the parameters")
        least = min(self.final_sparsities)
        if isinstance(self.init_sparsity, float) and self.init_sparsity > least:
            raise ValueError(
                f"init_sparsity ({self.init_sparsity}) must not be above final_sparsity ({least}): zeros only grow"
            )
        if self.is_global and (self.init_sparsity == FROM_PARAM or not isinstance(self.final_sparsity, float)):
            raise ValueError(
                "global pruning has one sparsity for all parameters together: init_sparsity and final_sparsity must be numbers"
            )
        self._check_pattern()
        return self

    def _check_pattern(self) -> None:
        only = self.layout.sparsity
        if only is None:
            return
        if self.is_global:
            raise ValueError(f"mask_type {self.mask_type} cannot be pruned globally: each group has its own zeros")
        if any(abs(share - only) > NM_TOLERANCE for share in self.final_sparsities):
            raise ValueError(
                f"final_sparsity must be {only:g} for mask_type {self.mask_type}; got {self.final_sparsity}"
            )
        init, length = self.init_sparsity, (self.end_epoch or 0.0) - self.interval.start
        jumps = init == 0.0 and self.update_frequency >= length
        if not jumps and (not isinstance(init, float) or abs(init - only) > NM_TOLERANCE):
            raise ValueError(
                f"init_sparsity must be {only:g} for mask_type {self.mask_type}, which has nothing between 0 and that; got {init}"
            )

    @property
    def is_global(self) -> bool:
        """Whether one threshold holds for all parameters together."""
        return False

    @property
    def layout(self) -> MaskType:
        """How the zeros lie."""
        if isinstance(self.mask_type, tuple):
            return MaskType(*self.mask_type)
        match = _NM.fullmatch(self.mask_type)
        return _MASK_TYPES[self.mask_type] if match is None else MaskType(1, int(match[2]), kept=int(match[1]))

    @property
    def final_sparsities(self) -> tuple[float, ...]:
        """The sparsities at which parameters arrive, one unless they differ."""
        if isinstance(self.final_sparsity, float):
            return (self.final_sparsity,)
        return tuple(share for share, _ in self.final_sparsity)

    @property
    def groups(self) -> tuple[tuple[float, str | tuple[str, ...]], ...]:
        """Final sparsities and what they are for."""
        if isinstance(self.final_sparsity, float):
            return ((self.final_sparsity, self.params or ALL_PRUNABLE),)
        return self.final_sparsity

    @property
    def interval(self) -> Interval:
        return Interval(self.start_epoch or 0.0, None if self.leave_enabled else self.end_epoch)

    @property
    def claims(self) -> Interval:
        # What comes after finds zeros that an optimizer still moves.
        return Interval(self.interval.start, None)

    def owns(self) -> frozenset[str]:
        targets = [(names,) if isinstance(names, str) else names for _, names in self.groups]
        return mask_knobs([target for names in targets for target in names])

    def problems(self, num_epochs: float) -> Iterator[str]:
        assert self.end_epoch is not None
        if self.interval.start >= num_epochs:
            yield f"starts at epoch {self.start_epoch}, but training ends at {num_epochs}"
        elif self.end_epoch > num_epochs:
            yield f"arrives at epoch {self.end_epoch}, but training ends at {num_epochs}"

    def plan(self, plan: CompressionPlan, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        chosen: dict[str, float] = {}
        for share, targets in self.groups:
            for name in maskable(targets, model):
                chosen.setdefault(name, share)
        for name in (name for name in parameters if name in chosen):
            obstacle = self.layout.obstacle(tuple(parameters[name].shape))
            if obstacle is not None:
                raise RecipeError(
                    f"{type(self).__name__}: mask_type {self.mask_text} does not fit {name}: {obstacle}; name the other "
                    "parameters in params"
                )
            module = name.removesuffix(".weight")
            initial = self.init_sparsity if isinstance(self.init_sparsity, float) else _own_sparsity(parameters[name])
            plan.add_mask(module, owner=self)
            plan.pruned_from_to[module] = (min(initial, chosen[name]), chosen[name])

    @property
    def mask_text(self) -> str:
        """`mask_type` as a recipe has it."""
        return str(list(self.mask_type)) if isinstance(self.mask_type, tuple) else self.mask_type

    def progress(self, clock: Clock, num_epochs: float) -> float | None:
        """How far the schedule has come at this step of a run of so many epochs, in [0, 1] of time: that of the last update, at
        or before it. None before the start."""
        assert self.end_epoch is not None
        first, last = clock.step_of(self.interval.start), clock.step_of(num_epochs) - 1
        # SparseML's last update is lost where the end is the run's: no step stands there. Here the last step has it.
        arrival = max(first, min(clock.step_of(self.end_epoch), last))
        if clock.step < first:
            return None
        if clock.step >= arrival:
            return 1.0
        every = max(1, clock.step_of(max(0.0, self.update_frequency)))
        update = Clock(first + (clock.step - first) // every * every, clock.steps_per_epoch)
        return Interval(self.interval.start, self.end_epoch).progress(update)

    def sparsity_at(self, progress: float, initial: float, final: float) -> float:
        """The sparsity of a parameter that goes from `initial` to `final`."""
        if progress >= 1.0:
            return final
        return _INTERPOLATIONS[self.inter_func](progress, initial, final)

    def course(self, clock: Clock, num_epochs: float, final: float) -> float | None:
        """The sparsity at this step of the parameters that arrive at `final`; None before the start, and on the way from a
        weight's own sparsity."""
        progress = self.progress(clock, num_epochs)
        if progress is None or (progress < 1.0 and not isinstance(self.init_sparsity, float)):
            return None
        return self.sparsity_at(progress, float(self.init_sparsity) if progress < 1.0 else final, final)

    def on_step_start(self, session: Session, clock: Clock) -> None:
        progress = self.progress(clock, session.recipe.num_epochs)
        if progress is None:
            return
        names = session.plan.masked_by(self)
        if not self.interval.contains(clock):
            self._let_go(session, names)
            request_masks(session.module, names, None)
        elif self.is_global:
            assert isinstance(self.init_sparsity, float) and isinstance(self.final_sparsity, float)
            self._prune_globally(session, names, self.sparsity_at(progress, self.init_sparsity, self.final_sparsity))
            request_masks(session.module, names, "held")
        else:
            layout = self.layout
            for name, layer in _layers(session, names).items():
                layer.mask_request = Pruned(self.sparsity_at(progress, *session.plan.pruned_from_to[name]), layout)

    def metrics(self, session: Session, clock: Clock) -> dict[str, float]:
        """The share of weights that masks of gradual pruning drop now, of all that it prunes; of several modifiers together."""
        dropped = total = 0.0
        for modifier in session.recipe.modifiers:
            if isinstance(modifier, GradualPruning):
                zeros, numel = modifier._zeros(session)
                dropped, total = dropped + zeros, total + numel
        return {"sparsity": dropped / total}

    def _zeros(self, session: Session) -> tuple[float, int]:
        """How many weights the masks of this modifier drop now (where blocks are short, as if they were not), and of how many."""
        layout, dropped, total = self.layout, 0.0, 0
        of_a_unit = 1.0 if layout.sparsity is None else layout.sparsity
        for layer in _layers(session, session.plan.masked_by(self)).values():
            assert layer.mask is not None
            if layer.mask_request is not None:
                share = layer.num_dropped(layout) / layout.num_units(tuple(layer.mask.shape))
                dropped += layer.mask.numel() * share * of_a_unit
            total += layer.mask.numel()
        return dropped, total

    def _prune_globally(self, session: Session, names: Iterable[str], share: float) -> None:
        """Let the masks drop that share of all units together, by one threshold; nothing where they do already. Every rank sees
        the whole weights, one at a time, and comes to the same masks."""
        layers = _layers(session, names)
        shapes = {name: tuple(layer.mask.shape) for name, layer in layers.items() if layer.mask is not None}
        wanted = round(share * sum(self.layout.num_units(shape) for shape in shapes.values()))
        if sum(layer.num_dropped(self.layout) for layer in layers.values()) >= wanted:
            return
        masks = {name: layer.mask.clone() for name, layer in layers.items() if layer.mask is not None}

        def scores() -> Iterator[tuple[str, Tensor]]:
            for name, weight in _whole_weights(session, layers):
                yield name, unit_scores(weight.to(masks[name].device), masks[name], self.layout)

        for name, keep in global_keep(scores, wanted):
            mask = masks[name] & spread(keep, self.layout, shapes[name])
            layers[name].set_mask(mask, self.layout, keep.numel() - int(keep.sum()))

    def _let_go(self, session: Session, names: Iterable[str]) -> None:
        """Once, when the time of a mask is over: bring it to its final sparsity, write its zeros into the stored weights, which
        then may grow, and forget it."""
        layers = {name: layer for name, layer in _layers(session, names).items() if layer.captured}
        if not layers:
            return
        if self.is_global:
            self._prune_globally(session, names, self.final_sparsities[0])
        values: dict[str, Tensor] = {}
        for name, weight in session.backend.whole_parameters(session.module):
            module = name.removesuffix(".weight")
            if module in layers:
                layer = layers[module]
                assert layer.mask is not None
                mask, weight = layer.mask, weight.to(layer.mask.device)
                if not self.is_global:
                    wanted = self.layout.num_dropped(tuple(mask.shape), session.plan.pruned_from_to[module][1])
                    mask = pruned_mask(weight, mask, self.layout, max(wanted, layer.num_dropped(self.layout)))
                weight = held(weight, mask)
            values[name] = weight.detach().to("cpu", copy=True)
        session.backend.put_parameters(session.module, values)
        for layer in layers.values():
            layer.clear_mask()


def _own_sparsity(weight: Tensor) -> float:
    """Its share of zeros; 0 where the weight is not on this process, which is then told by the one that has it."""
    return 0.0 if weight.is_meta else sparsity(weight)


def _layers(session: Session, names: Iterable[str]) -> dict[str, _Layer]:
    """The layers of these modules, whose weights are whole: compact ones are refused where the plan is made."""
    masked = masked_layers(session.module)
    found: dict[str, _Layer] = {}
    for name in names:
        layer = masked[name]
        assert not isinstance(layer, CompactLinear), "a mask that changes is not stored compact"
        found[name] = layer
    return found


def _whole_weights(session: Session, layers: Mapping[str, _Layer]) -> Iterator[tuple[str, Tensor]]:
    for name, weight in session.backend.whole_parameters(session.module):
        module = name.removesuffix(".weight")
        if module in layers:
            yield module, weight


@final
class GMPruningModifier(GradualPruning):
    """SparseML's first name for it: each parameter to its own sparsity, or, with `global_sparsity`, all together."""

    global_sparsity: bool = False
    # SparseML's former ways to other algorithms: what is left of them is their defaults.
    phased: Annotated[bool, Field(exclude=True)] = False
    score_type: Annotated[str, Field(exclude=True)] = "magnitude"

    @field_validator("phased")
    @classmethod
    def _is_not_phased(cls, value: bool) -> bool:
        if value:
            raise ValueError("must be false: alternating dense and sparse phases (AC/DC) is not offered")
        return value

    @field_validator("score_type")
    @classmethod
    def _is_magnitude(cls, value: str) -> str:
        if value != "magnitude":
            raise ValueError("must be magnitude: weights are not scored otherwise here")
        return value

    @property
    def is_global(self) -> bool:
        return self.global_sparsity


@final
class MagnitudePruningModifier(GradualPruning):
    """Each parameter is pruned to its own sparsity."""


@final
class GlobalMagnitudePruningModifier(GradualPruning):
    """All parameters together are pruned to one sparsity: some end sparser than others."""

    @property
    def is_global(self) -> bool:
        return True
