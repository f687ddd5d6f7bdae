"""Scores a deployment or model folder on a data set, with the windows and metrics of training."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from sparse_accel.errors import OptionError, OutputError
from sparse_accel.serving.deployment import SETTINGS, Deployment, Facts, Opened, open_deployment
from sparse_accel.serving.engines import Engine
from sparse_accel.serving.predicting import TASK, OnBatch, check_batch_size, check_engine
from sparse_accel.tasks import resolve_task
from sparse_accel.tasks.base import Scored, Split, Task, write_predictions
from sparse_accel.tasks.collating import Collator
from sparse_accel.tasks.data_settings import DataSettings
from sparse_accel.tasks.features import length_sorted_batches
from sparse_accel.tasks.files import write_json


@dataclass(frozen=True)
class ScoreOptions:
    """What to score on; names, defaults and meanings are those of training's options, each task having its own.

    None leaves a fact to the folder: each folder is then scored the way it says that it is to be used.
    """

    validation_file: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_file: str | None = None
    validation_split_percentage: int | None = None
    validation_ratio: float | None = None
    max_eval_samples: int | None = None
    max_seq_length: int | None = None
    doc_stride: int | None = None
    n_best_size: int | None = None
    max_answer_length: int | None = None
    version_2_with_negative: bool | None = None
    null_score_diff_threshold: float | None = None
    question_column: str | None = None
    context_column: str | None = None
    answer_column: str | None = None
    task_name: str | None = None
    input_column_names: str | None = None
    text_column_name: str | None = None
    label_column_name: str | None = None
    return_entity_level_metrics: bool | None = None
    on_bad_rows: str = "error"
    cache_dir: str | None = None
    overwrite_cache: bool = False


@dataclass(frozen=True)
class FolderScore:
    """How one folder did. `seconds` is the model's time alone, over `num_features` features; `notes` are sentences for the
    person."""

    folder: Path
    task: str
    engine: str
    facts: Facts
    scored: Scored
    num_features: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def features_per_second(self) -> float:
        """Features a second."""
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
            **({"doc_stride": self.facts.doc_stride} if self.task == TASK else {}),
        }


def check_what_to_score(options: ScoreOptions) -> None:
    """Raise OptionError unless the options name data: a file, a data set, or the part of training data that was held out."""
    held_out = [
        name for name in ("validation_split_percentage", "validation_ratio") if getattr(options, name) is not None
    ]
    if options.validation_file and (options.train_file or held_out):
        extra = "train_file" if options.train_file else held_out[0]
        raise OptionError(f"--validation_file and --{extra}: score the file, or what training held out; one of them")
    if options.train_file and options.dataset_name:
        raise OptionError("--dataset_name and --train_file: the data comes from the hub or from a file, not both")
    if len(held_out) > 1:
        raise OptionError(f"--{held_out[0]} and --{held_out[1]}: say the same; choose one")
    if options.train_file and not held_out:
        raise OptionError(
            "--train_file: say how much of it training held out, as its command did: --validation_split_percentage N or "
            "--validation_ratio R (masked language modeling holds 5 percent out by itself); the same rows are then scored"
        )
    if held_out and not options.train_file and not options.dataset_name:
        raise OptionError(f"--{held_out[0]}: of what? pass training's --train_file FILE, or its --dataset_name NAME")
    percentage, ratio = options.validation_split_percentage, options.validation_ratio
    if percentage is not None and not 0 < percentage < 100:
        raise OptionError(f"--validation_split_percentage: must lie between 0 and 100, got {percentage}")
    if ratio is not None and not 0 < ratio < 1:
        raise OptionError(f"--validation_ratio: must lie between 0 and 1, got {ratio:g}")
    if not (options.validation_file or options.dataset_name or options.train_file):
        raise OptionError(
            "evaluate: on what? pass --validation_file FILE, or --dataset_name NAME, or, for what training held out, "
            "--train_file FILE and its --validation_split_percentage N"
        )


def open_to_score(
    folder: str | Path, options: ScoreOptions, *, engine: str | None = None, threads: int | None = None
) -> Opened:
    """Open a folder by `engine` (onnxruntime, openvino or torch; left out: by what the folder holds), with the facts that
    `options` change. Raises OptionError and ModelError; the data is not looked at."""
    opened = open_deployment(folder, engine, threads)
    deployment = opened.deployment
    wanted = {name: getattr(options, name) for name in Facts.__dataclass_fields__ if hasattr(options, name)}
    _refuse_foreign(deployment, options)
    named = {name: getattr(options, name, None) for name in SETTINGS}
    settings = {**deployment.facts.settings, **{name: value for name, value in named.items() if value is not None}}
    opened = replace(opened, deployment=deployment.with_facts(**wanted, settings=settings))
    check_engine(opened, resolve_task(opened.deployment.task).output_keys)
    return opened


# Options that some tasks alone have -> those tasks.
_OWNERS: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("doc_stride", "n_best_size", "max_answer_length"), (TASK,)),
    **dict.fromkeys(("version_2_with_negative", "null_score_diff_threshold"), (TASK,)),
    **dict.fromkeys(("question_column", "context_column", "answer_column"), (TASK,)),
    "task_name": ("text_classification", "token_classification"),
    "input_column_names": ("text_classification",),
    "validation_ratio": ("text_classification",),
    "text_column_name": ("token_classification", "masked_language_modeling"),
    "label_column_name": ("text_classification", "token_classification"),
    "return_entity_level_metrics": ("token_classification",),
}


def _refuse_foreign(deployment: Deployment, options: ScoreOptions) -> None:
    for name, owners in _OWNERS.items():
        if getattr(options, name) is not None and deployment.task not in owners:
            raise OptionError(
                f"--{name}: belongs to {' and '.join(owners)}; {deployment.folder} is a model for {deployment.task}"
            )


def score(
    opened: Opened, options: ScoreOptions, *, batch_size: int = 8, on_batch: OnBatch | None = None
) -> FolderScore:
    """Score what `open_to_score` opened. Raises OptionError and DataError, before the first batch."""
    check_batch_size(batch_size, "--per_device_eval_batch_size")
    deployment = opened.deployment
    task: Task = resolve_task(deployment.task)
    data_options = _data_settings(options, deployment.facts)
    data = task.load(
        data_options, deployment.tokenizer, max_positions=deployment.longest, model_labels=deployment.labels
    )
    split = data.validation
    assert split is not None  # do_eval asks for it
    scored: dict[str, Scored] = {}
    seconds = 0.0
    for suffix, part in {"": split, **data.more_validation}.items():
        started = time.perf_counter()
        outputs = run_split(opened.engine, deployment, task, part, data.collate, batch_size, on_batch)
        seconds += time.perf_counter() - started
        scored[suffix] = task.score(part, outputs, data_options)
    return FolderScore(
        deployment.folder,
        task.name,
        opened.engine.name,
        deployment.facts,
        _together(scored),
        sum(len(part.features) for part in (split, *data.more_validation.values())),
        seconds,
        (*opened.notes, *data.notes),
    )


def _together(scored: Mapping[str, Scored]) -> Scored:
    """The scores of several splits by their suffix, as one: the suffix ends the names of metrics and files."""
    if len(scored) == 1:  # its files may be lazy, and nobody need want them
        return scored[""]
    ending = {suffix: f"_{suffix}" if suffix else "" for suffix in scored}
    return Scored(
        {f"{name}{ending[suffix]}": value for suffix, one in scored.items() for name, value in one.metrics.items()},
        {f"{name}{ending[suffix]}": content for suffix, one in scored.items() for name, content in one.files.items()},
    )


def run_split(
    engine: Engine,
    deployment: Deployment,
    task: Task,
    split: Split,
    collate: Collator,
    batch_size: int,
    on_batch: OnBatch | None = None,
) -> dict[str, list[np.ndarray]]:
    """What the task wants to score of a model's outputs, for every feature of `split` in its order."""
    import torch

    fixed = deployment.facts.sequence_length
    if fixed is not None:
        collate = replace(collate, max_length=fixed, pad_to_max_length=True)
    found: dict[str, list[np.ndarray]] = {}
    done = 0
    for indices in length_sorted_batches(split.features.lengths, batch_size):
        batch = collate(split.features, indices)
        inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
        segments = batch.get("token_type_ids") if deployment.num_segments > 1 else None
        inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"]) if segments is None else segments.numpy()
        outputs = {name: torch.from_numpy(value) for name, value in engine(inputs).items()}
        for key, rows in task.for_scoring(outputs, batch).items():
            column = found.setdefault(key, [np.empty(0, np.float32)] * len(split.features))
            for index, row in zip(indices.tolist(), rows, strict=True):
                column[index] = row
        done += len(indices)
        if on_batch is not None:
            on_batch(done, len(split.features))
    return found


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
    known: Mapping[str, Any] = {**vars(options), **vars(facts), **facts.settings}
    given = {name: known[name] for name in DataSettings.__dataclass_fields__ if known.get(name) is not None}
    return DataSettings(**given, do_eval=True)
