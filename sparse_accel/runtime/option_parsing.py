"""From what a person wrote, on a command line or in a file of options, to checked TrainOptions."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, replace
from pathlib import Path
from typing import Any, Final

from sparse_accel.errors import OptionError, ZooError, nearest, suggestion
from sparse_accel.recipe import shipped
from sparse_accel.runtime.option_checks import validate
from sparse_accel.runtime.options import (
    BOOLEAN_WORDS,
    LOWER_IS_BETTER,
    METRICS,
    TEXT,
    TRUE_WORDS,
    TrainOptions,
    default_of,
    flag_fields,
    flag_names,
    has_task,
    kind_name,
    value_kinds,
)
from sparse_accel.runtime.refused_options import LOCAL_RANK_FLAG, REFUSED_FLAGS, refusal_message
from sparse_accel.tasks.glue import glue_task
from sparse_accel.zoo.resolving import Kind, Resolution, open_zoo, resolve
from sparse_accel.zoo.stubs import is_stub

# The options that take a `zoo:` stub, and as what it is looked up.
STUB_OPTIONS: Final[Mapping[str, Kind]] = {
    "model_name_or_path": "model",
    "config_name": "model",
    "tokenizer_name": "model",
    "distill_teacher": "model",
    "recipe": "recipe",
}


def load_options(task: str, flags: Mapping[str, Any], args_file: str | Path | None = None) -> TrainOptions:
    """The options of a command, checked: `flags` (spelling without `--` -> text or value) over the file's over the
    defaults. `zoo:` stubs become what they stand for; nothing calls the network. Raises OptionError, ZooError, and what
    `validate` raises."""
    given: dict[str, Any] = {}
    sources: dict[str, str] = {}
    spelled: dict[str, str] = {}
    if args_file is not None:
        for name, value in _read_mapping(Path(args_file), task).items():
            given[name], sources[name] = value, f"{args_file}: {name}"
        if given.pop("task", task) != task:
            raise OptionError(f"{args_file}: task: the command is for {task}")
    for spelling, value in flags.items():
        flag = canonical(spelling, value, f"--{spelling}", task)
        if flag is not None:
            if flag in spelled:
                raise OptionError(f"--{spelled[flag]} and --{spelling}: are one option; give it once")
            given[flag], sources[flag], spelled[flag] = value, f"--{spelling}", spelling
    entries = {entry.name: entry for entry in flag_fields(task)}
    values = {name: _convert(entries[name], raw, sources[name]) for name, raw in given.items()}
    if values.get("model_type") is not None:
        values.setdefault("model_name_or_path", "")  # random weights come from nowhere
    missing = [entry.name for entry in entries.values() if entry.default is MISSING and entry.name not in values]
    if missing:
        raise OptionError(f"missing: {', '.join('--' + name for name in missing)}")
    options = _without_stubs(_completed(TrainOptions(task=task, explicit=frozenset(given), **values)))
    validate(options)
    return options


def _without_stubs(options: TrainOptions) -> TrainOptions:
    """The options with what their `zoo:` stubs stand for, and the stubs beside them. Raises ZooError."""
    named = [name for name in STUB_OPTIONS if is_stub(getattr(options, name))]
    if not named:
        if options.zoo is not None:
            raise OptionError("--zoo: has no effect: no option is a zoo: stub")
        return options
    zoo = open_zoo(options.zoo, shipped.names(), os.environ, options.cache_dir)
    stubs: dict[str, Resolution] = {}
    for name in named:
        try:
            stubs[name] = resolve(getattr(options, name), STUB_OPTIONS[name], zoo)
        except ZooError as error:
            raise ZooError(f"--{name}: {error}") from None
    changes: dict[str, Any] = {name: resolution.value for name, resolution in stubs.items()}
    return replace(options, stubs=stubs, **changes)


def _completed(options: TrainOptions) -> TrainOptions:
    """The defaults that depend on other options, filled in as Hugging Face's TrainingArguments does."""
    own = {
        entry.name: default_of(entry, options.task)
        for entry in flag_fields(options.task)
        if entry.name not in options.explicit and options.task in entry.metadata["task_defaults"]
    }
    if own:
        options = replace(options, **own)
    if options.streaming and "validation_split_percentage" not in options.explicit:
        options = replace(options, validation_split_percentage=None)  # nothing is held out of a stream
    if options.eval_strategy != "no":
        options = replace(options, do_eval=True)
    if options.eval_strategy == "steps" and options.eval_steps is None:
        options = replace(options, eval_steps=options.logging_steps)
    if options.load_best_model_at_end and options.metric_for_best_model is None:
        options = replace(options, metric_for_best_model=_usual_metric(options))
    if options.metric_for_best_model is not None and options.greater_is_better is None:
        metric = options.metric_for_best_model.removeprefix("eval_")
        options = replace(options, greater_is_better=metric not in LOWER_IS_BETTER)
    if options.pad_to_max_length is None and (options.distill_include_padding or options.observe_padding):
        # Where padding takes part its amount matters: SparseML's is meant.
        options = replace(options, pad_to_max_length=True)
    if "batching" not in options.explicit and (options.pad_to_max_length or options.group_by_length):
        options = replace(options, batching="grouped" if options.group_by_length else "padded")
    return options


def _usual_metric(options: TrainOptions) -> str:
    """What tells the best checkpoint: the first metric of the task, or of GLUE's."""
    if options.task == TEXT and options.task_name is not None:
        return glue_task(options.task_name).metrics[0]
    return METRICS[options.task][0]


def canonical(name: str, value: Any, where: str, task: str) -> str | None:
    """The field that a flag's spelling stands for; None for a flag that is not offered but whose value asks for what
    happens anyway. Raises OptionError for an unknown flag, with the nearest names, for another task's, and for a refused
    one, with the reason."""
    spelling = name.replace("-", "_")
    names = flag_names()
    if spelling in names:
        entry = next(entry for entry in flag_fields() if entry.name == names[spelling])
        if has_task(entry, task):
            return entry.name
        if str(value).lower() in ("false", "none", ""):
            return None
        raise OptionError(f"{where}: belongs to {' and '.join(entry.metadata['tasks'])}; {task} has no use for it")
    if spelling == LOCAL_RANK_FLAG or spelling in REFUSED_FLAGS:
        message = refusal_message(spelling, "none" if value is None else str(value), os.environ.get("LOCAL_RANK"))
        if message is None:
            return None
        raise OptionError(message if where == f"--{name}" else f"{where}: {message}")
    own = [spelling for entry in flag_fields(task) for spelling in (entry.name, *entry.metadata["aliases"])]
    raise OptionError(f"{where}: no such option{did_you_mean(spelling, own)}")


def did_you_mean(spelling: str, names: Collection[str]) -> str:
    """A clause with the options that look like `spelling`, or where to find them all."""
    close = [f"--{name}" for name in nearest(spelling, names)]
    return f"; did you mean {' or '.join(close)}?" if close else "; `--help` lists them all"


def _read_mapping(path: Path, task: str) -> dict[str, Any]:
    """The options in a JSON or YAML file, by field name; the keys' order and spelling are the writer's."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise OptionError(f"{path}: a file of options ends in .json, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: cannot be read as a file of options: {error}") from error
    try:
        pairs = _json_pairs(text) if path.suffix == ".json" else _yaml_pairs(text)
    except ValueError as error:
        raise OptionError(f"{path}: {error}") from error
    given: dict[str, Any] = {}
    for key, value in pairs:
        where = f"{path}: {key}"
        name = key if key == "task" else canonical(key, value, where, task)
        if name in given:
            raise OptionError(f"{where}: {name} is given twice")
        # A null leaves an option out, as in Hugging Face's files.
        if name is not None and value is not None:
            given[name] = value
    return given


def _json_pairs(text: str) -> list[tuple[str, Any]]:
    """The members of a JSON object, repeated ones too. Raises ValueError."""
    repeated: list[tuple[str, Any]] = []

    def keep(members: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated[:] = members  # the outermost object comes last
        return dict(members)

    if not isinstance(json.loads(text, object_pairs_hook=keep), dict):
        raise ValueError('expected an object, {"option": value, ...}')
    return repeated


def _yaml_pairs(text: str) -> list[tuple[str, Any]]:
    """The entries of a YAML mapping, repeated ones too. Raises ValueError."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("expected a mapping, `option: value` lines")
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    keys = [str(key.value) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} given twice")
    return [(str(key), value) for key, value in values.items()]


def _convert(entry: Field[Any], raw: Any, where: str) -> Any:
    """`raw` (text from a command line, or a JSON/YAML value) as the field's type. Raises OptionError."""
    if isinstance(entry.default, tuple):
        items = [part.strip() for part in raw.split(",")] if isinstance(raw, str) else raw
        if not isinstance(items, list) or not items:
            raise OptionError(f"{where}: expected one or several names, got {raw!r}")
        return tuple(_chosen(entry, item, where) for item in items)
    if entry.name == "recipe_args" and isinstance(raw, Mapping):
        return json.dumps(raw)
    if raw is False and "no" in entry.metadata["choices"]:
        return "no"  # an unquoted `no` is a boolean in YAML
    kinds = value_kinds(entry)
    value = _from_text(raw, kinds) if isinstance(raw, str) else _from_json(raw, kinds)
    if value is None:
        expected = {"integer": "a whole number", "number": "a finite number"}.get(kind_name(entry), kind_name(entry))
        fraction = _number(str(raw), whole=False) if int in kinds else None
        is_share = fraction is not None and 0 < fraction < 1
        hint = "; a share of the run is not offered, count optimizer steps" if is_share else ""
        raise OptionError(f"{where}: expected {expected}, got {raw!r}{hint}")
    if isinstance(value, str):
        return _chosen(entry, value, where)
    return value if isinstance(value, bool) else _bounded(entry, value, where)


def _from_text(text: str, kinds: Collection[type]) -> bool | int | float | str | None:
    """The value that a word of a command line means for a field of these kinds, or None."""
    word = text.strip().lower()
    if bool in kinds and word in (("true", "false") if str in kinds else BOOLEAN_WORDS):
        return word in TRUE_WORDS
    if str in kinds:
        return text or None
    return None if bool in kinds else _number(text, whole=int in kinds)


def _from_json(raw: Any, kinds: Collection[type]) -> bool | int | float | None:
    """The value that a JSON or YAML value which is no text means for a field of these kinds, or None."""
    if isinstance(raw, bool):
        return raw if bool in kinds else None
    if not isinstance(raw, int | float) or not math.isfinite(raw):
        return None
    if float in kinds:
        return float(raw)
    if int in kinds:
        return int(raw) if raw == int(raw) else None
    return bool(raw) if bool in kinds and str not in kinds and raw in (0, 1) else None


def _number(text: str, whole: bool) -> float | int | None:
    """The number that `text` spells, or None when it spells none (or an infinite one)."""
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _chosen(entry: Field[Any], value: Any, where: str) -> str:
    choices = entry.metadata["choices"]
    if not isinstance(value, str):
        raise OptionError(f"{where}: expected text, got {value!r}")
    if choices and value not in choices:
        raise OptionError(
            f"{where}: {value!r} is not offered{suggestion(value, choices)} (one of {', '.join(choices)})"
        )
    return value


def _bounded(entry: Field[Any], value: float, where: str) -> float:
    limits = entry.metadata
    if limits["minimum"] is not None and value < limits["minimum"]:
        raise OptionError(f"{where}: must be at least {limits['minimum']}, got {value}")
    if limits["above"] is not None and value <= limits["above"]:
        raise OptionError(f"{where}: must be more than {limits['above']}, got {value}")
    if limits["maximum"] is not None and value > limits["maximum"]:
        raise OptionError(f"{where}: must be at most {limits['maximum']}, got {value}")
    if limits["below"] is not None and value >= limits["below"]:
        raise OptionError(f"{where}: must be less than {limits['below']}, got {value}")
    return value
