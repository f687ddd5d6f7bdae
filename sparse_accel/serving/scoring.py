"""Scores a deployment or model folder on a data set, with the windows and metrics of training."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparse_accel.errors import OutputError
from sparse_accel.serving.deployment import Facts, Opened, open_deployment
from sparse_accel.serving.predicting import OnBatch, check_batch_size, check_engine, run_features
from sparse_accel.tasks import resolve_task
from sparse_accel.tasks.base import Scored, Task, write_predictions
from sparse_accel.tasks.data_settings import DataSettings
from sparse_accel.tasks.files import write_json


@dataclass(frozen=True)
class ScoreOptions:
    """What to score on; names, defaults and meanings are those of training's options.

    None leaves a fact to the folder: each folder is then scored the way it says that it is to be used.
    """

    validation_file: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    max_eval_samples: int | None = None
    max_seq_length: int | None = None
    doc_stride: int | None = None
    n_best_size: int | None = None
    max_answer_length: int | None = None
    version_2_with_negative: bool | None = None
    null_score_diff_threshold: float | None = None
    on_bad_rows: str = "error"
    cache_dir: str | None = None
    overwrite_cache: bool = False


@dataclass(frozen=True)
class FolderScore:
    """How one folder did. `seconds` is the model's time alone, over `num_features` windows; metrics are in percent;
    `notes` are sentences for the person."""

    folder: Path
    engine: str
    facts: Facts
    scored: Scored
    num_features: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def features_per_second(self) -> float:
        """Windows a second."""
        return self.num_features / self.seconds

    @property
    def results(self) -> dict[str, Any]:
        """What `eval_results.json` holds: training's keys, and what was scored with what."""
        return {
            "model": str(self.folder),
            "engine": self.engine,
            **{f"eval_{name}": value for name, value in self.scored.metrics.items()},
            "eval_samples": self.num_features,
            "eval_runtime": round(self.seconds, 4),
            "eval_samples_per_second": round(self.features_per_second, 3),
            "max_seq_length": self.facts.max_seq_length,
            "doc_stride": self.facts.doc_stride,
        }


def open_to_score(
    folder: str | Path, options: ScoreOptions, *, engine: str | None = None, threads: int | None = None
) -> Opened:
    """Open a folder by `engine` (onnxruntime, openvino or torch; left out: by what the folder holds), with the facts that
    `options` change. Raises OptionError and ModelError; the data is not looked at."""
    opened = open_deployment(folder, engine, threads)
    wanted = {name: getattr(options, name) for name in Facts.__dataclass_fields__ if hasattr(options, name)}
    opened = replace(opened, deployment=opened.deployment.with_facts(**wanted))
    check_engine(opened, resolve_task(opened.deployment.task).output_keys)
    return opened


def score(
    opened: Opened, options: ScoreOptions, *, batch_size: int = 8, on_batch: OnBatch | None = None
) -> FolderScore:
    """Score what `open_to_score` opened. Raises OptionError and DataError, before the first batch."""
    check_batch_size(batch_size, "--per_device_eval_batch_size")
    deployment = opened.deployment
    task: Task = resolve_task(deployment.task)
    data_options = _data_settings(options, deployment.facts)
    data = task.load(data_options, deployment.tokenizer, max_positions=deployment.longest)
    split = data.validation
    assert split is not None  # do_eval asks for it
    started = time.perf_counter()
    outputs = run_features(opened.engine, deployment, split.features, batch_size, task.output_keys, on_batch)
    seconds = time.perf_counter() - started
    return FolderScore(
        deployment.folder,
        opened.engine.name,
        deployment.facts,
        task.score(split, outputs, data_options),
        len(split.features),
        seconds,
        (*opened.notes, *data.notes),
    )


def check_output_dir(output_dir: Path) -> None:
    """Make the folder that results are to go to, before the work begins. Raises OutputError when that cannot be."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output_dir: {output_dir} cannot be made: {error.strerror or error}") from error
    if not os.access(output_dir, os.W_OK | os.X_OK):
        raise OutputError(f"--output_dir: {output_dir} may not be written to")


def write_score(output_dir: Path, score: FolderScore) -> None:
    """Write eval_results.json, eval_predictions.json and eval_nbest_predictions.json (version 2: eval_null_odds.json).
    Raises OutputError when the disk refuses."""
    write_json(output_dir / "eval_results.json", score.results)
    write_predictions(output_dir, "eval", score.scored)


def _data_settings(options: ScoreOptions, facts: Facts) -> DataSettings:
    """The data of `options`, used as `facts` say."""
    known: Mapping[str, Any] = {**vars(options), **vars(facts)}
    return DataSettings(
        **{name: known[name] for name in DataSettings.__dataclass_fields__ if name in known}, do_eval=True
    )
