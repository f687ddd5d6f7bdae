"""Exact match and F1 of SQuAD v1.1 and v2.0, as the official evaluators count them; no network."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Reference:
    """The accepted answers of one question; none means unanswerable."""

    id: str
    answers: Sequence[str]


# Room for the answers of SQuAD's training set: they are the same in every evaluation, and many predictions are, too.
@lru_cache(maxsize=1 << 17)
def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and surplus white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def word_f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Harmonic mean of the precision and recall of words, as bags; 0.0 when they share none, or have none."""
    remaining = Counter(wanted)
    shared = 0
    for word in predicted:
        if remaining.get(word):
            remaining[word] -= 1
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def squad_v1(predictions: Mapping[str, str], references: Sequence[Reference]) -> dict[str, float]:
    """`exact_match` and `f1` in percent of all questions: for each the best over its answers, 0 without a prediction.

    Predictions for other questions are ignored. Raises ValueError for a question without an answer.
    """
    exact = f1 = 0.0
    for reference in references:
        if not reference.answers:
            raise ValueError(f"question {reference.id!r} has no answer; version 2 of the metric is for such data")
        if reference.id in predictions:
            prediction = normalize_answer(predictions[reference.id])
            same, words = _best(prediction, map(normalize_answer, reference.answers))
            exact += same
            # A text without words has none right, also where the answer has none.
            f1 += words if prediction else 0.0
    return {"exact_match": 100.0 * exact / len(references), "f1": 100.0 * f1 / len(references)}


def squad_v2(
    predictions: Mapping[str, str],
    references: Sequence[Reference],
    no_answer_probabilities: Mapping[str, float] | None = None,
    no_answer_threshold: float = 1.0,
) -> dict[str, float]:
    """The figures of version 2, in percent.

    exact, f1 and total; the same of answerable (HasAns_) and unanswerable (NoAns_) questions where there are any; and
    the best that any threshold on the probability of "no answer" would give, with that threshold (best_).

    A prediction of "" says that there is no answer; so does a probability above `no_answer_threshold` (probabilities
    are 0 unless given). A question without a prediction scores 0.
    """
    probabilities = {reference.id: 0.0 for reference in references} | dict(no_answer_probabilities or {})
    # Answerable is what has an answer at all; answers that normalize to nothing ("the") still count as "".
    answerable = {reference.id: bool(reference.answers) for reference in references}
    raw: dict[str, dict[str, float]] = {"exact": {}, "f1": {}}
    for reference in references:
        answers = [answer for answer in map(normalize_answer, reference.answers) if answer] or [""]
        prediction = predictions.get(reference.id)
        same, words = (0.0, 0.0) if prediction is None else _best(normalize_answer(prediction), answers)
        raw["exact"][reference.id], raw["f1"][reference.id] = same, words

    thresholded = {
        name: {
            key: float(not answerable[key])
            if key in predictions and probabilities[key] > no_answer_threshold
            else score
            for key, score in scores.items()
        }
        for name, scores in raw.items()
    }
    metrics = _shares(thresholded, list(answerable), "")
    for prefix, wanted in (("HasAns_", True), ("NoAns_", False)):
        keys = [key for key, has_answer in answerable.items() if has_answer is wanted]
        if keys:
            metrics |= _shares(thresholded, keys, prefix)
    for name, scores in raw.items():
        best, threshold = _best_threshold(predictions, scores, probabilities, answerable)
        metrics |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return metrics


def _best(prediction: str, answers: Iterable[str]) -> tuple[float, float]:
    """Exact match and F1 with the best of the answers, all of them normalized; two texts without a word are the same."""
    different = set(answers)
    if prediction in different:
        return 1.0, 1.0
    words = prediction.split()
    return 0.0, max(word_f1(words, answer.split()) for answer in different)


def _shares(scores: Mapping[str, Mapping[str, float]], keys: Sequence[str], prefix: str) -> dict[str, float]:
    percent = {
        f"{prefix}{name}": 100.0 * sum(values[key] for key in keys) / len(keys) for name, values in scores.items()
    }
    return {**percent, f"{prefix}total": len(keys)}


def _best_threshold(
    predictions: Mapping[str, str],
    scores: Mapping[str, float],
    probabilities: Mapping[str, float],
    answerable: Mapping[str, bool],
) -> tuple[float, float]:
    """The best percentage and its threshold: answer nothing at first, then question by question, surest first."""
    current = best = float(sum(not has_answer for has_answer in answerable.values()))
    threshold = 0.0
    for key in sorted(answerable, key=lambda key: probabilities[key]):
        if answerable[key]:
            current += scores[key]
        elif predictions.get(key):
            current -= 1
        if current > best:
            best, threshold = current, probabilities[key]
    return 100.0 * best / len(answerable), threshold
