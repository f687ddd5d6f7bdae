"""The `params` field that several modifiers share, and the parameters of a model that it means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator
from torch import nn

from sparse_accel.compress.plan import prunable_parameters
from sparse_accel.errors import TargetError
from sparse_accel.targets import ALL, is_keyword, match_parameters, pattern_problem


def _keyword_or_names(value: Any) -> Any:
    if isinstance(value, str) and is_keyword(value):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        check_patterns(value)
        return tuple(value)
    raise ValueError("must be __ALL__, __ALL_PRUNABLE__ or a list of parameter names and 're:' patterns")


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise ValueError for a pattern that can mean nothing in any model."""
    for pattern in patterns:
        problem = pattern_problem(pattern)
        if problem is not None:
            raise ValueError(f"has a bad pattern: {problem}")


ParameterTargets = Annotated[str | tuple[str, ...], BeforeValidator(_keyword_or_names)]


def mask_knobs(targets: Iterable[str]) -> frozenset[str]:
    """What a modifier owns that masks `targets`: `mask:...` for each, keywords in capitals. `mask` alone stands for __ALL__: it
    is the same knob as any of the others, since each of them masks something."""
    keywords = {target: target.upper() for target in targets if is_keyword(target)}
    names = [keywords.get(target, target) for target in targets]
    return frozenset("mask" if name == ALL else f"mask:{name}" for name in names)


def resolve(targets: str | tuple[str, ...], model: nn.Module) -> list[str]:
    """The parameters of `model` that `targets` means. Raises TargetError for a target that matches nothing."""
    names = [name for name, _ in model.named_parameters()]
    return match_parameters(targets, names, prunable_parameters(model))


def maskable(targets: str | tuple[str, ...], model: nn.Module) -> list[str]:
    """The weights that `targets` means and that can be masked, in the model's order: those of linear layers and embeddings.

    A pattern may hit biases and norms as well; they are left out. Raises TargetError for a target that means nothing else.
    """
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    can_be = embeddings.union(prunable_parameters(model))
    chosen: set[str] = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        found = resolve((target,), model)
        if not can_be.intersection(found):
            raise TargetError(
                f"params: {target!r} means {found[0]!r}, which cannot be masked: "
                "only the weights of linear layers and embeddings can"
            )
        chosen.update(can_be.intersection(found))
    return [name for name, _ in model.named_parameters() if name in chosen]
