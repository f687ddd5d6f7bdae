"""The commands `recipe list|show|check|plan`: what there is, what one says, whether it holds, what it will do when."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_accel.errors import OptionError, OutputError
from sparse_accel.timeline import Clock

if TYPE_CHECKING:
    from sparse_accel.recipe.timeline_plan import Held, Timeline
    from sparse_accel.runtime.recipe_outlook import Outlook


_Args = Annotated[
    str | None,
    typer.Option(
        "--recipe_args",
        help="Values for the recipe's variables: JSON, or name=value,name=value.",
        metavar="TEXT",
        show_default=False,
    ),
]
_Name = Annotated[
    str,
    typer.Argument(help="A recipe file, or the name of a shipped recipe.", metavar="NAME_OR_PATH", show_default=False),
]
_Model = Annotated[
    str | None,
    typer.Option("--model", help="Model folder or hub id that the recipe is for.", metavar="DIR", show_default=False),
]
_Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="What --model is opened for. Left out: the task in a shipped recipe's name, else question_answering.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add `recipe` with its commands."""
    recipe = typer.Typer(
        help="Recipes: [bold]recipe list[/bold], [bold]show[/bold], [bold]check[/bold] or [bold]plan[/bold].",
        rich_markup_mode="rich",
    )
    recipe.command("list")(list_command)
    recipe.command("show")(show_command)
    recipe.command("check")(check_command)
    recipe.command("plan")(plan_command)
    app.add_typer(recipe, name="recipe")


def list_command() -> int:
    """The recipes that come with sparse_accel, with what each is for."""
    from sparse_accel.recipe import shipped

    names = shipped.names()
    for name in names:
        print(f"{name:<{max(map(len, names))}}  {shipped.purpose(name)}")
    return 0


def show_command(
    recipe: _Name,
    recipe_args: _Args = None,
    raw: Annotated[bool, typer.Option("--raw", help="The file as it is written, comments and all.")] = False,
) -> int:
    """A recipe as it would be carried out: every variable filled in, every default written."""
    from sparse_accel.recipe import reader
    from sparse_accel.recipe.schema import Recipe

    if raw:
        if recipe_args is not None:
            raise OptionError("--raw shows the recipe as it is written, without --recipe_args; leave one of them out")
        print(reader.read_raw(recipe), end="")
        return 0
    found = Recipe.load(recipe, recipe_args)
    _warn(found.warnings)
    print(found.to_yaml(), end="")
    return 0


def check_command(
    recipes: Annotated[
        list[str],
        typer.Argument(help="Recipe files or names of shipped recipes.", metavar="PATH...", show_default=False),
    ],
    recipe_args: _Args = None,
    model: _Model = None,
    task: _Task = None,
) -> int:
    """All that is wrong with recipes, at once and by line; with a model also what it does not have. Exit code 2 if anything
    is."""
    from sparse_accel.recipe.checking import check_recipe

    opened = _open(model, _task_of(recipes[0], task)) if model is not None else None
    num_problems = num_warnings = 0
    for name in recipes:
        found = check_recipe(name, recipe_args)
        problems, warnings = found.problems, found.warnings
        if found.recipe is not None and opened is not None:
            from sparse_accel.runtime.recipe_outlook import idle_on, target_problems

            problems = problems + target_problems(found.recipe, opened)
            warnings = warnings + idle_on(found.recipe, opened)
        for problem in problems:
            for line in str(problem).split("\n"):
                print(f"error: {line}")
        for warning in warnings:
            print(f"warning: {warning}")
        if not problems and not warnings:
            print(f"{_one_line(name)}: nothing is wrong")
        num_problems, num_warnings = num_problems + len(problems), num_warnings + len(warnings)
    print(f"{_count(len(recipes), 'recipe')}: {_count(num_problems, 'error')}, {_count(num_warnings, 'warning')}")
    return 2 if num_problems else 0


def plan_command(
    recipe: _Name,
    recipe_args: _Args = None,
    num_examples: Annotated[
        int | None,
        typer.Option("--num_examples", min=1, help="Training features of an epoch, if known.", show_default=False),
    ] = None,
    train_file: Annotated[
        str | None,
        typer.Option(
            "--train_file",
            help="Or the training data: its rows are counted, with --model the windows that training makes of them.",
            show_default=False,
        ),
    ] = None,
    max_train_samples: Annotated[
        int | None,
        typer.Option("--max_train_samples", min=1, help="Use only the first N training samples.", show_default=False),
    ] = None,
    max_seq_length: Annotated[int, typer.Option("--max_seq_length", min=1, help="Longest input, in tokens.")] = 384,
    doc_stride: Annotated[
        int | None,
        typer.Option(
            "--doc_stride",
            min=0,
            help="question_answering: tokens that neighbouring windows share. [dim](default: 128)[/dim]",
            show_default=False,
        ),
    ] = None,
    per_device_train_batch_size: Annotated[
        int, typer.Option("--per_device_train_batch_size", min=1, help="Features per process and micro-batch.")
    ] = 8,
    gradient_accumulation_steps: Annotated[
        int, typer.Option("--gradient_accumulation_steps", min=1, help="Micro-batches per optimizer step.")
    ] = 1,
    num_processes: Annotated[int, typer.Option("--num_processes", min=1, help="Processes that train together.")] = 1,
    num_train_epochs: Annotated[
        float, typer.Option("--num_train_epochs", help="Epochs, where the recipe names none.")
    ] = 3.0,
    model: _Model = None,
    task: _Task = None,
    distill_teacher: Annotated[
        str | None,
        typer.Option(
            "--distill_teacher",
            help="Folder of the teacher, or self: for the estimate.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw it, too: FILE.png or FILE.svg.", metavar="FILE", show_default=False),
    ] = None,
) -> int:
    """What a recipe does when, for given data and flags: learning rate, zeros, quantization, distillation; with a model also
    what of it is masked and quantized, and an estimate of memory and bytes."""
    from sparse_accel.recipe import timeline_plan
    from sparse_accel.recipe.schema import Recipe
    from sparse_accel.recipe.timeline_plot import SUFFIXES, can_plot
    from sparse_accel.recipe.timeline_plot import plot as draw

    if num_examples is not None and train_file is not None:
        raise OptionError("--num_examples and --train_file both say how much data there is; give one of them")
    if not num_train_epochs > 0:
        raise OptionError(f"--num_train_epochs: expected a number above 0, got {num_train_epochs:g}")
    if plot is not None and plot.suffix.lower() not in SUFFIXES:
        raise OptionError(f"--plot {plot}: its name should end in {' or '.join(SUFFIXES)}")
    if plot is not None and not can_plot():
        raise OptionError("--plot needs matplotlib: `python -m pip install 'sparse_accel[plot]'`")
    if distill_teacher is not None and model is None:
        raise OptionError("--distill_teacher is for the estimate of memory: give --model as well")
    found = Recipe.load(recipe, recipe_args)
    num_epochs = found.num_epochs or num_train_epochs
    found.check(num_epochs)
    task = _task_of(recipe, task)
    opened = _open(model, task) if model is not None else None
    notes: list[str] = []
    num_features = num_examples
    if train_file is not None:
        options = {"max_seq_length": max_seq_length, "doc_stride": doc_stride, "max_train_samples": max_train_samples}
        num_features, notes = _count_features(train_file, task, options, model, opened)
    elif num_features is not None and max_train_samples is not None:
        num_features = min(num_features, max_train_samples)

    steps_per_epoch = timeline_plan.NOMINAL_STEPS
    if num_features is not None:
        from sparse_accel.runtime.batches import StepSampler

        sampler = StepSampler(
            num_features, per_device_train_batch_size, gradient_accumulation_steps, seed=0, world_size=num_processes
        )
        steps_per_epoch = sampler.steps_per_epoch
        per_step = sampler.features_per_step
        header = (
            f"{num_features:,} features, {per_step} a step: {steps_per_epoch:,} steps an epoch, {num_epochs:g} epochs, "
            f"{Clock(0, steps_per_epoch).step_of(num_epochs):,} steps"
        )
    else:
        header = f"{num_epochs:g} epochs; --num_examples or --train_file tells how many steps they are"
    plan = timeline_plan.timeline(found, num_epochs, steps_per_epoch)
    ahead = None
    if opened is not None:
        from sparse_accel.recipe.schema import together
        from sparse_accel.runtime.recipe_outlook import idle_on, outlook, target_problems

        problems = target_problems(found, opened)
        if problems:
            raise together(problems)
        notes += idle_on(found, opened)
        ahead = outlook(
            found,
            opened,
            num_processes=num_processes,
            batch_size=per_device_train_batch_size,
            sequence_length=max_seq_length,
            num_teacher_parameters=_teacher_parameters(distill_teacher, opened),
        )

    _warn([*found.warnings, *plan.warnings, *notes])
    title = f"{_one_line(recipe)}: {header}"
    _print_plan(title, plan, ahead)
    if plot is not None:
        _draw(draw, plan, plot, title, ahead.held if ahead is not None else None)
    return 0


def _task_of(recipe: str, asked: str | None) -> str:
    """The task that is asked for, else the one that a shipped recipe's name begins with. Raises OptionError."""
    from sparse_accel.tasks import TASKS, resolve_task

    named = recipe.partition("/")[0]
    return resolve_task(asked or (named if named in TASKS else "question_answering")).name


def _open(model: str, task: str) -> Any:
    """The model with the task's head."""
    from sparse_accel.folders.libraries import quiet_libraries
    from sparse_accel.folders.loading import HUB_DEFAULTS, load_model
    from sparse_accel.tasks import resolve_task

    quiet_libraries()
    return load_model(model, resolve_task(task), HUB_DEFAULTS, "--model")[0]


def _count_features(
    train_file: str, task: str, options: Mapping[str, Any], model: str | None, opened: Any
) -> tuple[int, list[str]]:
    """How many features training would make of a file, and what there is to say about that."""
    from sparse_accel.folders.loading import HUB_DEFAULTS, has_tokenizer, load_tokenizer
    from sparse_accel.tasks import resolve_task

    if model is None or not has_tokenizer(model):
        most = options["max_train_samples"]
        count = len(_rows_of(train_file, task)[:most])
        why = "--model says how text is cut" if model is None else f"{model} has no tokenizer"
        return count, [
            f"{train_file}: its {count:,} rows are taken for as many features, though a long text makes several; {why}"
        ]
    from sparse_accel.runtime.option_parsing import load_options
    from sparse_accel.runtime.setup import max_positions

    given = {name: value for name, value in options.items() if value is not None}
    given |= {"train_file": train_file, "model_name_or_path": model, "output_dir": "unused", "do_train": True}
    found = resolve_task(task)
    train_options = load_options(found.name, given)
    data = found.load(
        train_options, load_tokenizer(model, HUB_DEFAULTS, "--model"), max_positions=max_positions(opened)
    )
    assert data.train is not None  # do_train asked for it
    return len(data.train), list(data.notes)


def _rows_of(train_file: str, task: str) -> Sequence[Any]:
    """The rows of a training file: lines or sentences, where the task reads such files."""
    if task == "masked_language_modeling":
        from sparse_accel.tasks.mlm_rows import read_lines

        return [row for row in read_lines(train_file) if str(row.values.get("text", "-")).strip()]
    from sparse_accel.tasks.conll import SUFFIXES, read_conll
    from sparse_accel.tasks.reading import read_file

    conll = functools.partial(read_conll, words="tokens", tags="ner_tags")
    return read_file(train_file, dict.fromkeys(SUFFIXES, conll) if task == "token_classification" else None)


def _teacher_parameters(teacher: str | None, student: Any) -> int:
    if teacher is None or teacher == "disable":
        return 0
    if teacher == "self":
        return sum(parameter.numel() for parameter in student.parameters())
    from sparse_accel.runtime.launch_advice import model_size

    return model_size(Path(teacher), "--distill_teacher").num_parameters


def _print_plan(title: str, plan: Timeline, ahead: Outlook | None) -> None:
    from sparse_accel.recipe.timeline_plan import notes, table

    print(title)
    held = ahead.held if ahead is not None else None
    _print_table(*table(plan, held))
    for line in notes(plan, held):
        print(line)
    if ahead is None:
        return
    rows = [
        [
            row.count.kind,
            f"{row.count.numel:,}",
            f"{row.count.sparsity:.1%}",
            str(row.masked or "-"),
            str(row.count.quantized or "-"),
        ]
        for row in ahead.kinds
    ]
    print()
    _print_table(["layers", "parameters", "zeros", "masked modules", "quantized modules"], rows, num_words=1)
    memory, on_disk = ahead.memory, ahead.bytes
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "teacher": memory.teacher,
    }
    listed = ", ".join(f"{name} {_bytes(value)}" for name, value in parts.items() if value)
    print(f"memory of each process, roughly, in float32: {_bytes(memory.total)} ({listed})")
    if ahead.compact:
        print(f"{ahead.compact} masked layers are stored compact: gradients and optimizer have what is kept")
    print(f"on disk: a checkpoint {_bytes(on_disk.checkpoint)}, the model {_bytes(on_disk.model)}")
    if on_disk.deployed < on_disk.model or on_disk.packed < on_disk.model:
        print(f"deployed: {_bytes(on_disk.deployed)}, with `export --compress` {_bytes(on_disk.packed)}")


def _draw(draw: Any, plan: Timeline, path: Path, title: str, held: Held | None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(plan, path, title, held)
    except OSError as error:
        raise OutputError(f"--plot {path}: cannot be written: {error.strerror or error}") from None
    print(f"drawn: {path}")


def _print_table(headings: list[str], rows: list[list[str]], num_words: int | None = None) -> None:
    """A table as wide as the terminal allows; the columns after the first `num_words` are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        is_number = num_words is not None and index >= num_words
        # What comes first is looked for; it stays in one piece.
        shown.add_column(heading, justify="right" if is_number else "left", no_wrap=index == 0, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown, highlight=False, markup=False)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _one_line(recipe: str) -> str:
    """A recipe's name; one that was given as text has none."""
    return "the recipe" if "\n" in recipe else recipe


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
