"""What was promised: each bar with the value that a results document has for it, met or missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sparse_accel.benchmarking import summary
from sparse_accel.benchmarking.summary import Document


@dataclass(frozen=True)
class Bar:
    """A bound for one number of one kind of run. `value` gives it, or None where the document lacks an arm."""

    what: str
    workload: str
    precision: str
    device: str
    bound: float
    is_floor: bool
    unit: str
    value: Callable[[Document], float | None]

    def reads(self, document: Document) -> bool:
        """Whether the document is of this bar's workload, precision and device."""
        return (
            document["workload"]["name"] == self.workload
            and document["settings"]["precision"] == self.precision
            and document["machine"]["device"] == self.device
        )

    def status(self, value: float | None) -> str:
        """met, missed, or not measured yet."""
        if value is None:
            return "not measured yet"
        return "met" if (value >= self.bound if self.is_floor else value <= self.bound) else "missed"


def _speedup(arm: str, over: str) -> Callable[[Document], float | None]:
    def value(document: Document) -> float | None:
        found = summary.speedup(document, arm, over)
        return None if found is None else found.median

    return value


def _cost(arm: str, over: str = "dense") -> Callable[[Document], float | None]:
    def value(document: Document) -> float | None:
        found = summary.cost(document, arm, over)
        return None if found is None else found.median

    return value


def _features_per_second(document: Document) -> float | None:
    return summary.summarise(document, "dense").features_per_second if "dense" in document["arms"] else None


def _host_syncs(document: Document) -> float | None:
    ours = [name for name in ("dense", "mask", "recipe", "qat_frozen", "qat_observing") if name in document["arms"]]
    counted = (summary.summarise(document, name).syncs for name in ours)
    return max((syncs for syncs in counted if syncs is not None), default=None)


# Of the 13 epochs of the tutorial 8 are without quantization, 4 follow ranges, and 1 has them fixed; SQuAD v1.1 has as many
# windows of 384 tokens.
_EPOCHS: Final = {"sparse_kd": 8, "recipe": 4, "recipe_frozen": 1}
_SQUAD_FEATURES: Final = 88_524


def recipe_minutes(document: Document) -> float | None:
    """Minutes of the tutorial's 13 epochs over all of SQuAD at the speeds of its three phases: projected, not run."""
    if any(arm not in document["arms"] for arm in _EPOCHS):
        return None
    speeds = {arm: summary.summarise(document, arm).features_per_second for arm in _EPOCHS}
    return sum(epochs * _SQUAD_FEATURES / speeds[arm] for arm, epochs in _EPOCHS.items()) / 60


def _on_cpu(
    what: str, bound: float, value: Any, *, precision: str = "fp32", is_floor: bool = False, unit: str = "x"
) -> Bar:
    return Bar(what, "mini-cpu", precision, "cpu", bound, is_floor, unit, value)


def _on_gpu(
    what: str, bound: float, value: Any, *, workload: str = "squad-base", is_floor: bool = False, unit: str = "x"
) -> Bar:
    return Bar(what, workload, "bf16", "cuda", bound, is_floor, unit, value)


BARS: Final[Sequence[Bar]] = (
    _on_cpu("packed against padded to 384, fp32", 2.3, _speedup("dense", "dense_padded"), is_floor=True),
    _on_cpu(
        "packed against padded to 384, bf16", 1.7, _speedup("dense", "dense_padded"), precision="bf16", is_floor=True
    ),
    _on_cpu("whole recipe against SparseML's way (B2), fp32", 3.5, _speedup("recipe", "b2"), is_floor=True),
    _on_cpu(
        "whole recipe against Hugging Face's plain fine-tuning (B1), fp32", 1.4, _speedup("recipe", "b1"), is_floor=True
    ),
    _on_cpu(
        "whole recipe against Hugging Face's plain fine-tuning (B1), bf16",
        1.2,
        _speedup("recipe", "b1"),
        precision="bf16",
        is_floor=True,
    ),
    _on_cpu("masks over dense", 1.03, _cost("mask")),
    _on_cpu("cached teacher over dense", 1.03, _cost("kd_cached")),
    _on_cpu("quantization, ranges followed, over dense", 1.45, _cost("qat_observing")),
    _on_cpu("quantization, ranges fixed, over dense", 1.30, _cost("qat_frozen")),
    _on_cpu(
        "collating against default_data_collator on datasets",
        50,
        lambda document: summary.collating_speedup(document, "packed").median,
        is_floor=True,
    ),
    _on_cpu(
        "collating 32 features",
        0.1,
        lambda document: summary.collating_milliseconds(document, "packed"),
        unit=" ms",
    ),
    Bar(
        "answers from logits against Hugging Face's post-processing",
        "eval-qa",
        "fp32",
        "cpu",
        20,
        True,
        "x",
        lambda document: document["arms"]["answers"]["times_as_fast"]["cpu"]["median"],
    ),
    _on_gpu("BERT-base, dense, packed", 3600, _features_per_second, is_floor=True, unit=" features/s"),
    _on_gpu(
        "BERT-large, dense, packed",
        1150,
        _features_per_second,
        workload="squad-large",
        is_floor=True,
        unit=" features/s",
    ),
    _on_gpu("masks over dense", 1.02, _cost("mask")),
    _on_gpu("cached teacher over dense", 1.02, _cost("kd_cached")),
    _on_gpu("quantization, ranges followed, over dense", 1.25, _cost("qat_observing")),
    _on_gpu("quantization, ranges fixed, over dense", 1.15, _cost("qat_frozen")),
    _on_gpu("the 13 epochs of the recipe, BERT-base, all of SQuAD (projected)", 7.5, recipe_minutes, unit=" min"),
    _on_gpu("whole recipe against SparseML's way (B2)", 8, _speedup("recipe", "b2"), is_floor=True),
    _on_gpu(
        "whole recipe against Hugging Face's with a live teacher", 2.5, _speedup("recipe", "b1_teacher"), is_floor=True
    ),
    _on_gpu("host syncs in a step", 0, _host_syncs, unit=""),
)


@dataclass(frozen=True)
class Verdict:
    """A bar beside what was measured."""

    bar: Bar
    value: float | None

    @property
    def status(self) -> str:
        """met, missed, or not measured yet."""
        return self.bar.status(self.value)


def verdicts(documents: Sequence[Document]) -> list[Verdict]:
    """Every bar with the value of the first document that has one."""
    found = []
    for bar in BARS:
        values = (bar.value(document) for document in documents if bar.reads(document))
        found.append(Verdict(bar, next((value for value in values if value is not None), None)))
    return found
