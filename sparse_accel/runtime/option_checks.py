"""Which options go together, and whether the files and folders that they name are there. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from pathlib import Path
from typing import Final

from sparse_accel.errors import DataError, OptionError, OutputError, nearest, suggestion
from sparse_accel.folders.sources import check_source, neighbour
from sparse_accel.runtime.options import (
    FALSE_WORDS,
    METRICS,
    METRICS_WITH_NEGATIVES,
    QA,
    TEACHER_CACHES,
    TEXT,
    TRACKERS,
    TRUE_WORDS,
    TrainOptions,
    default_of,
    flag_fields,
)
from sparse_accel.tasks.glue import glue_task
from sparse_accel.tasks.shares import held_out_share


def validate(options: TrainOptions) -> None:
    """Refuse options that contradict each other, that would have no effect, or that name files that are not there.
    Raises OptionError, DataError, ModelError or OutputError; reads directories, never a file."""
    changed = {
        entry.name
        for entry in flag_fields(options.task)
        if getattr(options, entry.name) != default_of(entry, options.task)
    }
    for check in (
        _check_work,
        _check_data,
        _check_new_model,
        _check_schedule,
        _check_recipe,
        _check_checkpoints,
        _check_logging,
        _check_machine,
        _check_folders,
    ):
        check(options, changed)


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise OptionError(message)


def _check_work(options: TrainOptions, changed: Collection[str]) -> None:
    _refuse(
        not (options.do_train or options.do_eval or options.do_predict),
        "nothing to do: pass --do_train, --do_eval or --do_predict",
    )
    _refuse(
        options.eval_strategy != "no" and not options.do_train,
        "--eval_strategy: evaluates during training; without --do_train, --do_eval alone scores the model",
    )
    _refuse(
        options.resume_from_checkpoint not in (None, False) and options.overwrite_output_dir,
        "--resume_from_checkpoint and --overwrite_output_dir contradict each other: continue or start anew",
    )
    _refuse(
        options.resume_from_checkpoint not in (None, False) and not options.do_train,
        "--resume_from_checkpoint: continues a training; add --do_train, or pass the folder as --model_name_or_path",
    )
    _refuse(
        options.reset_optimizer and (not options.do_train or options.resume_from_checkpoint is False),
        "--reset_optimizer: is for continuing a training from a checkpoint",
    )


def _check_data(options: TrainOptions, changed: Collection[str]) -> None:
    files = {name: getattr(options, name) for name in ("train_file", "validation_file", "test_file")}
    named = [f"--{name}" for name, file in files.items() if file is not None]
    if options.task == TEXT and options.task_name is not None:
        glue_task(options.task_name)
    if options.dataset_name is not None:
        _refuse(
            bool(named), f"--dataset_name and {', '.join(named)}: the data comes from the hub or from files, not both"
        )
    elif not (options.task == TEXT and options.task_name is not None and not named):
        _refuse(options.dataset_config_name is not None, "--dataset_config_name: needs --dataset_name")
        if options.eval_on_test:
            _refuse(files["test_file"] is None, "--eval_on_test: needs --test_file (or --dataset_name)")
            _refuse(
                files["validation_file"] is not None,
                "--eval_on_test and --validation_file: the model is scored on the one or the other",
            )
            files["validation_file"] = files["test_file"]
        for wanted, switch, name in (
            (options.do_train, "--do_train", "train_file"),
            (options.do_eval, "--do_eval" if options.eval_strategy == "no" else "--eval_strategy", "validation_file"),
            (options.do_predict, "--do_predict", "test_file"),
        ):
            held_out = (
                name == "validation_file" and held_out_share(options) is not None and options.train_file is not None
            )
            _refuse(wanted and files[name] is None and not held_out, f"{switch}: needs --{name} (or --dataset_name)")
    for name, file in files.items():
        if file is not None and not Path(file).is_file():
            problem = "is a folder, not a file" if Path(file).is_dir() else "no such file"
            raise DataError(f"--{name}: {problem}: {file}{neighbour(Path(file))}")
    given = [name for name in ("validation_ratio", "validation_split_percentage") if name in options.explicit]
    if given:
        _refuse(len(given) > 1, f"--{' and --'.join(given)}: say the same; choose one")
        _refuse(
            files["validation_file"] is not None,
            f"--{given[0]}: holds training rows out where there is no validation data, and --validation_file brings some",
        )
    _refuse(
        options.dataset_name_2 is not None and options.dataset_name is None,
        "--dataset_name_2: is put behind --dataset_name, which is not there",
    )
    _refuse(
        options.dataset_config_name_2 is not None and options.dataset_name_2 is None,
        "--dataset_config_name_2: needs --dataset_name_2",
    )
    _check_streaming(options)
    _refuse(
        options.task == QA and options.max_seq_length is not None and options.doc_stride >= options.max_seq_length,
        f"--doc_stride: must be less than --max_seq_length ({options.max_seq_length}), got {options.doc_stride}",
    )
    for name, fitting in (
        ("group_by_length", ("grouped",)),
        # Before --pad_to_max_length, which they imply: the person is told of what they wrote.
        ("distill_include_padding", ("grouped", "padded")),
        ("observe_padding", ("grouped", "padded")),
        ("pad_to_max_length", ("grouped", "padded")),
    ):
        _refuse(
            bool(getattr(options, name)) and options.batching not in fitting,
            f"--{name}: contradicts --batching {options.batching}; it goes with {' or '.join(fitting)}",
        )
    _refuse(
        "null_score_diff_threshold" in changed and not options.version_2_with_negative,
        "--null_score_diff_threshold: needs --version_2_with_negative",
    )


# Options of text that is tokenized before the start, which in a run with --streaming is that of evaluation alone.
_OF_WHOLE_TEXT: Final = (
    ("overwrite_cache", "nothing is cached"),
    ("preprocessing_num_workers", "text is tokenized while training; --dataloader_num_workers 1 does it ahead of time"),
)


def _check_streaming(options: TrainOptions) -> None:
    if not options.streaming:
        return
    _refuse(not options.do_train, "--streaming: is for training; it needs --do_train")
    _refuse(
        options.max_steps <= 0,
        "--streaming: nobody has counted the data, so say how long to train: --max_steps (all epochs together)",
    )
    reads_whole = options.do_eval or options.do_predict
    for name, why in (
        ("validation_split_percentage", "no part of a stream is held out; give --validation_file"),
        ("max_train_samples", "--max_steps says how much is read"),
        ("group_by_length", "features come as the text does"),
        ("data_seed", "the text's order is its own; masks go by --seed"),
        ("dataloader_drop_last", "every step of a stream is whole"),
        *(() if reads_whole else _OF_WHOLE_TEXT),
    ):
        _refuse(
            name in options.explicit and getattr(options, name) not in (None, False),
            f"--{name}: has no effect with --streaming: {why}",
        )
    _refuse(
        options.batching == "grouped" and "batching" in options.explicit,
        "--batching grouped: has no effect with --streaming: features come as the text does",
    )


def _check_new_model(options: TrainOptions, changed: Collection[str]) -> None:
    if options.model_type is None:
        _refuse(options.config_overrides is not None, "--config_overrides: needs --model_type, whose config it changes")
        return
    for name in ("model_name_or_path", "config_name"):
        _refuse(
            bool(getattr(options, name)),
            f"--model_type and --{name}: start from random weights, or from a model; not both",
        )
    _refuse(
        options.tokenizer_name is None, "--model_type: a new model brings no tokenizer; name one with --tokenizer_name"
    )
    _refuse(not options.do_train or options.one_shot, "--model_type: a new model has to be trained; add --do_train")
    _refuse(
        options.distill_teacher == "self",
        "--distill_teacher self: a new model has nothing to teach; name a trained one",
    )


def _check_schedule(options: TrainOptions, changed: Collection[str]) -> None:
    _refuse(options.max_steps == 0, "--max_steps: 0 steps train nothing; -1 means no limit")
    _refuse(
        options.warmup_steps > 0 and options.warmup_ratio > 0,
        "--warmup_steps and --warmup_ratio: both say how long the warm-up is; pass one",
    )
    _refuse(
        options.lr_scheduler_type == "constant" and (options.warmup_steps > 0 or options.warmup_ratio > 0),
        "--lr_scheduler_type constant: has no warm-up; use constant_with_warmup",
    )
    adam = [name for name in ("adam_beta1", "adam_beta2", "adam_epsilon") if name in changed]
    _refuse(options.optim == "sgd" and bool(adam), f"--{''.join(adam[:1])}: has no effect with --optim sgd")


def _check_recipe(options: TrainOptions, changed: Collection[str]) -> None:
    if options.recipe is None:
        for name in ("recipe_args", "one_shot", "distill_include_padding", "observe_padding"):
            _refuse(bool(getattr(options, name)), f"--{name}: needs --recipe")
        _refuse(options.quantized_attention == "fused", "--quantized_attention fused: needs a --recipe that quantizes")
        _refuse(options.sparse_storage == "compact", "--sparse_storage compact: needs a --recipe that holds zeros")
        _refuse(
            options.distill_teacher not in (None, "disable"),
            "--distill_teacher: needs a --recipe with a DistillationModifier, which says how strong and how warm",
        )
    _refuse(
        "teacher_placement" in changed and options.distill_teacher in (None, "disable"),
        "--teacher_placement: needs a --distill_teacher that could be placed",
    )
    for name in ("teacher_cache", "teacher_cache_dtype"):
        _refuse(
            name in changed and options.distill_teacher in (None, "disable"),
            f"--{name}: needs a --distill_teacher whose answers could be kept",
        )
        _refuse(name in changed and options.one_shot, f"--{name}: has no effect with --one_shot, which asks no teacher")
    _refuse(
        "teacher_cache_dtype" in changed and options.teacher_cache == "off",
        "--teacher_cache_dtype: has no effect with --teacher_cache off",
    )
    _refuse(
        options.distill_top_k > 0 and options.distill_teacher in (None, "disable"),
        "--distill_top_k: needs a --distill_teacher that is compared with",
    )
    _check_teacher_cache(options.teacher_cache)
    _refuse(
        options.teacher_placement == "zero3" and importlib.util.find_spec("deepspeed") is None,
        "--teacher_placement zero3: DeepSpeed is not installed here: `pip install 'sparse_accel[deepspeed]'`, or use fsdp2",
    )
    _refuse(options.one_shot and not options.do_train, "--one_shot: needs --do_train, as in SparseML")
    _refuse(
        "sparse_storage" in changed and not options.do_train, "--sparse_storage: is for training; it needs --do_train"
    )
    _refuse(
        options.num_calibration_steps is not None and not options.one_shot,
        "--num_calibration_steps: needs --one_shot; in a training run quantization takes its ranges from training",
    )
    for name in ("eval_strategy", "load_best_model_at_end", "resume_from_checkpoint", "max_steps", "sparse_storage"):
        _refuse(options.one_shot and name in changed, f"--{name}: has no effect with --one_shot, which does not train")


def _check_teacher_cache(value: str) -> None:
    """A word that is close to one of ours is a slip rather than a new folder's name."""
    if value in TEACHER_CACHES:
        return
    close = nearest(value.lower(), (*TEACHER_CACHES, *FALSE_WORDS, *TRUE_WORDS, "none", "disable"))
    if close and os.sep not in value and not Path(value).is_dir():
        meant = "auto" if close[0] in ("auto", *TRUE_WORDS) else "off"
        raise OptionError(
            f"--teacher_cache: is auto, off or a folder, got {value!r}; did you mean {meant!r}? "
            f"A new folder of that name is ./{value}"
        )
    if Path(value).exists() and not Path(value).is_dir():
        raise OutputError(f"--teacher_cache: is a file, not a folder: {value}")


def _check_checkpoints(options: TrainOptions, changed: Collection[str]) -> None:
    _refuse(
        "eval_delay" in changed and options.eval_strategy == "no", "--eval_delay: needs --eval_strategy steps or epoch"
    )
    if options.load_best_model_at_end:
        _refuse(not options.do_train, "--load_best_model_at_end: needs --do_train")
        _refuse(
            options.save_strategy != options.eval_strategy or options.eval_strategy == "no",
            "--load_best_model_at_end: the best checkpoint is chosen by its score, so evaluation and saving must go"
            f" together; got --eval_strategy {options.eval_strategy} and --save_strategy {options.save_strategy}",
        )
        _refuse(
            options.eval_strategy == "steps" and options.save_steps % (options.eval_steps or 1) != 0,
            "--load_best_model_at_end: --save_steps must be a multiple of --eval_steps, so that each checkpoint has a"
            f" score; got {options.save_steps} and {options.eval_steps}",
        )
    for name in ("metric_for_best_model", "greater_is_better", "best_model_after_epoch"):
        if name in changed:
            _refuse(
                not options.do_train or options.eval_strategy == "no", f"--{name}: needs --do_train and --eval_strategy"
            )
            _refuse(
                name != "metric_for_best_model" and options.metric_for_best_model is None,
                f"--{name}: needs --load_best_model_at_end or --metric_for_best_model",
            )
    if options.best_model_after_epoch is not None and options.recipe is None:
        _refuse(
            options.best_model_after_epoch >= options.num_train_epochs,
            f"--best_model_after_epoch {options.best_model_after_epoch:g}: the run has {options.num_train_epochs:g} epochs, so"
            " that no checkpoint could be the best",
        )
    if options.metric_for_best_model is not None:
        metrics = METRICS_WITH_NEGATIVES if options.version_2_with_negative else METRICS[options.task]
        metric = options.metric_for_best_model.removeprefix("eval_")
        _refuse(
            options.task == QA and metric == "loss",
            "--metric_for_best_model: answers are scored without a loss; use f1 or exact_match",
        )
        _refuse(
            metric not in metrics, f"--metric_for_best_model: no such score: {metric!r}{suggestion(metric, metrics)}"
        )


def without_effect(options: TrainOptions) -> list[str]:
    """One sentence for each interval that was given beside a strategy that has no use for it. Hugging Face's Trainer takes
    them without a word, so that commands are full of them."""
    sentences = []
    for steps, strategy in (
        ("eval_steps", "eval_strategy"),
        ("save_steps", "save_strategy"),
        ("logging_steps", "logging_strategy"),
    ):
        used = getattr(options, strategy) == "steps" or (steps == "logging_steps" and options.eval_strategy == "steps")
        if steps in options.explicit and not used:
            sentences.append(f"--{steps} has no effect with --{strategy} {getattr(options, strategy)}")
    return sentences


def _check_logging(options: TrainOptions, changed: Collection[str]) -> None:
    for name in options.report_to:
        _refuse(name in ("none", "all") and len(options.report_to) > 1, f"--report_to: {name!r} stands alone")
        _refuse(
            name in TRACKERS and importlib.util.find_spec(TRACKERS[name]) is None,
            f"--report_to: {name} is not installed here: `pip install {name}`, or leave it out",
        )
    for name in ("logging_dir", "run_name"):
        _refuse(
            name in changed and options.report_to == ("none",),
            f"--{name}: is for trackers; add --report_to tensorboard (or another)",
        )


def _check_machine(options: TrainOptions, changed: Collection[str]) -> None:
    _refuse(options.fp16 and options.bf16, "--fp16 and --bf16: choose one")
    _refuse(options.fp16_full_eval and options.bf16_full_eval, "--fp16_full_eval and --bf16_full_eval: choose one")
    _refuse(
        (options.fp16_full_eval and options.bf16) or (options.bf16_full_eval and options.fp16),
        "a model trained in one half precision is evaluated in it; leave --fp16_full_eval and --bf16_full_eval out",
    )
    _refuse(options.fp16 and options.use_cpu, "--fp16: needs a GPU; on a CPU use --bf16")
    _refuse(
        options.compile and (not options.do_train or options.one_shot),
        "--compile: is for training; it needs --do_train, and has no use for --one_shot",
    )


def _check_folders(options: TrainOptions, changed: Collection[str]) -> None:
    output = Path(options.output_dir)
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output_dir: is a file, not a folder: {output}")
    for name in ("model_name_or_path", "config_name", "tokenizer_name", "distill_teacher"):
        source = getattr(options, name)
        if not source or (name == "distill_teacher" and source in ("self", "disable")):
            continue
        check_source(source, f"--{name}", weights=name in ("model_name_or_path", "distill_teacher"))
        # Without training, the model stays where it is.
        if options.do_train and output.exists() and Path(source).exists() and output.samefile(source):
            raise OutputError(
                f"--output_dir and --{name} are the same folder, {output}: the run would overwrite what it reads"
            )
    checkpoint = options.resume_from_checkpoint
    _refuse(
        isinstance(checkpoint, str) and not Path(checkpoint).is_dir(),
        f"--resume_from_checkpoint: no such folder: {checkpoint}{neighbour(Path(str(checkpoint)))}",
    )
    if options.resume_from_checkpoint is True and not any(output.glob("checkpoint-*")):
        raise OptionError(
            f"--resume_from_checkpoint True: there is no checkpoint in {output}; leave it out to start anew"
        )
