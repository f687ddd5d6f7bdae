"""What question answering costs around the model: windows, answers and scores, against Hugging Face's example.

Logits are random with a peak, as a trained model's are, so no model runs. The arms take turns in one process, every other
round backwards. Before anything is timed, every arm has to give the same windows and answers as the others, for versions
1 and 2. Seconds are those of the wall and of all processor time, that of worker processes included; on a busy machine
the second says more.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from sparse_accel.benchmarking import circumstances
from sparse_accel.benchmarking import hf_question_answering as hf
from sparse_accel.benchmarking.eval_data import MAX_LENGTH, STRIDE, NamedTokenizer, Row, World, make_world, map_windows
from sparse_accel.benchmarking.turns import Progress
from sparse_accel.errors import InvariantError
from sparse_accel.tasks.features import load_features, save_features
from sparse_accel.tasks.qa_postprocess import Answers, postprocess
from sparse_accel.tasks.qa_windows import cut_windows, window_spec
from sparse_accel.tasks.squad_metrics import Reference, normalize_answer, squad_v1

FORMAT: Final = 1
Work = Callable[[], Any]

# Arm -> what it is.
WHAT: Final[Mapping[str, str]] = {
    "answers, HF, Dataset": "answers and candidates from logits by Hugging Face's example, which reads tables on disk",
    "answers, HF, list": "the same over rows in memory",
    "answers": "our answers; candidates are made when they are read",
    "answers and candidates": "our answers, and the candidates of each question",
    "windows, HF": "tokenized windows by Hugging Face's example, with datasets.map",
    "windows": "our windows, written to a file",
    "windows by 2, HF": "windows, HF, by two processes",
    "windows by 2": "windows, by two processes",
    "windows, cached": "our windows, read from that file",
    "scores, first pass": "our exact match and F1",
    "scores, later passes": "the same when the texts were seen before, as in every evaluation but the first",
}

# Which arm those of a group are compared with.
BASELINES: Final[Mapping[str, str]] = {
    "answers": "answers, HF, Dataset",
    "windows": "windows, HF",
    "windows by 2": "windows by 2, HF",
    "scores": "scores, first pass",
}


def run_evaluation(
    command: str, rounds: int, questions: int | None, data: Path | None, progress: Progress | None = None
) -> dict[str, Any]:
    """`measure`, and where it was measured: plain values. Raises what `measure` raises."""
    machine = circumstances.machine(torch.device("cpu"))
    del machine["threads"]  # torch's, and nothing here computes with torch
    found = measure(rounds, questions, data, progress=progress)
    return {
        "format": FORMAT,
        "command": command,
        "versions": circumstances.versions(),
        "machine": {**machine, "busy_cores_after": circumstances.busy_cores()},
        **found,
    }


def measure(
    rounds: int,
    questions: int | None = None,
    data: Path | None = None,
    tokenizer: NamedTokenizer | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time all arms `rounds` times on the first `questions` of the data: samples, medians, extremes and ratios.

    Raises InvariantError when the arms give different windows or answers, DataError for data that cannot be read.
    """
    say: Progress = progress or (lambda what, done, total: None)
    with tempfile.TemporaryDirectory(prefix="sparse_accel-") as folder, _one_thread_per_tokenizer():
        say("cutting windows", 0, 0)
        world = make_world(Path(folder), questions, data, tokenizer)
        say("comparing windows and answers", 0, 0)
        parity = check_same(world)
        samples = _take_turns(make_arms(world), rounds, say)
    return {
        "workload": "eval-qa",
        "data": "SQuAD dev-v1.1" if data is not None else "synthetic passages",
        "tokenizer": world.tokenizer.name,
        "questions": len(world.rows),
        "windows": len(world.features),
        "max_length": MAX_LENGTH,
        "stride": STRIDE,
        "rounds": rounds,
        "method": "arms took turns in one process, every other round backwards; times_as_fast are ratios within a round",
        "parity": parity,
        "arms": _summary(samples, len(world.rows)),
    }


@contextlib.contextmanager
def _one_thread_per_tokenizer() -> Iterator[None]:
    """The library would use all cores: here, one for each process, whatever is measured."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def make_arms(world: World) -> dict[str, Work]:
    """What is timed, by the names of WHAT."""
    tokenizer = world.tokenizer.tokenizer
    spec = window_spec(tokenizer, max_length=MAX_LENGTH, stride=STRIDE, labels=False)
    cached = world.folder / "features.npz"
    save_features(cached, world.features)
    feature_rows, example_rows = list(world.features_table), _Rows(world.examples_table)
    references = [Reference(example.id, example.answer_texts) for example in world.examples]
    predictions = _answers(world).predictions

    def cut(num_workers: int | None) -> None:
        save_features(world.folder / "cut.npz", cut_windows(world.questions, spec, num_workers).features)

    def first_scores() -> dict[str, float]:
        normalize_answer.cache_clear()
        return squad_v1(predictions, references)

    return {
        "answers, HF, Dataset": lambda: hf.postprocess(world.examples_table, world.features_table, world.padded),
        "answers, HF, list": lambda: hf.postprocess(example_rows, feature_rows, world.padded),
        "answers": lambda: _answers(world),
        "answers and candidates": lambda: _answers(world).nbest,
        "windows, HF": lambda: map_windows(world.examples_table, tokenizer, None),
        "windows": lambda: cut(None),
        "windows by 2, HF": lambda: map_windows(world.examples_table, tokenizer, 2),
        "windows by 2": lambda: cut(2),
        "windows, cached": lambda: load_features(cached),
        "scores, first pass": first_scores,
        "scores, later passes": lambda: squad_v1(predictions, references),
    }


class _Rows(list[Row]):
    """Rows in memory that also give a column by its name, as a table does."""

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def _answers(world: World, version_2: bool = False) -> Answers:
    return postprocess(world.examples, world.features, world.starts, world.ends, version_2_with_negative=version_2)


def check_same(world: World) -> dict[str, Any]:
    """Raise InvariantError unless both ways give the same windows, answers, candidates and odds; what was compared."""
    if len(world.features_table) != len(world.features):
        raise _different(f"{len(world.features_table)} windows of HF's way, {len(world.features)} of ours")
    for index, theirs in enumerate(world.features_table):
        first, last = (world.features.facts[f"context_{side}"][index] for side in ("start", "end"))
        spans = world.features.extra_of(index, "offsets")[first:last].tolist()
        same = (
            theirs["input_ids"] == world.features[index]["input_ids"].tolist()
            and theirs["example_id"] == world.examples[world.features.facts["example"][index]].id
            and theirs["offset_mapping"][first:last] == spans
            and sum(span is not None for span in theirs["offset_mapping"]) == last - first
        )
        if not same:
            raise _different(f"window {index} differs")
    feature_rows, example_rows = list(world.features_table), _Rows(world.examples_table)
    for version_2 in (False, True):
        answers, lists, odds = hf.postprocess(example_rows, feature_rows, world.padded, version_2)
        ours = _answers(world, version_2)
        compared: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...] = (
            ("answers", answers, ours.predictions),
            ("candidates", lists, ours.nbest),
            ("odds", odds, ours.null_odds or {}),
        )
        for what, found, own in compared:
            different = [name for name in found if found[name] != own.get(name)]
            if different or len(found) != len(own):
                raise _different(f"version {1 + version_2}: {what} differ for {len(different)}, as {different[:3]}")
    return {"windows": len(world.features), "answers": len(world.rows), "versions": [1, 2], "different": 0}


def _different(what: str) -> InvariantError:
    return InvariantError(f"evaluation is not what Hugging Face's example does, so nothing was measured: {what}")


def _take_turns(arms: Mapping[str, Work], rounds: int, progress: Progress) -> dict[str, dict[str, list[float]]]:
    """Seconds of each arm in each round."""
    seconds: dict[str, dict[str, list[float]]] = {arm: {"cpu": [], "wall": []} for arm in arms}
    done = 0
    for number in range(rounds):
        for arm in arms if number % 2 == 0 else reversed(list(arms)):
            progress(f"round {number + 1}, {arm}", done, rounds * len(arms))
            cpu, wall = _processor_seconds(), time.perf_counter()
            arms[arm]()
            seconds[arm]["wall"].append(round(time.perf_counter() - wall, 5))
            seconds[arm]["cpu"].append(round(_processor_seconds() - cpu, 5))
            done += 1
    return seconds


def _processor_seconds() -> float:
    """Of this process, and of its children that have ended; os.times() would count in hundredths."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def _summary(samples: dict[str, dict[str, list[float]]], questions: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for arm, clocks in samples.items():
        baseline = baseline_of(arm)
        found[arm] = {
            "what": WHAT[arm],
            **{clock: {**_spread(values), "samples": values} for clock, values in clocks.items()},
            "questions_per_processor_second": round(questions / statistics.median(clocks["cpu"]), 1),
            "compared_with": baseline,
            "times_as_fast": {
                clock: _spread([other / own for own, other in zip(values, samples[baseline][clock], strict=True)])
                for clock, values in clocks.items()
            },
        }
    return found


def baseline_of(arm: str) -> str:
    """The arm that one is compared with."""
    return BASELINES[arm.partition(",")[0].partition(" and ")[0]]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        name: round(function(values), 5)
        for name, function in (("median", statistics.median), ("min", min), ("max", max))
    }
