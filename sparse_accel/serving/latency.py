"""Latency of several models side by side, measured in turns so that a noisy machine treats all of them alike."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np

from sparse_accel.errors import ModelError, OptionError, SparseAccelError, suggestion
from sparse_accel.serving.deployment import DEPLOYMENT_FILE
from sparse_accel.serving.engines import ENGINES, Engine, is_installed, model_file, num_cores

# Calls before anything counts: the first is thrown away, the others estimate how long one takes.
_WARM_UP_CALLS: Final = 3
_WARM_UP_SECONDS: Final = 1.0
# What one turn of a cell lasts, as near as whole calls come to it.
_TURN_SECONDS: Final = 0.1
_MOST_CALLS_IN_A_TURN: Final = 200
_FEWEST_ROUNDS: Final = 3
# The worker threads of ONNX Runtime go on spinning after a call, for some tens of milliseconds. On a machine of two cores
# that made the next engine's calls take twice as long.
_SPINNING_SECONDS: Final = 0.05
_LONGEST_REASON: Final = 300
_LENGTHS: Final = (128, 384)
# Token ids of a graph whose vocabulary nobody states.
_SMALL_VOCABULARY: Final = 100

# Engines of the benchmark: those that run a graph, and torch for folders that hold weights.
BENCHMARK_ENGINES: Final = (*ENGINES, "torch")
DEVICES: Final = ("cpu", "cuda")

# Called with what goes on, how many steps of it are done, and of how many.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Traits:
    """What of a model may have bought speed: int8 matrix products, and the share of zeros in their weights. Models of
    one `family` have the same architecture and sizes."""

    family: str
    int8: bool
    sparsity: float


@dataclass(frozen=True)
class Contender:
    """A model in the benchmark: its short name, its folder (or ONNX file), and its traits where they are known."""

    name: str
    folder: Path
    traits: Traits | None = None


@dataclass(frozen=True)
class Grid:
    """What is measured: every combination of these."""

    engines: tuple[str, ...]
    threads: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    sequence_lengths: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One combination: one row of the table."""

    model: str
    engine: str
    threads: int
    batch_size: int
    sequence_length: int

    @property
    def setting(self) -> tuple[str, int, int, int]:
        """All but the model: cells of one setting are compared with each other."""
        return self.engine, self.threads, self.batch_size, self.sequence_length


@dataclass(frozen=True)
class Timing:
    """Nanoseconds of each counted call of a cell, round by round."""

    cell: Cell
    rounds: tuple[tuple[int, ...], ...]

    @property
    def calls(self) -> int:
        """Calls that were counted."""
        return sum(map(len, self.rounds))

    def percentile(self, percent: float) -> float:
        """A percentile of the latency in milliseconds, interpolated linearly between calls."""
        return float(np.percentile(self._milliseconds(), percent, method="linear"))

    @property
    def throughput(self) -> float:
        """Sequences per second: batch size over the mean latency."""
        return 1000.0 * self.cell.batch_size / float(self._milliseconds().mean())

    def _milliseconds(self) -> np.ndarray:
        return np.array([call for calls in self.rounds for call in calls], np.float64) / 1e6


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured, and why."""

    cell: Cell
    reason: str


@dataclass(frozen=True)
class Measured:
    """All that a benchmark found, in the order of the grid: engine, threads, batch size, length, model."""

    timings: tuple[Timing, ...]
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as another a cell is, with the interval that holds the true value with 95 %."""

    value: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The order statistics that enclose the median of what `values` (one or more) were drawn from, with at least 95 %.

    Distribution-free: x_(k), x_(n+1-k) with the largest k for which P(Binomial(n, 1/2) < k) <= 2.5 %. Fewer than six
    values cannot promise as much: then it is their range.
    """
    ordered, count = sorted(values), len(values)
    outside, tail = 0, 1 / 2**count
    while tail <= 0.025:
        outside += 1
        tail += math.comb(count, outside) / 2**count
    rank = max(outside, 1)
    return ordered[rank - 1], ordered[-rank]


def speedup(timing: Timing, baseline: Timing) -> Speedup:
    """p50 of `baseline` over p50 of `timing`; the interval comes from the ratios within each round, where the two ran
    one shortly after the other. Both must have the same rounds, so be of one benchmark."""
    value = baseline.percentile(50) / timing.percentile(50)
    ratios = [
        float(np.median(theirs) / np.median(own)) for own, theirs in zip(timing.rounds, baseline.rounds, strict=True)
    ]
    low, high = median_interval(ratios)
    return Speedup(value, min(low, value), max(high, value))


def calls_in_a_turn(seconds: float) -> int:
    """How many calls of about `seconds` each make up a turn."""
    return max(1, min(_MOST_CALLS_IN_A_TURN, round(_TURN_SECONDS / max(seconds, 1e-9))))


def rounds_within(budget: float, turns: Sequence[float]) -> int:
    """How many rounds, of turns that last so many seconds each, fit the budget of seconds; never fewer than three."""
    return max(_FEWEST_ROUNDS, int(budget / sum(turns)))


def random_inputs(batch_size: int, sequence_length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Token ids drawn at random, nothing padded: int64 [batch_size, sequence_length] each."""
    shape = (batch_size, sequence_length)
    return {
        "input_ids": np.random.default_rng(0).integers(0, vocabulary, shape, np.int64),
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
    }


def measure(
    contenders: Sequence[Contender],
    grid: Grid,
    open_contender: Callable[[Contender, str, int], Engine],
    *,
    seconds: float = 3.0,
    rounds: int | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Time every contender in every setting of the grid.

    `open_contender` takes a contender, the name of an engine and a number of threads. All that runs with one number of
    threads is open at the same time and takes turns; every other round goes backwards, so that a steady drift cancels.
    A turn is one call that does not count, since the caches hold another model, and then some that do. `seconds` is
    how long each cell is called on average; `rounds` fixes the number of turns of a cell instead.

    What cannot be opened or run becomes a Failure; raises ModelError when nothing ran.
    """
    timed: dict[Cell, Timing] = {}
    failed: dict[Cell, str] = {}
    for threads in grid.threads:
        _measure_threads(contenders, grid, threads, open_contender, seconds, rounds, progress, timed, failed)
    if not timed:
        reasons = dict.fromkeys(f"{cell.model} with {cell.engine}: {reason}" for cell, reason in failed.items())
        raise ModelError("nothing could be measured:\n  " + "\n  ".join(reasons))
    order = [
        Cell(contender.name, *setting)
        for setting in product(grid.engines, grid.threads, grid.batch_sizes, grid.sequence_lengths)
        for contender in contenders
    ]
    return Measured(
        tuple(timed[cell] for cell in order if cell in timed),
        tuple(Failure(cell, failed[cell]) for cell in order if cell in failed),
    )


def _measure_threads(
    contenders: Sequence[Contender],
    grid: Grid,
    threads: int,
    open_contender: Callable[[Contender, str, int], Engine],
    seconds: float,
    rounds: int | None,
    progress: Progress | None,
    timed: dict[Cell, Timing],
    failed: dict[Cell, str],
) -> None:
    """The cells with one number of threads, into `timed` and `failed`; their engines are closed on return."""
    shapes = list(product(grid.batch_sizes, grid.sequence_lengths))
    calls: dict[Cell, Callable[[], object]] = {}
    estimates: dict[Cell, float] = {}
    what = f"{threads} thread{'s' * (threads > 1)}"
    pairs = list(product(contenders, grid.engines))
    for done, (contender, name) in enumerate(pairs):
        if progress is not None:
            progress(f"{what}: opening {contender.name} with {name}", done, len(pairs))
        cells = [Cell(contender.name, name, threads, *shape) for shape in shapes]
        try:
            engine = open_contender(contender, name, threads)
        except SparseAccelError as error:
            failed |= dict.fromkeys(cells, str(error))
            continue
        vocabulary = vocabulary_of(contender.folder)
        for cell in cells:
            call = _call(engine, random_inputs(cell.batch_size, cell.sequence_length, vocabulary))
            try:
                estimates[cell] = _warm_up(call)
            except Exception as error:  # each engine raises a family of its own
                failed[cell] = _reason(error)
            else:
                calls[cell] = call
    if not calls:
        return
    sizes = {cell: calls_in_a_turn(estimates[cell]) for cell in calls}
    if rounds is None:
        rounds = rounds_within(seconds * len(calls), [(1 + sizes[cell]) * estimates[cell] for cell in calls])
    times: dict[Cell, list[tuple[int, ...]]] = {cell: [] for cell in calls}
    for done, cell in enumerate(_turns(list(calls), rounds)):
        if progress is not None:
            progress(f"{what}: measuring", done, rounds * len(calls))
        if threads > 1:
            time.sleep(_SPINNING_SECONDS)
        times[cell].append(_turn(calls[cell], sizes[cell]))
    timed |= {cell: Timing(cell, tuple(of_cell)) for cell, of_cell in times.items()}


def _turns(cells: Sequence[Cell], rounds: int) -> Iterator[Cell]:
    for done in range(rounds):
        yield from (reversed(cells) if done % 2 else cells)


def _turn(call: Callable[[], object], size: int) -> tuple[int, ...]:
    call()
    times = []
    for _ in range(size):
        begin = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begin)
    return tuple(times)


def _call(engine: Engine, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
    return lambda: engine(inputs)


def _warm_up(call: Callable[[], object]) -> float:
    """Seconds that a call takes, once it is warm."""
    call()
    passed: list[float] = []
    while len(passed) < _WARM_UP_CALLS and sum(passed) < _WARM_UP_SECONDS:
        begin = time.perf_counter()
        call()
        passed.append(time.perf_counter() - begin)
    return sum(passed) / len(passed)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the graph wants an input {error}, which the benchmark does not make"
    return " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, or of the folder around an ONNX file; empty where there is none."""
    return _object(folder, "config.json")


def _object(folder: Path, name: str) -> dict[str, Any]:
    graph = model_file(folder)
    for home in (folder, *([] if graph is None else [graph.parent, graph.parent.parent])):
        with suppress(OSError, ValueError):
            content = json.loads((home / name).read_text("utf-8"))
            if isinstance(content, dict):
                return content
    return {}


def vocabulary_of(folder: Path) -> int:
    """How many token ids a model knows, by its config."""
    size = config_of(folder).get("vocab_size")
    return size if isinstance(size, int) else _SMALL_VOCABULARY


def family_of(folder: Path) -> str:
    """The architecture and its sizes, by the config; models of one family differ in their weights alone."""
    config = config_of(folder)
    keys = ("model_type", "num_hidden_layers", "n_layers", "hidden_size", "dim", "intermediate_size", "vocab_size")
    return " ".join(str(config[key]) for key in keys if key in config) or str(folder)


def graph_bytes(folder: Path) -> int | None:
    """Size of the ONNX file with what it keeps in files beside it; None where there is no graph."""
    graph = model_file(folder)
    return None if graph is None else sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))


def short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: `deployment` alone, else `a/deployment`, `b/deployment`.
    Raises OptionError for a folder that is named twice."""
    parts = [folder.absolute().parts for folder in folders]
    for index, own in enumerate(parts):
        if own in parts[:index]:
            raise OptionError(f"{folders[index]} is named twice")
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next(size for size in range(1, len(own) + 1) if all(other[-size:] != own[-size:] for other in others))
        names.append("/".join(own[-length:]))
    return names


def check_grid(grid: Grid, folders: Sequence[Path]) -> None:
    """Raise OptionError for engines that are unknown, not installed or named twice, numbers below 1, and sequences that
    are longer than a model's positions; ModelError for a folder that is not there."""
    for engine in grid.engines:
        if engine not in BENCHMARK_ENGINES:
            raise OptionError(f"--engine: there is no engine {engine!r}{suggestion(engine, BENCHMARK_ENGINES)}")
        if not is_installed(engine):
            raise OptionError(f"--engine: {engine} is not installed; run `python -m pip install {engine}`")
    for option, values in (
        ("--engine", grid.engines),
        ("--threads", grid.threads),
        ("--batch_size", grid.batch_sizes),
        ("--sequence_length", grid.sequence_lengths),
    ):
        if len({*values}) < len(values):
            raise OptionError(f"{option}: names a value twice: {','.join(map(str, values))}")
        low = [value for value in values if isinstance(value, int) and value < 1]
        if low:
            raise OptionError(f"{option}: 1 or more, got {low[0]}")
    for folder in folders:
        if not folder.exists():
            raise ModelError(f"{folder}: there is no such folder or file")
        limit = max_positions_of(folder)
        long = [length for length in grid.sequence_lengths if limit is not None and length > limit]
        if long:
            raise OptionError(f"--sequence_length {long[0]}: {folder} reads sequences of at most {limit}")


def default_lengths(folders: Sequence[Path]) -> tuple[int, ...]:
    """128 and 384 tokens, as far as all the models read them; the one length of a graph with a fixed shape."""
    fixed = [
        length for folder in folders for length in [_object(folder, DEPLOYMENT_FILE).get("sequence_length")] if length
    ]
    if fixed:
        return (fixed[0],)
    limits = [limit for folder in folders for limit in [max_positions_of(folder)] if limit is not None]
    shortest = min(limits, default=max(_LENGTHS))
    return tuple(length for length in _LENGTHS if length <= shortest) or (shortest,)


def max_positions_of(folder: Path) -> int | None:
    """The longest sequence that a model can read, by its config; None where it does not say."""
    config = config_of(folder)
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    # RoBERTa's kind starts counting positions behind its padding index.
    behind_padding = config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return positions - (config.get("pad_token_id") or 0) - 1 if behind_padding else positions


def installed_engines() -> tuple[str, ...]:
    """The engines that run a graph and are there."""
    return tuple(name for name in ENGINES if is_installed(name))


def machine_facts(engines: Sequence[str]) -> dict[str, Any]:
    """What of this machine decides about latency: the processor, its cores and instructions, how busy it is, and the
    versions of what runs here."""
    name, flags = _processor()
    versions = {}
    for package in ("sparse_accel", "numpy", *engines):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "processor": name,
        "cores": num_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "avx2": "avx2" in flags,
        "avx512": "avx512f" in flags,
        "vnni": bool(flags & {"avx512_vnni", "avx_vnni"}),
        "bf16": "avx512_bf16" in flags,
        "amx": "amx_int8" in flags,
        "busy_cores_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **versions},
    }


def _processor() -> tuple[str, set[str]]:
    """Name and instruction flags of the processor; Linux states them in a file."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text("utf-8")
    found = {key: re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE) for key in ("model name", "flags")}
    name, flags = found["model name"], found["flags"]
    return (
        name.group(1).strip() if name else platform.processor() or platform.machine(),
        set(flags.group(1).split()) if flags else set(),
    )
