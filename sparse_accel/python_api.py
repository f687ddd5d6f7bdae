"""The program's commands as functions: `sparse_accel.train(...)` in a notebook, or in a script under `accelerate launch`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_type_hints

from sparse_accel.errors import OptionError, suggestion
from sparse_accel.onnx_export.options import ExportOptions
from sparse_accel.runtime.option_parsing import load_options
from sparse_accel.runtime.options import TrainOptions, flag_fields
from sparse_accel.serving.scoring import (
    FolderScore,
    ScoreOptions,
    check_output_dir,
    check_what_to_score,
    open_to_score,
    score,
    write_score,
)

if TYPE_CHECKING:
    from sparse_accel.onnx_export.report import ExportReport
    from sparse_accel.recipe.schema import Recipe
    from sparse_accel.runtime.prune import PruneReport
    from sparse_accel.runtime.run import TrainResult

Function = TypeVar("Function", bound=Callable[..., Any])

# Flags whose name is another than that of the field that they set.
_EXPORT_FLAGS: Final = {"format": "graph_format"}


def _with_keywords(names: Mapping[str, inspect.Parameter]) -> Callable[[Function], Function]:
    """Shows the keywords that a function really takes in place of its `**`: to `help` and to a notebook's completion."""

    def shown(function: Function) -> Function:
        own = inspect.signature(function)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        more = [parameter for name, parameter in names.items() if name not in own.parameters]
        function.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
        return function

    return shown


def _keyword(entry: dataclasses.Field[Any], hints: Mapping[str, Any], name: str | None = None) -> inspect.Parameter:
    default = inspect.Parameter.empty if entry.default is dataclasses.MISSING else entry.default
    return inspect.Parameter(
        name or entry.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[entry.name]
    )


def _flag_keywords() -> dict[str, inspect.Parameter]:
    hints = get_type_hints(TrainOptions)
    return {entry.name: _keyword(entry, hints) for entry in flag_fields()}


def _field_keywords(kind: Any, flags: Mapping[str, str] | None = None) -> dict[str, inspect.Parameter]:
    """The fields of a dataclass of options, by the names of their flags."""
    names = {field: flag for flag, field in (flags or {}).items()}
    hints = get_type_hints(kind)
    fields = {names.get(entry.name, entry.name): entry for entry in dataclasses.fields(kind)}
    return {name: _keyword(entry, hints, name) for name, entry in fields.items()}


@_with_keywords(_flag_keywords())
def train(
    task: str,
    *,
    recipe: str | Path | Recipe | None = None,
    recipe_args: str | Mapping[str, Any] | None = None,
    args_file: str | Path | None = None,
    **flags: Any,
) -> TrainResult:
    """Carry out `sparse_accel train TASK` in this process; the keywords are the command's flags.

        result = train("question_answering", model_name_or_path="pruned", train_file="train.json",
                       recipe="recipe.yaml", recipe_args={"num_epochs": 3}, output_dir="out", do_train=True)

    Values are Python's own, or text as on a command line; both are checked by the same code. `recipe` is a `Recipe`, a
    file, the name of a shipped one, or its text. A flag that is None is left out. `args_file` holds more flags; those
    given here win. Under `accelerate launch` every process calls this; it may be called again afterwards.

    Raises SparseAccelError (`sparse_accel.errors`) where the command ends with a message; the messages name flags as the
    command line spells them.
    """
    from sparse_accel.tasks import resolve_task

    given = {name: _plain(value) for name, value in flags.items() if value is not None}
    if recipe is not None:
        given["recipe"] = _recipe_text(recipe, recipe_args)
    if recipe_args is not None:
        given["recipe_args"] = _json_text(recipe_args) if isinstance(recipe_args, Mapping) else recipe_args
    options = load_options(resolve_task(task).name, given, args_file)
    from sparse_accel.runtime.in_process import train_in_process

    return train_in_process(options)


def _plain(value: Any) -> Any:
    """A Python value as a file of options could hold it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple | set | frozenset) else value


def _json_text(values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(values))
    except (TypeError, ValueError) as error:
        raise OptionError(f"recipe_args: {error}; numbers, text, lists and mappings can be given") from None


def _recipe_text(recipe: Any, recipe_args: Any) -> Any:
    """A recipe as the flag has it: a name, or the text of one that was read already."""
    from sparse_accel.recipe.schema import Recipe

    if not isinstance(recipe, Recipe):
        return _plain(recipe)
    if recipe_args is not None:
        raise OptionError("recipe_args: the recipe is read already; give them to Recipe.load(source, recipe_args)")
    for warning in recipe.warnings:  # its text has lost what they are about
        warnings.warn(warning, stacklevel=3)
    return recipe.to_yaml() if recipe.modifiers else None


def prune(
    model: str | Path,
    output_dir: str | Path,
    sparsity: float,
    *,
    scope: str = "layer",
    targets: Iterable[str] | None = None,
    overwrite: bool = False,
    zoo: str | None = None,
) -> PruneReport:
    """Set the smallest weights of a model to zero and save it: `sparse_accel prune`; see `runtime.prune.prune`."""
    from sparse_accel.cli.stubs import model_source
    from sparse_accel.folders.libraries import libraries_quiet
    from sparse_accel.runtime.prune import prune as prune_folder

    source = model_source(str(model), "model", zoo)
    with libraries_quiet():
        names = None if targets is None else list(targets)
        return prune_folder(source, output_dir, sparsity, scope=scope, targets=names, overwrite=overwrite)


@_with_keywords(_field_keywords(ExportOptions, _EXPORT_FLAGS))
def export(model_dir: str | Path, *, zoo: str | None = None, **options: Any) -> ExportReport:
    """Write a trained model as ONNX and prove that it computes the same: `sparse_accel export`, by whose flags the keywords
    are called.

        report = export("out", compress=True)
        print(report.passed, report.folder)

    Raises SparseAccelError; InvariantError where the graph is not what was trained.
    """
    from sparse_accel.cli.stubs import model_folder
    from sparse_accel.folders.libraries import libraries_quiet
    from sparse_accel.onnx_export.exporting import export as export_folder

    given = _fields_of(ExportOptions, options, "export", _EXPORT_FLAGS)
    if given.get("deployment_dir") is not None:
        given["deployment_dir"] = Path(given["deployment_dir"])
    with libraries_quiet():
        return export_folder(model_folder(Path(model_dir), "model_dir", zoo), ExportOptions(**given))


@_with_keywords(_field_keywords(ScoreOptions))
def evaluate(
    folder: str | Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    per_device_eval_batch_size: int = 8,
    output_dir: str | Path | None = None,
    zoo: str | None = None,
    **options: Any,
) -> FolderScore:
    """Score a deployment or model folder: `sparse_accel evaluate` for one folder, by whose flags the keywords are called.

        print(evaluate("out/deployment", validation_file="val.json").results["eval_f1"])

    Raises SparseAccelError.
    """
    from sparse_accel.cli.stubs import model_folder
    from sparse_accel.folders.libraries import libraries_quiet

    asked = ScoreOptions(**_fields_of(ScoreOptions, options, "evaluate"))
    check_what_to_score(asked)
    with libraries_quiet():
        if output_dir is not None:
            check_output_dir(Path(output_dir))
        opened = open_to_score(model_folder(Path(folder), "folder", zoo), asked, engine=engine, threads=threads)
        found = score(opened, asked, batch_size=per_device_eval_batch_size)
        if output_dir is not None:
            write_score(Path(output_dir), found)
    return found


def _fields_of(
    kind: Any, given: Mapping[str, Any], function: str, flags: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Keywords as the fields of a dataclass of options. Raises OptionError for one that there is not."""
    known = _field_keywords(kind, flags)
    for name in given:
        if name not in known:
            raise OptionError(f"{function}: there is no keyword {name!r}{suggestion(name, known)}")
    fields = flags or {}
    return {fields.get(name, name): _plain(value) for name, value in given.items()}
