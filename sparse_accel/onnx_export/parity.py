"""Compares an exported graph with the model that it was made from, on real tokens, and says whether that is good enough."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from sparse_accel.compress.layers import CompressedLinear
from sparse_accel.serving.engines import Engine, TorchEngine

# Outputs with one number a token that say together where an answer lies.
SPAN_KEYS: Final = ("start_logits", "end_logits")
# Tokens of the longest answer: what the search for answers uses by default.
MAX_ANSWER_LENGTH: Final = 30
# An export may differ by this much more than the model differs from itself: a runtime rounds its own way in every layer. A
# model of six layers after six steps of training came to 1.9 times what it differs from itself and from torch in float64.
_NOISE_MARGIN: Final = 2.5
# How often that is tried; of six tries on that model the largest was 1.6 times the smallest.
_NUDGES: Final = 3
# Relative change of the embeddings for `rounding_noise`: about what float32 sums lose by their order. On six layers
# trained on SQuAD it moved the logits as far as computing them in float64 did; with 1e-7 no value crossed a step.
_NUDGE: Final = 1e-6
# A model that was not trained may give every token nearly the same number. Differences are then measured against this
# share of the numbers themselves, since rounding in float32 grows with them.
_LEAST_SPREAD: Final = 0.01
# Numbers of one feature that are kept for the comparison; only scores of a vocabulary for every token are more.
_MOST_VALUES: Final = 1 << 18


@dataclass(frozen=True)
class Tolerances:
    """What an export is allowed.

    `mean` and `p99` are differences as shares of the spread (standard deviation) of the reference's logits, `agreement`
    the share of predictions that are the same. The largest single difference decides nothing: the two
    sides round in different orders, and one step of one quantizer early in the model is enough to move one logit far.
    """

    mean: float
    p99: float
    agreement: float

    def allowing(self, noise: Difference) -> Tolerances:
        """At least 2.5 times the model's own `rounding_noise`, where that is more than these."""
        return replace(
            self, mean=max(self.mean, _NOISE_MARGIN * noise.mean), p99=max(self.p99, _NOISE_MARGIN * noise.p99)
        )


# Two float graphs differ by the order of their sums.
FLOAT_TOLERANCES: Final = Tolerances(mean=1e-4, p99=1e-4, agreement=1.0)
# Where float sums differ in the last bit, a value halfway between two steps of a quantizer may take the other one, and
# each such step changes what comes behind it. Models of two layers stay far below these; one of six (384 wide, 80% zeros,
# trained on SQuAD) came to 1.8% and 10% from its ONNX Runtime graph, and to 1.9% and 10% from torch in float64. For
# such models `rounding_noise` says what no export can be better than.
INT8_TOLERANCES: Final = Tolerances(mean=0.02, p99=0.10, agreement=0.95)


@dataclass(frozen=True)
class Difference:
    """How far the outputs for some features lie apart, over real tokens alone.

    `max_abs`, `mean_abs` and `p99_abs` are in units of the logits, `spread` is the standard deviation of the
    reference's logits. Of `num_predictions`, one for a feature or one for each of its tokens, `num_same` are the same and
    `num_ties` others that the reference itself scores as high, within what p99 leaves open. `num_broken` values are not
    finite on either side.
    """

    num_features: int
    num_predictions: int
    num_values: int
    num_broken: int
    spread: float
    max_abs: float
    mean_abs: float
    p99_abs: float
    num_same: int
    num_ties: int

    @property
    def mean(self) -> float:
        """The mean difference as a share of the spread."""
        return self.mean_abs / self.spread

    @property
    def p99(self) -> float:
        """The 99th percentile of the differences as a share of the spread."""
        return self.p99_abs / self.spread

    @property
    def max(self) -> float:
        """The largest difference as a share of the spread."""
        return self.max_abs / self.spread

    @property
    def agreement(self) -> float:
        """The share of predictions that are the same, or as good to the reference."""
        return (self.num_same + self.num_ties) / self.num_predictions

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values; None for one that is not finite, which JSON has no word for."""
        relative = {"mean": self.mean, "p99": self.p99, "max": self.max, "agreement": self.agreement}
        return {name: value if math.isfinite(value) else None for name, value in {**asdict(self), **relative}.items()}


@dataclass(frozen=True)
class ShapeDifference:
    """The batches of one shape."""

    batch: int
    length: int
    difference: Difference


@dataclass(frozen=True)
class Parity:
    """What two engines gave for the same batches: in all, and by shape in the order in which shapes first came."""

    reference: str
    exported: str
    total: Difference
    shapes: tuple[ShapeDifference, ...]

    def failures(self, tolerances: Tolerances) -> list[str]:
        """A sentence for each tolerance that is exceeded; empty when the export is good."""
        total, sentences = self.total, []
        if total.num_broken:
            sentences.append(
                f"{total.num_broken} of {total.num_values} logits are infinite or not a number on one side or the other"
            )
        # Written so that a NaN fails too.
        if not total.mean <= tolerances.mean:
            sentences.append(
                f"the mean difference between {self.exported} and {self.reference} is {total.mean_abs:.3g}, "
                f"{total.mean:.2%} of the logits' spread {total.spread:.3g}; {tolerances.mean:.2%} is allowed"
            )
        if not total.p99 <= tolerances.p99:
            sentences.append(
                f"1 in 100 logits differs between {self.exported} and {self.reference} by {total.p99_abs:.3g} or more, "
                f"{total.p99:.2%} of their spread {total.spread:.3g}; {tolerances.p99:.2%} is allowed"
            )
        if not total.agreement >= tolerances.agreement:
            same = total.num_same + total.num_ties
            what = "features" if total.num_predictions == total.num_features else "tokens"
            sentences.append(
                f"{self.exported} and {self.reference} predict the same for {same} of {total.num_predictions} {what}, "
                f"{total.agreement:.1%}; at least {tolerances.agreement:.1%} is wanted"
            )
        return sentences

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "reference": self.reference,
            "exported": self.exported,
            "total": self.total.to_json(),
            "shapes": [
                {"batch": shape.batch, "length": shape.length, **shape.difference.to_json()} for shape in self.shapes
            ],
        }


@dataclass(frozen=True)
class _Feature:
    """One feature's real tokens on both sides: name -> [T], [T, C] or [C] float64."""

    reference: dict[str, np.ndarray]
    exported: dict[str, np.ndarray]


def compare(
    reference: Engine, exported: Engine, batches: Sequence[Mapping[str, np.ndarray]], output_keys: Sequence[str]
) -> Parity:
    """Run both engines on `batches` (int64 [B, S] arrays, `attention_mask` among them) and compare what they give.

    Outputs `start_logits` and `end_logits` are compared by the best span, other outputs by their highest class: of each
    token where they are [B, S, C] (some tokens of a feature, where C is a vocabulary), of each feature where they are [B, C].
    Padding takes no part. Raises ValueError
    without batches and KeyError when an engine lacks an output.
    """
    if not batches:
        raise ValueError("there is nothing to compare: no batches")
    by_shape: dict[tuple[int, int], list[_Feature]] = {}
    with _weights_rounded_once(reference), _weights_rounded_once(exported):
        for batch in batches:
            shape = batch["attention_mask"].shape
            by_shape.setdefault((shape[0], shape[1]), []).extend(
                _features(reference(batch), exported(batch), batch["attention_mask"].astype(bool), output_keys)
            )
    everything = [feature for features in by_shape.values() for feature in features]
    total = _difference(everything)
    shapes = [
        ShapeDifference(batch, length, _difference(features, total.p99_abs))
        for (batch, length), features in by_shape.items()
    ]
    return Parity(reference.name, exported.name, total, tuple(shapes))


@contextmanager
def _weights_rounded_once(engine: Engine) -> Iterator[None]:
    """Within, a torch model computes its masked and fake-quantized weights once instead of in every forward, which takes
    seconds for a large model. They are the same: it is in eval mode and its quantizers are frozen."""
    layers: list[CompressedLinear] = []
    if isinstance(engine, TorchEngine):
        layers = [module for module in engine.model.modules() if isinstance(module, CompressedLinear)]
    with torch.inference_mode():
        for layer in layers:
            layer.__dict__["effective_weight"] = partial(_same, layer.effective_weight())
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("effective_weight", None)


def _same(weight: Tensor) -> Tensor:
    return weight


def rounding_noise(model: Any, batches: Sequence[Mapping[str, np.ndarray]], output_keys: Sequence[str]) -> Difference:
    """How far a torch model with quantizers differs from itself when its token embeddings change by 1 in a million.

    Values that lay halfway between two steps then round the other way, as they do in any runtime that sums in another
    order: no export of this model is closer than about this. Of several such changes, the one that moves the outputs most.
    Slow: four forwards of every batch.
    """
    generator = torch.Generator().manual_seed(0)

    def nudged(module: Any, inputs: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return output * (1 + _NUDGE * noise)

    engine = TorchEngine(model, tuple(output_keys), next(model.parameters()).device.type)
    tries: list[list[_Feature]] = [[] for _ in range(_NUDGES)]
    with _weights_rounded_once(engine):
        for batch in batches:
            plain = engine(batch)
            hook = model.get_input_embeddings().register_forward_hook(nudged)
            try:
                for features in tries:
                    features.extend(_features(plain, engine(batch), batch["attention_mask"].astype(bool), output_keys))
            finally:
                hook.remove()
    return max(map(_difference, tries), key=lambda found: found.mean)


def _features(
    reference: Mapping[str, np.ndarray], exported: Mapping[str, np.ndarray], tokens: np.ndarray, keys: Sequence[str]
) -> list[_Feature]:
    def of_row(outputs: Mapping[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
        return {
            key: (
                outputs[key][row][_compared(tokens[row], outputs[key])]
                if _has_tokens(key, outputs[key])
                else outputs[key][row]
            ).astype(np.float64)
            for key in keys
        }

    return [_Feature(of_row(reference, row), of_row(exported, row)) for row in range(len(tokens))]


def _compared(tokens: np.ndarray, output: np.ndarray) -> np.ndarray:
    """The places of a feature that are compared: its tokens, bool [S], or, where each has the scores of a whole vocabulary, as
    many of them as memory allows, equally far apart."""
    places = np.flatnonzero(tokens)
    most = max(1, _MOST_VALUES // output.shape[-1]) if output.ndim == 3 else len(places)
    if len(places) <= most:
        return places
    return places[np.linspace(0, len(places) - 1, most).round().astype(np.int64)]


def _has_tokens(key: str, output: np.ndarray) -> bool:
    return key in SPAN_KEYS or output.ndim == 3


def _difference(features: Sequence[_Feature], tie_error: float | None = None) -> Difference:
    """All numbers about some features. Predictions are ties within `tie_error`, by default the features' own p99."""
    distances, centred, highest, num_values = [], [], 0.0, 0
    for key in features[0].reference:
        expected = np.concatenate([feature.reference[key].ravel() for feature in features])
        given = np.concatenate([feature.exported[key].ravel() for feature in features])
        num_values += len(expected)
        finite = np.isfinite(expected) & np.isfinite(given)
        if finite.any():
            expected, given = expected[finite], given[finite]
            distances.append(np.abs(expected - given))
            # Each output about its own mean: that starts score higher than ends says nothing about differences.
            centred.append(expected - expected.mean())
            highest = max(highest, float(np.abs(expected).max()))
    far = np.concatenate(distances) if distances else np.array([math.inf])
    spread = float(np.concatenate(centred).std()) if centred else 0.0
    p99 = float(np.percentile(far, 99)) if distances else math.inf
    error = p99 if tie_error is None else tie_error
    verdicts = [verdict for feature in features for verdict in _verdicts(feature, error)]
    return Difference(
        num_features=len(features),
        num_predictions=len(verdicts),
        num_values=num_values,
        num_broken=num_values - sum(map(len, distances)),
        spread=max(spread, _LEAST_SPREAD * highest, float(np.finfo(np.float32).tiny)),
        max_abs=float(far.max()),
        mean_abs=float(far.mean()),
        p99_abs=p99,
        num_same=verdicts.count("same"),
        num_ties=verdicts.count("tie"),
    )


def _verdicts(feature: _Feature, error: float) -> list[str]:
    """`same`, `tie` or `other` for each prediction: how the one from the exported logits stands to the reference's own."""
    if set(SPAN_KEYS) <= feature.reference.keys():
        if not all(np.isfinite(values).all() for values in (*feature.reference.values(), *feature.exported.values())):
            return ["other"]
        start, end = SPAN_KEYS
        scores = span_scores(feature.reference[start], feature.reference[end])
        choice = span_scores(feature.exported[start], feature.exported[end]).argmax()
        # The score of a span is the sum of two logits, each of which may be off by the error.
        return [_against(scores.ravel(), int(choice), 2 * error)]
    return [
        _against(wanted, int(given.argmax()), error)
        if np.isfinite(wanted).all() and np.isfinite(given).all()
        else "other"
        for key in feature.reference
        for wanted, given in zip(
            np.atleast_2d(feature.reference[key]), np.atleast_2d(feature.exported[key]), strict=True
        )
    ]


def _against(scores: np.ndarray, choice: int, error: float) -> str:
    if choice == scores.argmax():
        return "same"
    return "tie" if scores[choice] >= scores.max() - error else "other"


def span_scores(start: np.ndarray, end: np.ndarray, max_length: int = MAX_ANSWER_LENGTH) -> np.ndarray:
    """[T, min(max_length, T)] from [T] and [T]: start[i] + end[i + n], the score of the span of n + 1 tokens from i on;
    -inf for spans that leave the tokens."""
    width = min(max_length, len(end))
    padded = np.concatenate([end, np.full(width - 1, -np.inf)])
    scores: np.ndarray = start[:, None] + np.lib.stride_tricks.sliding_window_view(padded, width)
    return scores
