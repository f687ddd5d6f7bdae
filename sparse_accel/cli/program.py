"""The commands as typer shows and parses them; those with a file of their own are registered here."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any, Final

import typer

import sparse_accel
from sparse_accel.cli import (
    benchmark_command,
    decompress_command,
    evaluate_command,
    export_command,
    inspect_command,
    launch_config_command,
    predict_command,
    recipe_command,
    zoo_command,
)
from sparse_accel.cli.arguments import CommandLine, Flag, command_name, normalise, unknown_option
from sparse_accel.cli.stubs import ZooOption, model_source
from sparse_accel.errors import LaunchError, OptionError
from sparse_accel.runtime.launch import check_environment, check_installed, requested_world_size
from sparse_accel.runtime.option_parsing import canonical, load_options
from sparse_accel.runtime.options import (
    BOOLEAN_WORDS,
    METRICS,
    MLM,
    QA,
    TEXT,
    TOKEN,
    TRUE_WORDS,
    default_of,
    flag_fields,
    is_switch,
    kind_name,
)
from sparse_accel.tasks import ALIASES, TASKS

# typer carries its own click, whose base class of usage errors is public only through its children.
UsageError: Final[type[Any]] = typer.BadParameter.__mro__[2]

# The words of the command line that name a task -> the task.
TASK_WORDS: Final = {**{task: task for task in TASKS}, **ALIASES}

# What the help of each task's command begins with.
_SUMMARIES: Final = {
    QA: "Train, score or predict on questions about passages (SQuAD's format).",
    TEXT: "Train, score or predict on texts and pairs of texts: classes, several labels each, or numbers (GLUE's tasks).",
    TOKEN: "Train, score or predict on the words of sentences: named entities and other tags (CoNLL's format).",
    MLM: "Train or score a model that restores masked words, and prune it for all tasks that start from it.",
}

# Commands that have commands of their own -> what is asked where none is named.
_GROUPS: Final = {"benchmark": "of what", "recipe": "to do what"}

# Parameters whose option may stand without a value -> what it then stands for, and how a word ends that is its value.
_OPTIONAL_VALUES: Final = {"as_json": (inspect_command.TERMINAL, ".json")}

app = typer.Typer(
    name="sparse_accel",
    help="Train sparse and quantized transformers with SparseML recipes, on one process or many.",
    add_completion=False,
    rich_markup_mode="rich",
)
train_app = typer.Typer(
    help="Fine-tune a model with a recipe: [bold]train question_answering[/bold] (or [bold]qa[/bold]), and other tasks.",
    rich_markup_mode="rich",
)
app.add_typer(train_app, name="train")


def _parameter(entry: Field[Any], task: str) -> inspect.Parameter:
    """A flag as typer wants it. Every value is text here: `load_options` converts and checks, for files of options
    too."""
    note = "".join(f" Also: --{alias}." for alias in entry.metadata["aliases"])
    if entry.name == "metric_for_best_model":
        note += f" One of: {', '.join(METRICS[task])}."
    default = default_of(entry, task)
    if default is MISSING:
        note += " [bold red]Required.[/bold red]"
    elif default not in (None, False):
        default = ",".join(default) if isinstance(default, tuple) else default
        note += f" [dim](default: {default})[/dim]"
    option = typer.Option(
        f"--{entry.name}",
        help=entry.metadata["help"] + note,
        metavar=kind_name(entry),
        rich_help_panel=entry.metadata["group"],
        show_default=False,
    )
    return inspect.Parameter(
        entry.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


def _train_command(task: str) -> Callable[..., int]:
    """The command that trains `task`, with one option for each field of TrainOptions."""

    def command(args_file: Path | None = None, **flags: str | None) -> int:
        check_environment(os.environ)
        check_installed(os.environ)
        given = {name: value for name, value in flags.items() if value is not None}
        options = load_options(task, given, args_file)
        from sparse_accel.runtime.run import leave_processes, train

        train(options)
        leave_processes()
        return 0

    file = typer.Argument(
        help="A JSON or YAML file of options; flags win over it.", metavar="ARGS_FILE", show_default=False
    )
    positional = inspect.Parameter(
        "args_file",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Annotated[Path | None, file],
    )
    parameters = [positional, *(_parameter(entry, task) for entry in flag_fields(task))]
    command.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": int}
    command.__doc__ = (
        f"{_SUMMARIES[task]}\n\nOptions take `_` or `-`; switches stand alone or take True or False. Where a recipe speaks"
        " of learning rate, weight decay or epochs, the recipe wins."
    )
    return command


for _task in TASKS:
    train_app.command(_task)(_train_command(_task))


@train_app.callback()
def _train() -> None:
    """Keeps the task a word of its own while there is only one."""


@app.callback()
def _program() -> None:
    """Holds the commands."""


@app.command("prune")
def prune_command(
    model: Annotated[str, typer.Argument(help="Model folder, hub id or zoo: stub to prune.", metavar="MODEL")],
    sparsity: Annotated[float, typer.Option("--sparsity", help="Share of zeros to reach: 0.8 is 80 percent.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder for the pruned model.")],
    scope: Annotated[
        str | None,
        typer.Option(
            "--scope",
            help="layer: every weight gets this sparsity; global: all of them together do. [dim](default: layer)[/dim]",
            metavar="layer|global",
            show_default=False,
        ),
    ] = None,
    use_global: Annotated[bool, typer.Option("--global", help="The same as --scope global.")] = False,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            help="Weights to prune, by name or re:PATTERN; may be given several times. Left out: those of all"
            " linear and"
            " convolution layers but the task's head.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model in an output folder that is not empty.")
    ] = False,
    zoo: ZooOption = None,
) -> int:
    """Set the smallest weights of a model to zero: a pruned start for those who have none."""
    if use_global and scope not in (None, "global"):
        raise OptionError(f"--global and --scope {scope} contradict each other")
    model = model_source(model, "MODEL", zoo)
    from sparse_accel.runtime.prune import print_report, prune

    print_report(
        prune(
            model,
            output_dir,
            sparsity,
            scope="global" if use_global else scope or "layer",
            targets=targets,
            overwrite=overwrite,
        )
    )
    return 0


@app.command("demo")
def demo_command(
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder for all that the demo makes.")] = Path(
        "demo_run"
    ),
    train_questions: Annotated[
        int | None, typer.Option("--train_questions", help="Questions to train on.", show_default=False)
    ] = None,
    validation_questions: Annotated[
        int | None, typer.Option("--validation_questions", help="Questions to score on.", show_default=False)
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="Share of zeros in the encoder.", show_default=False)
    ] = None,
    teacher_epochs: Annotated[
        float | None, typer.Option("--teacher_epochs", help="Epochs of the dense teacher.", show_default=False)
    ] = None,
    student_epochs: Annotated[
        float | None, typer.Option("--student_epochs", help="Epochs of the sparse student.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of corpus and training.", show_default=False)] = None,
) -> int:
    """Make a corpus, train a dense teacher and a sparse, quantized student on it, and compare them; needs no
    network."""
    from sparse_accel.cli.demo import DemoSettings, run_demo

    settings: dict[str, Any] = {
        "train_questions": train_questions,
        "validation_questions": validation_questions,
        "sparsity": sparsity,
        "teacher_epochs": teacher_epochs,
        "student_epochs": student_epochs,
        "seed": seed,
    }
    run_demo(output_dir, DemoSettings(**{name: value for name, value in settings.items() if value is not None}))
    return 0


def _check_one_process(command: str) -> None:
    size = requested_world_size(os.environ) or 1
    if size > 1:
        raise LaunchError(
            f"{command}: runs in one process, but {size} were launched; start it as `sparse_accel {command}`"
        )


for _module in (
    export_command,
    evaluate_command,
    predict_command,
    benchmark_command,
    decompress_command,
    inspect_command,
    launch_config_command,
    recipe_command,
    zoo_command,
):
    _module.register(app)


def _train_line(task: str) -> CommandLine:
    flags = {
        spelling: Flag(
            entry.name,
            is_switch=is_switch(entry),
            choices=entry.metadata["choices"] if isinstance(entry.default, tuple) else (),
        )
        for entry in flag_fields(task)
        for spelling in (entry.name, *entry.metadata["aliases"])
    }

    def refuse(spelling: str, value: str, where: str) -> None:
        """An option that the task does not have: raises why, unless its value asks for what happens anyway."""
        canonical(spelling, value, where, task)

    return CommandLine(flags, refuse)


def _plain_words(words: list[str], command: Any) -> list[str]:
    """The words of a command that typer alone describes."""
    flags, negations = {}, {}
    for parameter in command.params:
        for spelling in (text.removeprefix("--") for text in parameter.opts if text.startswith("--")):
            alone, ending = _OPTIONAL_VALUES.get(parameter.name, (None, ""))
            is_switch = getattr(parameter, "is_flag", False)
            flags[spelling.replace("-", "_")] = Flag(spelling, is_switch, alone=alone, ending=ending)
            negations[spelling] = next(iter(parameter.secondary_opts), None)
    line = CommandLine(flags, unknown_option(flags))
    return _native_switches(normalise(words, line), line, negations)


def _words_of_group(group: str, words: list[str], members: Mapping[str, Any]) -> list[str]:
    """The words after the name of a group of commands: one of its members comes first."""
    if not words:
        raise OptionError(
            f"{group}: {_GROUPS[group]}? One of {', '.join(members)}: `sparse_accel {group} {next(iter(members))} ...`"
        )
    if words[0] in ("--help", "-h"):
        return ["--help"]
    if words[0].startswith("-"):
        raise OptionError(f"{words[0]}: comes after one of {group}'s commands: {', '.join(members)}")
    name = command_name(words[0], members, f"{group} command")
    return [name, *_plain_words(words[1:], members[name])]


def _zoo_words(words: list[str], actions: Mapping[str, Any]) -> list[str]:
    """The words after `zoo`: what is done comes first."""
    if not words:
        raise OptionError(f"zoo: what? `sparse_accel zoo {'|'.join(actions)}`")
    if words[0] in ("--help", "-h"):
        return ["--help"]
    if words[0].startswith("zoo:"):
        raise OptionError(f"zoo: what with the stub? `sparse_accel zoo resolve {words[0]}`")
    name = command_name(words[0], actions, "action")
    return [name, *_plain_words(words[1:], actions[name])]


def parse(argv: list[str]) -> list[str]:
    """A person's command line in the one spelling that typer reads. Raises OptionError."""
    if not argv or argv[0] in ("--help", "-h"):
        return ["--help"]
    program = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if argv[0].startswith("-"):
        raise OptionError(f"{argv[0]}: comes after a command; commands: {', '.join(program)}")
    name = command_name(argv[0], program)
    rest = argv[1:]
    if name == "zoo":
        return [name, *_zoo_words(rest, program[name].commands)]
    if name in _GROUPS:
        return [name, *_words_of_group(name, rest, program[name].commands)]
    if name != "train":
        return [name, *_plain_words(rest, program[name])]
    if not rest:
        raise OptionError(f"train: which task? One of {', '.join(TASKS)}: `sparse_accel train {next(iter(TASKS))} ...`")
    if rest[0] in ("--help", "-h"):
        return [name, "--help"]
    if rest[0].startswith("-"):
        raise OptionError(f"{rest[0]}: the task comes first: `sparse_accel train question_answering {rest[0]} ...`")
    task = TASK_WORDS[command_name(rest[0], TASK_WORDS, "task")]
    return [name, task, *normalise(rest[1:], _train_line(task))]


def _native_switches(words: list[str], line: CommandLine, negations: Mapping[str, str | None]) -> list[str]:
    """`--name=true` as `--name`, and `--name=false` as the switch that negates it, or left out where there is none, for
    the switches that typer itself parses."""
    switches = {flag.name for flag in line.flags.values() if flag.is_switch}
    kept = []
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in switches:
            kept.append(word)
        elif value.lower() not in BOOLEAN_WORDS:
            raise OptionError(f"--{name}: expected True|False, got {value!r}")
        elif value.lower() in TRUE_WORDS:
            kept.append(f"--{name}")
        elif negations[name] is not None:
            kept.append(str(negations[name]))
    return kept


def run_command(argv: list[str], speaks: bool) -> int:
    """Run a command line and return its exit code. `speaks` is whether this process may print help: only one of a
    run's may. Raises SparseAccelError, UsageError, and whatever a command raises."""
    if argv == ["--version"]:
        if speaks:
            print(f"sparse_accel {sparse_accel.__version__}")
        return 0
    words = parse(argv)
    if "--help" in words and not speaks:
        return 0
    if words[0] not in ("train", "--help") and "--help" not in words:
        _check_one_process(words[0])
    code: int = app(words, prog_name="sparse_accel", standalone_mode=False) or 0
    if code == 130:  # what typer makes of an interrupt: no command returns it
        raise KeyboardInterrupt
    return code
