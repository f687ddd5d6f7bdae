"""What Hugging Face's question-answering example does around the model, written anew for comparison.

The behaviour, the order of the work and the way that rows are read are those of `run_qa.py` and of
`postprocess_qa_predictions` in `utils_qa.py` (huggingface/transformers, examples/pytorch/question-answering; Apache-2.0, as
this file is). Left out, because they are not the search: progress bars, log lines and the writing of files.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# What the example's trainer fills shorter rows of logits with when it joins batches.
PADDING = -100.0


def validation_features(tokenizer: Any, max_length: int, stride: int) -> Callable[[dict[str, list[Any]]], Any]:
    """The function that the example gives to `datasets.map(batched=True)`: rows to windows with offsets and ids."""
    question_first = tokenizer.padding_side == "right"

    def windows(rows: dict[str, list[Any]]) -> Any:
        rows["question"] = [question.lstrip() for question in rows["question"]]
        encoded = tokenizer(
            rows["question" if question_first else "context"],
            rows["context" if question_first else "question"],
            truncation="only_second" if question_first else "only_first",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=False,
        )
        sources = encoded.pop("overflow_to_sample_mapping")
        encoded["example_id"] = []
        for window in range(len(encoded["input_ids"])):
            owners = encoded.sequence_ids(window)
            of_context = 1 if question_first else 0
            encoded["example_id"].append(rows["id"][sources[window]])
            encoded["offset_mapping"][window] = [
                (span if owners[position] == of_context else None)
                for position, span in enumerate(encoded["offset_mapping"][window])
            ]
        return encoded

    return windows


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[N, S]: logits of all windows as the example's trainer hands them over."""
    found = np.full((len(rows), max(map(len, rows))), PADDING, np.float32)
    for place, row in zip(found, rows, strict=True):
        place[: len(row)] = row
    return found


def postprocess(
    examples: Any,
    features: Any,
    logits: tuple[np.ndarray, np.ndarray],
    version_2: bool = False,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    threshold: float = 0.0,
) -> tuple[dict[str, str], dict[str, list[dict[str, Any]]], dict[str, float]]:
    """Answers, candidates and odds of "no answer" by id.

    `examples` and `features` are read as the example reads them: row by row, and by the column `id`.
    """
    all_starts, all_ends = logits
    number_of = {name: number for number, name in enumerate(examples["id"])}
    windows_of = collections.defaultdict(list)
    for window, feature in enumerate(features):
        windows_of[number_of[feature["example_id"]]].append(window)

    answers: dict[str, str] = {}
    lists: dict[str, list[dict[str, Any]]] = {}
    odds: dict[str, float] = {}
    for number, example in enumerate(examples):
        nothing: dict[str, Any] | None = None
        found: list[dict[str, Any]] = []
        for window in windows_of[number]:
            starts, ends = all_starts[window], all_ends[window]
            spans = features[window]["offset_mapping"]
            widest = features[window].get("token_is_max_context", None)
            null_score = starts[0] + ends[0]
            if nothing is None or nothing["score"] > null_score:
                nothing = {"offsets": (0, 0), "score": null_score, "start_logit": starts[0], "end_logit": ends[0]}
            best_starts = np.argsort(starts)[-1 : -n_best_size - 1 : -1].tolist()
            best_ends = np.argsort(ends)[-1 : -n_best_size - 1 : -1].tolist()
            for start in best_starts:
                for end in best_ends:
                    if start >= len(spans) or end >= len(spans) or spans[start] is None or spans[end] is None:
                        continue
                    if end < start or end - start + 1 > max_answer_length:
                        continue
                    if widest is not None and not widest.get(str(start), False):
                        continue
                    found.append(
                        {
                            "offsets": (spans[start][0], spans[end][1]),
                            "score": starts[start] + ends[end],
                            "start_logit": starts[start],
                            "end_logit": ends[end],
                        }
                    )
        if version_2:
            assert nothing is not None
            found.append(nothing)
        best = sorted(found, key=lambda entry: entry["score"], reverse=True)[:n_best_size]
        if version_2 and not any(entry["offsets"] == (0, 0) for entry in best):
            assert nothing is not None
            best.append(nothing)
        null_total = nothing["score"] if nothing is not None else 0.0
        for entry in best:
            first, last = entry.pop("offsets")
            entry["text"] = example["context"][first:last]
        if not best or (len(best) == 1 and best[0]["text"] == ""):
            best.insert(0, {"text": "empty", "start_logit": 0.0, "end_logit": 0.0, "score": 0.0})
        scores = np.array([entry.pop("score") for entry in best])
        powers = np.exp(scores - np.max(scores))
        for entry, probability in zip(best, powers / powers.sum(), strict=True):
            entry["probability"] = probability
        if not version_2:
            answers[example["id"]] = best[0]["text"]
        else:
            chosen = best[next(place for place, entry in enumerate(best) if entry["text"] != "")]
            difference = null_total - chosen["start_logit"] - chosen["end_logit"]
            odds[example["id"]] = float(difference)
            answers[example["id"]] = "" if difference > threshold else chosen["text"]
        lists[example["id"]] = [
            {
                key: float(value) if isinstance(value, np.float16 | np.float32 | np.float64) else value
                for key, value in entry.items()
            }
            for entry in best
        ]
    return answers, lists, odds
