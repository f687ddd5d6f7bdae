"""Options: what a person may write on a command line or in a file, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_accel.errors import DataError, ModelError, OptionError, OutputError, SparseAccelError
from sparse_accel.runtime.option_parsing import load_options
from sparse_accel.runtime.options import TRACKERS, TrainOptions, describe_command, flag_fields, flag_names
from sparse_accel.runtime.refused_options import REFUSED_FLAGS

TASK = "question_answering"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Empty data files and a model folder that has what a model folder needs: their contents are not looked at here."""
    for name in ("train.json", "val.json", "test.json"):
        (tmp_path / name).touch()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    (model / "model.safetensors").touch()
    return {
        "train_file": str(tmp_path / "train.json"),
        "validation_file": str(tmp_path / "val.json"),
        "model_name_or_path": str(model),
        "output_dir": str(tmp_path / "out"),
    }


def load(files: dict[str, str], **flags: Any) -> TrainOptions:
    """The options of a command that trains, with some flags more."""
    return load_options(TASK, {"do_train": "true", **files, **flags})


def test_the_command_of_sparsemls_users_is_understood(files: dict[str, str]) -> None:
    options = load(
        files,
        distill_teacher="self",
        recipe="recipe.yaml",
        recipe_args='{"num_epochs":8,"qat_start_epoch":4.0,"observer_epoch":7.0}',
        do_eval="true",
        evaluation_strategy="epoch",
        logging_steps="100",
        save_steps="1000",
        per_device_train_batch_size="8",
        per_device_eval_batch_size="32",
        gradient_accumulation_steps="2",
        preprocessing_num_workers="2",
        max_seq_length="384",
        doc_stride="128",
        seed="42",
    )
    assert options.eval_strategy == "epoch"
    assert (options.per_device_eval_batch_size, options.save_steps, options.preprocessing_num_workers) == (32, 1000, 2)
    assert options.recipe_args == '{"num_epochs":8,"qat_start_epoch":4.0,"observer_epoch":7.0}'


def test_defaults_are_those_of_sparseml_and_the_trainer(files: dict[str, str]) -> None:
    from transformers import TrainingArguments

    ours, theirs = load(files), {entry.name: entry.default for entry in dataclasses.fields(TrainingArguments)}
    changed_since = {"optim", "report_to", "warmup_steps", "logging_dir", "disable_tqdm", "greater_is_better"}
    for entry in flag_fields():
        default = theirs.get(entry.name, dataclasses.MISSING)
        if default in (dataclasses.MISSING, None) or entry.name in changed_since | set(files) | {"do_train"}:
            continue
        assert getattr(ours, entry.name) == getattr(default, "value", default), entry.name
    sparseml = {
        "max_seq_length": 384,
        "doc_stride": 128,
        "n_best_size": 20,
        "max_answer_length": 30,
        "model_revision": "main",
    }
    assert {name: getattr(ours, name) for name in sparseml} == sparseml


def test_every_argument_of_the_trainer_is_offered_or_refused_with_a_reason() -> None:
    from transformers import TrainingArguments

    known = {*flag_names(), *REFUSED_FLAGS, "local_rank"}
    assert {entry.name for entry in dataclasses.fields(TrainingArguments)} <= known
    assert not set(flag_names()) & set(REFUSED_FLAGS)


def test_every_flag_has_a_help_text_and_a_group() -> None:
    assert all(entry.metadata["help"].endswith(".") and entry.metadata["group"] for entry in flag_fields())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learning_rat": "1"}, r"--learning_rat: no such option; did you mean --learning_rate"),
        ({"per_gpu_train_batch_size": "8"}, "long been called --per_device_train_batch_size"),
        ({"deepspeed": "ds.json"}, "accelerate launch --config_file"),
        ({"push_to_hub": "true"}, "hf upload"),
        ({"hub_token": "abc"}, "nothing is pushed"),
        ({"label_smoothing_factor": "0.1"}, "not offered"),
        ({"eval_accumulation_steps": "4"}, "leave the device after every batch"),
        ({"num_export_samples": "20"}, "export of a model"),
        ({"local_rank": "3"}, "LOCAL_RANK"),
        ({"learning_rate": "fast"}, "--learning_rate: expected a finite number, got 'fast'"),
        ({"learning_rate": "nan"}, "expected a finite number"),
        ({"learning_rate": "-1"}, "must be at least 0"),
        ({"num_train_epochs": "0"}, "must be more than 0"),
        ({"adam_beta1": "1"}, "must be less than 1"),
        ({"warmup_ratio": "1.5"}, "must be at most 1"),
        ({"save_steps": "0.1"}, "expected a whole number, got '0.1'; a share of the run is not offered"),
        ({"per_device_train_batch_size": "0"}, "must be at least 1"),
        ({"max_steps": "0"}, "-1 means no limit"),
        ({"max_steps": "-2"}, "must be at least -1"),
        ({"seed": "1.5"}, "expected a whole number"),
        ({"fp16": "maybe"}, r"--fp16: expected True\|False"),
        ({"lr_scheduler_type": "polynomial"}, "not offered"),
        ({"evaluation_strategy": "epochs"}, "did you mean 'epoch'"),
        ({"optim": "adamw_hf"}, "adamw_torch"),
        ({"on_bad_rows": "ignore"}, "error, skip"),
        ({"fp16": "true", "bf16": "true"}, "choose one"),
        ({"fp16": "true", "use_cpu": "true"}, "needs a GPU"),
        ({"warmup_steps": "5", "warmup_ratio": "0.1"}, "pass one"),
        ({"warmup_steps": "5", "lr_scheduler_type": "constant"}, "constant_with_warmup"),
        ({"optim": "sgd", "adam_beta2": "0.9"}, "--adam_beta2: has no effect"),
        ({"eval_delay": "1"}, "needs --eval_strategy"),
        ({"recipe_args": "{}"}, "--recipe_args: needs --recipe"),
        ({"one_shot": "true"}, "--one_shot: needs --recipe"),
        ({"sparse_storage": "compact"}, "--sparse_storage compact: needs a --recipe that holds zeros"),
        (
            {"recipe": "r.yaml", "sparse_storage": "masked", "one_shot": "true"},
            "--sparse_storage: has no effect with --one_shot",
        ),
        (
            {"sparse_storage": "masked", "do_train": "false", "do_eval": "true"},
            "--sparse_storage: is for training",
        ),
        (
            {"recipe": "r.yaml", "reset_optimizer": "true", "resume_from_checkpoint": "false"},
            "--reset_optimizer: is for continuing",
        ),
        ({"distill_teacher": "self"}, "DistillationModifier"),
        ({"teacher_placement": "fsdp2"}, "--teacher_placement: needs a --distill_teacher"),
        (
            {"recipe": "r.yaml", "distill_teacher": "disable", "teacher_placement": "replicated"},
            "--teacher_placement: needs a --distill_teacher",
        ),
        ({"teacher_cache": "off"}, "--teacher_cache: needs a --distill_teacher"),
        (
            {"recipe": "r.yaml", "distill_teacher": "self", "teacher_cache": "atuo"},
            "is auto, off or a folder, got 'atuo'; did you mean 'auto'",
        ),
        ({"recipe": "r.yaml", "distill_teacher": "self", "teacher_cache": "False"}, "did you mean 'off'"),
        (
            {"recipe": "r.yaml", "distill_teacher": "self", "teacher_cache": "off", "teacher_cache_dtype": "float16"},
            "--teacher_cache_dtype: has no effect with --teacher_cache off",
        ),
        (
            {"recipe": "r.yaml", "distill_teacher": "self", "one_shot": "true", "teacher_cache": "off"},
            "--teacher_cache: has no effect with --one_shot",
        ),
        (
            {"recipe": "r.yaml", "distill_teacher": "self", "teacher_cache_dtype": "float15"},
            "did you mean 'float16'",
        ),
        ({"teacher_placement": "sharded"}, "auto, replicated, device_map, fsdp2, zero3"),
        ({"recipe": "r.yaml", "num_calibration_steps": "4"}, "needs --one_shot"),
        ({"recipe": "r.yaml", "one_shot": "true", "max_steps": "4"}, "has no effect with --one_shot"),
        ({"load_best_model_at_end": "true"}, "evaluation and saving must go together"),
        (
            {"load_best_model_at_end": "true", "eval_strategy": "steps", "eval_steps": "4", "save_steps": "6"},
            "multiple of --eval_steps",
        ),
        ({"eval_strategy": "epoch", "metric_for_best_model": "loss"}, "scored without a loss"),
        ({"eval_strategy": "epoch", "metric_for_best_model": "eval_f2"}, "did you mean 'f1'"),
        ({"best_model_after_epoch": "2"}, "needs --do_train and --eval_strategy"),
        ({"report_to": "none,wandb"}, "'none' stands alone"),
        ({"report_to": "tensorbord"}, "did you mean 'tensorboard'"),
        ({"run_name": "x"}, "is for trackers"),
        ({"doc_stride": "384"}, "must be less than --max_seq_length"),
        ({"null_score_diff_threshold": "1"}, "needs --version_2_with_negative"),
        ({"dataset_name": "squad"}, "not both"),
        ({"dataset_config_name": "x"}, "needs --dataset_name"),
        ({"do_predict": "true"}, "needs --test_file"),
        ({"overwrite_output_dir": "true", "resume_from_checkpoint": "true"}, "contradict"),
        ({"resume_from_checkpoint": "true"}, "there is no checkpoint in"),
        ({"resume_from_checkpoint": "nowhere"}, "no such folder"),
        ({"recipe": ""}, "expected text"),
    ],
)
def test_an_option_that_cannot_be_honoured_says_why(files: dict[str, str], flags: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load(files, **flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"push_to_hub": "False"},
        {"remove_unused_columns": "true"},
        {"save_safetensors": "True"},
        {"label_smoothing_factor": "0.0"},
        {"num_export_samples": "0"},
        {"local_rank": "-1"},
        {"fsdp": ""},
    ],
)
def test_a_flag_that_asks_for_what_happens_anyway_is_taken(files: dict[str, str], flags: dict[str, str]) -> None:
    assert load(files, **flags) == load(files)


def test_an_old_launchers_local_rank_must_be_the_environments(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert load(files, local_rank="1") == load(files)
    with pytest.raises(OptionError, match="now: 1"):
        load(files, local_rank="0")


def test_missing_options_are_named_together() -> None:
    with pytest.raises(OptionError, match="--output_dir, --model_name_or_path"):
        load_options(TASK, {})


def test_a_command_without_work_is_refused(files: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="nothing to do"):
        load_options(TASK, files)


def test_evaluation_during_training_needs_data_and_implies_the_final_one(files: dict[str, str]) -> None:
    assert load(files, eval_strategy="epoch").do_eval
    del files["validation_file"]
    with pytest.raises(OptionError, match="--eval_strategy: needs --validation_file"):
        load(files, eval_strategy="epoch")


def test_steps_between_evaluations_default_to_those_between_log_lines(files: dict[str, str]) -> None:
    assert load(files, eval_strategy="steps", logging_steps="7").eval_steps == 7
    assert load(files, eval_strategy="epoch", logging_steps="7").eval_steps is None


def test_the_best_model_is_the_one_with_the_highest_f1(files: dict[str, str]) -> None:
    options = load(files, load_best_model_at_end="true", eval_strategy="epoch", save_strategy="epoch")
    assert (options.metric_for_best_model, options.greater_is_better) == ("f1", True)


@pytest.mark.parametrize("name", ["train_file", "validation_file"])
def test_a_missing_data_file_is_named_with_its_neighbour(files: dict[str, str], name: str) -> None:
    files[name] = files[name].removesuffix(".json") + "s.json"
    with pytest.raises(DataError, match=rf"--{name}: no such file: .*; did you mean '"):
        load(files)


def test_a_folder_is_no_data_file(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        load(files | {"train_file": str(tmp_path)})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no such folder"),
        ("train.json", "is a file; expected a model folder"),
        ("empty", "has no config.json"),
        ("weightless", "has no weights: expected one of model.safetensors"),
        ("outer", "outer/training has one"),
    ],
)
@pytest.mark.parametrize("option", ["model_name_or_path", "distill_teacher"])
def test_a_model_that_cannot_be_one_is_refused(
    files: dict[str, str], tmp_path: Path, source: str, message: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "weightless", "outer/training"):
        Path(folder).mkdir(parents=True)
    for folder in ("weightless", "outer/training"):
        (Path(folder) / "config.json").touch()
    with pytest.raises(ModelError, match=message):
        load(files | {option: source}, recipe="r.yaml")


def test_the_output_may_not_be_what_the_run_reads(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the same folder"):
        load(files | {"output_dir": files["model_name_or_path"]})
    with pytest.raises(OutputError, match="is a file"):
        load(files | {"output_dir": files["train_file"]})


def test_a_tracker_that_is_not_installed_is_refused(files: dict[str, str]) -> None:
    import importlib.util

    absent = [name for name, module in TRACKERS.items() if importlib.util.find_spec(module) is None]
    if not absent:
        pytest.skip("every tracker is installed here")
    with pytest.raises(OptionError, match="is not installed here"):
        load(files, report_to=absent[0])


def test_a_teacher_in_the_hands_of_a_package_that_is_not_installed_is_refused(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="DeepSpeed is not installed here: `pip install"):
        load(files, recipe="r.yaml", distill_teacher="self", teacher_placement="zero3")


@pytest.mark.parametrize("word", ["True", "true", "1", "yes", "Y", "t"])
def test_booleans_are_spelled_as_hugging_faces_parser_takes_them(files: dict[str, str], word: str) -> None:
    assert load(files, bf16=word).bf16 is True


def test_resuming_takes_a_folder_or_a_boolean(files: dict[str, str], tmp_path: Path) -> None:
    checkpoint = tmp_path / "out" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    assert load(files, resume_from_checkpoint="True").resume_from_checkpoint is True
    assert load(files, resume_from_checkpoint="False").resume_from_checkpoint is False
    assert load(files, resume_from_checkpoint=str(checkpoint)).resume_from_checkpoint == str(checkpoint)


# ---- files of options


def test_json_and_yaml_files_give_the_same_options_and_flags_win(files: dict[str, str], tmp_path: Path) -> None:
    values = {**files, "do-train": True, "learning_rate": 1e-4, "num_train_epochs": 2, "save_strategy": "no", "seed": 7}
    (tmp_path / "args.json").write_text("\ufeff" + json.dumps(values), encoding="utf-8")
    lines = [f"{name}: {value}" for name, value in (values | {"learning_rate": "1e-4"}).items()]
    (tmp_path / "args.yaml").write_text("\n".join(lines), encoding="utf-8")
    from_json = load_options(TASK, {"seed": "9"}, tmp_path / "args.json")
    assert from_json == load_options(TASK, {"seed": "9"}, tmp_path / "args.yaml")
    assert (from_json.seed, from_json.learning_rate, from_json.save_strategy) == (9, 1e-4, "no")


def test_recipe_variables_may_be_a_mapping_in_a_file(files: dict[str, str], tmp_path: Path) -> None:
    values = {**files, "do_train": True, "recipe": "r.yaml", "recipe_args": {"num_epochs": 2}}
    (tmp_path / "args.json").write_text(json.dumps(values), encoding="utf-8")
    assert load_options(TASK, {}, tmp_path / "args.json").recipe_args == '{"num_epochs": 2}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"learnig_rate": 1}', r"a.json: learnig_rate: no such option; did you mean --learning_rate"),
        ("a.json", '{"seed": 1, "seed": 2}', "seed is given twice"),
        ("a.json", '{"eval_strategy": "no", "evaluation_strategy": "no"}', "eval_strategy is given twice"),
        ("a.json", '{"seed": "x"}', "a.json: seed: expected a whole number"),
        ("a.json", '{"seed": true}', "a.json: seed: expected a whole number"),
        ("a.json", '{"do_train": 2}', "a.json: do_train: expected True"),
        ("a.json", '{"train_file": 3}', "a.json: train_file: expected text"),
        ("a.json", "[1]", "expected an object"),
        ("a.json", '{"seed": ', "a.json: Expecting value"),
        ("a.json", '{"deepspeed": "x.json"}', "a.json: deepspeed: --deepspeed: not offered"),
        ("a.json", '{"task": "text_classification"}', "the command is for question_answering"),
        ("a.yaml", "seed: 1\nseed: 2", "seed given twice"),
        ("a.yaml", "- 1", "expected a mapping"),
        ("a.yaml", "a: [", "a.yaml: "),
        ("a.toml", "", "ends in .json, .yaml or .yml"),
    ],
)
def test_a_file_of_options_is_checked_like_a_command_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(OptionError, match=message):
        load_options(TASK, {}, tmp_path / name)


def test_one_option_in_two_spellings_is_refused() -> None:
    with pytest.raises(OptionError, match="--evaluation_strategy and --eval_strategy: are one option; give it once"):
        load_options(TASK, {"evaluation_strategy": "epoch", "eval_strategy": "no"})


def test_padding_takes_no_part_where_logits_have_no_tokens() -> None:
    with pytest.raises(OptionError, match=r"distill_include_padding: belongs to .*; text_classification has no use"):
        load_options("text_classification", {"distill_include_padding": "true"})


def test_a_file_of_options_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read as a file of options"):
        load_options(TASK, {}, tmp_path / "none.json")


# ---- properties


@st.composite
def _some_flags(draw: st.DrawFn) -> dict[str, str]:
    """Flags that may be combined at will."""
    texts = {
        "learning_rate": st.floats(0, 1).map(str),
        "max_steps": st.integers(1, 10**6).map(str),
        "recipe": st.sampled_from(["a.yaml", "---\nversion: 1\n", 'it\'s a "recipe"']),
        "pad_to_max_length": st.sampled_from(["True", "False"]),
        "dataloader_pin_memory": st.sampled_from(["True", "False"]),
        "bf16": st.just("True"),
        "warmup_steps": st.integers(0, 100).map(str),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(texts))))
    return {name: draw(texts[name]) for name in sorted(chosen)}


@settings(max_examples=40, deadline=None)
@given(flags=_some_flags())
def test_the_described_command_and_the_json_both_give_the_options_back(flags: dict[str, str]) -> None:
    from sparse_accel.cli.program import parse

    hub = {"model_name_or_path": "bert", "output_dir": "out-of-nowhere", "dataset_name": "squad", "do_train": "True"}
    options = load_options(TASK, hub | flags)
    words = parse(shlex.split(describe_command(options))[1:])[2:]
    again = dict(word.removeprefix("--").split("=", 1) for word in words)
    assert load_options(TASK, again) == options
    without_absent = {name: value for name, value in options.to_json().items() if value is not None and name != "task"}
    assert load_options(TASK, json.loads(json.dumps(without_absent))) == options


def test_identity_changes_with_what_shapes_the_weights_only(files: dict[str, str]) -> None:
    base = load(files)
    same = load(
        files, logging_steps="3", save_total_limit="2", max_steps="9", do_eval="true", overwrite_output_dir="true"
    )
    assert same.identity() == base.identity()
    for flags in ({"seed": "1"}, {"learning_rate": "1"}, {"recipe": "r.yaml"}, {"gradient_accumulation_steps": "2"}):
        assert load(files, **flags).identity() != base.identity()


def test_options_remember_what_the_person_set(files: dict[str, str]) -> None:
    assert load(files, evaluation_strategy="epoch").explicit == {*files, "do_train", "eval_strategy"}


def test_every_refusal_is_a_readable_error(files: dict[str, str]) -> None:
    for name in REFUSED_FLAGS:
        with pytest.raises(SparseAccelError, match=rf"^--{name}: not offered: .{{10,}}"):
            load(files, **{name: "some value"})
