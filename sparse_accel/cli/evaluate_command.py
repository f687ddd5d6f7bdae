"""The command `evaluate`: scores folders on a data set, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_accel.cli.stubs import ZooOption, model_folders
from sparse_accel.errors import OptionError

if TYPE_CHECKING:
    from rich.table import Table

    from sparse_accel.serving.scoring import FolderScore

_METRIC_NAMES = {"exact_match": "Exact match", "exact": "Exact match", "f1": "F1"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate")(evaluate_command)


def evaluate_command(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Deployment or model folder, or a zoo: stub; several are shown side by side, with the difference to the first.",
            metavar="FOLDER...",
        ),
    ],
    validation_file: Annotated[
        str | None,
        typer.Option(
            "--validation_file", help="Questions with answers: JSON, JSON lines, CSV or parquet.", show_default=False
        ),
    ] = None,
    dataset_name: Annotated[
        str | None,
        typer.Option(
            "--dataset_name",
            help="A data set of the hub, or a folder with one; its validation split.",
            show_default=False,
        ),
    ] = None,
    dataset_config_name: Annotated[
        str | None, typer.Option("--dataset_config_name", help="Its configuration.", show_default=False)
    ] = None,
    train_file: Annotated[
        str | None,
        typer.Option(
            "--train_file",
            help="Training's own file, of which the part is scored that one of the next two held out of training.",
            show_default=False,
        ),
    ] = None,
    validation_split_percentage: Annotated[
        int | None,
        typer.Option(
            "--validation_split_percentage",
            help="How much training held out, as its command said: the same rows are scored.",
            show_default=False,
        ),
    ] = None,
    validation_ratio: Annotated[
        float | None,
        typer.Option("--validation_ratio", help="The same as a share: 0.1 is 10 percent.", show_default=False),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            help="onnxruntime, openvino or torch; once for all folders, or once for each in order. Left out: ONNX Runtime"
            " for deployments, torch for model folders.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="Processor threads. Left out: the engine decides.", show_default=False),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--per_device_eval_batch_size", "--batch_size", help="Features in a batch.")
    ] = 8,
    max_eval_samples: Annotated[
        int | None,
        typer.Option("--max_eval_samples", help="Examples to score on. Left out: all.", show_default=False),
    ] = None,
    version_2_with_negative: Annotated[
        bool, typer.Option("--version_2_with_negative", help="Some questions have no answer (SQuAD 2).")
    ] = False,
    null_score_diff_threshold: Annotated[
        float | None,
        typer.Option(
            "--null_score_diff_threshold",
            help="How far the score of no answer must lie above the best answer's.",
            show_default=False,
        ),
    ] = None,
    max_seq_length: Annotated[
        int | None,
        typer.Option("--max_seq_length", help="Tokens in a window. Left out: the folder's own.", show_default=False),
    ] = None,
    doc_stride: Annotated[
        int | None,
        typer.Option(
            "--doc_stride", help="Tokens by which windows overlap. Left out: the folder's own.", show_default=False
        ),
    ] = None,
    n_best_size: Annotated[
        int | None, typer.Option("--n_best_size", help="Candidates that are kept.", show_default=False)
    ] = None,
    max_answer_length: Annotated[
        int | None, typer.Option("--max_answer_length", help="Tokens of the longest answer.", show_default=False)
    ] = None,
    question_column: Annotated[
        str | None, typer.Option("--question_column", help="Column with the questions.", show_default=False)
    ] = None,
    context_column: Annotated[
        str | None, typer.Option("--context_column", help="Column with the passages.", show_default=False)
    ] = None,
    answer_column: Annotated[
        str | None, typer.Option("--answer_column", help="Column with the answers.", show_default=False)
    ] = None,
    task_name: Annotated[
        str | None,
        typer.Option("--task_name", help="The task of GLUE, or of the tags. Left out: training's.", show_default=False),
    ] = None,
    input_column_names: Annotated[
        str | None,
        typer.Option(
            "--input_column_names", help="Column with the text, or two with a comma between.", show_default=False
        ),
    ] = None,
    text_column_name: Annotated[
        str | None, typer.Option("--text_column_name", help="Column with the words or the text.", show_default=False)
    ] = None,
    label_column_name: Annotated[
        str | None, typer.Option("--label_column_name", help="Column with the labels.", show_default=False)
    ] = None,
    return_entity_level_metrics: Annotated[
        bool, typer.Option("--return_entity_level_metrics", help="Token classification: scores of each kind as well.")
    ] = False,
    on_bad_rows: Annotated[
        str, typer.Option("--on_bad_rows", help="What a bad row of the data does.", metavar="error|skip")
    ] = "error",
    zoo: ZooOption = None,
    cache_dir: Annotated[
        str | None, typer.Option("--cache_dir", help="Folder for tokenized features and data sets.", show_default=False)
    ] = None,
    overwrite_cache: Annotated[bool, typer.Option("--overwrite_cache", help="Tokenize anew.")] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output_dir",
            help="Folder for eval_results.json and the predictions; with several FOLDERs, one in it for each. Left out:"
            " nothing is written.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Score deployments (ONNX Runtime, OpenVINO) and model folders (torch) with the features and metrics of training."""
    engines = _engines(engine or [], folders)
    from sparse_accel.serving.scoring import (
        ScoreOptions,
        check_output_dir,
        check_what_to_score,
        open_to_score,
        score,
        write_score,
    )

    options = ScoreOptions(
        validation_file=validation_file,
        dataset_name=dataset_name,
        dataset_config_name=dataset_config_name,
        train_file=train_file,
        validation_split_percentage=validation_split_percentage,
        validation_ratio=validation_ratio,
        max_eval_samples=max_eval_samples,
        max_seq_length=max_seq_length,
        doc_stride=doc_stride,
        n_best_size=n_best_size,
        max_answer_length=max_answer_length,
        # The flag can only say yes; without it, the folder knows.
        version_2_with_negative=version_2_with_negative or None,
        null_score_diff_threshold=null_score_diff_threshold,
        question_column=question_column,
        context_column=context_column,
        answer_column=answer_column,
        task_name=task_name,
        input_column_names=input_column_names,
        text_column_name=text_column_name,
        label_column_name=label_column_name,
        return_entity_level_metrics=return_entity_level_metrics or None,
        on_bad_rows=on_bad_rows,
        cache_dir=cache_dir,
        overwrite_cache=overwrite_cache,
    )
    check_what_to_score(options)
    names = _column_names(folders, engines)
    folders = model_folders(folders, "FOLDER", zoo)
    from rich.console import Console

    places: list[Path | None] = [None] * len(folders)
    if output_dir is not None:
        places = [output_dir / name if len(folders) > 1 else output_dir for name in names]
        check_output_dir(output_dir)
    opened = [
        open_to_score(folder, options, engine=chosen, threads=threads)
        for folder, chosen in zip(folders, engines, strict=True)
    ]
    tasks = {one.deployment.task for one in opened}
    if len(tasks) > 1:
        raise OptionError(
            f"evaluate: the folders are for different tasks ({', '.join(sorted(tasks))}): score each by itself"
        )
    say = Console(stderr=True, highlight=False)
    scores = []
    for one, name, place in zip(opened, names, places, strict=True):
        with _bar(say, name) as on_batch:
            found = score(one, options, batch_size=batch_size, on_batch=on_batch)
        for note in found.notes:
            say.print(f"note: {note}", markup=False, soft_wrap=True)
        if place is not None:
            check_output_dir(place)
            write_score(place, found)
        scores.append(found)
    console = Console(highlight=False)
    console.print(score_table(scores, names))
    if len({(found.facts.max_seq_length, found.facts.doc_stride) for found in scores}) > 1:
        say.print(
            "note: the folders were scored with different windows; --max_seq_length and --doc_stride make them equal"
        )
    if output_dir is not None:
        console.print(f"written to {output_dir}", markup=False, soft_wrap=True)
    return 0


def _engines(given: Sequence[str], folders: Sequence[Path]) -> list[str | None]:
    if len(given) > 1 and len(given) != len(folders):
        raise OptionError(f"--engine is given {len(given)} times for {len(folders)} folders: once, or once for each")
    return list(given) if len(given) > 1 else [given[0] if given else None] * len(folders)


def _column_names(folders: Sequence[Path], engines: Sequence[str | None]) -> list[str]:
    """The folders' names, made different by engine or number where two are the same."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{name}-{engine}" if engine else name for name, engine in zip(names, engines, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{number}-{name}" for number, name in enumerate(names, start=1)]
    return names


def score_table(scores: Sequence[FolderScore], names: Sequence[str]) -> Table:
    """A column for each folder; from the second on with the difference to the first (speed: the ratio)."""
    from rich.table import Table

    table = Table()
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    table.add_row("Engine", *(score.engine for score in scores))
    first = scores[0]
    for key in first.scored.metrics:
        if key.endswith(("total", "_thresh", "_number")):
            continue
        cells = []
        # Question answering counts in percent, the other tasks in shares of 1.
        digits = 2 if first.task == "question_answering" else 4
        for score in scores:
            value = score.scored.metrics[key]
            difference = "" if score is first else f" ({value - first.scored.metrics[key]:+.{digits}f})"
            cells.append(f"{value:.{digits}f}{difference}")
        table.add_row(_METRIC_NAMES.get(key, key.replace("_", " ")), *cells)
    table.add_row("Features", *(f"{score.num_features:,}" for score in scores))
    speeds = []
    for score in scores:
        ratio = "" if score is first else f" ({score.features_per_second / first.features_per_second:.2f}x)"
        speeds.append(f"{score.features_per_second:,.1f}{ratio}")
    table.add_row("Features/s", *speeds)
    return table


@contextmanager
def _bar(console: Any, name: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar with the time that is left, on a terminal; elsewhere nothing."""
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance
