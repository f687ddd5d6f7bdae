"""The command `predict`: answers questions, classifies texts, labels words, fills gaps; of arguments, files or input."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Final

import typer

from sparse_accel.cli import json_lines
from sparse_accel.cli.predict_masked import fill_masks, texts_of_file
from sparse_accel.cli.stubs import ZooOption, model_folder
from sparse_accel.errors import DataError, OptionError, OutputError, suggestion

if TYPE_CHECKING:
    from rich.console import Console

    from sparse_accel.serving.predicting import Answer, Predictor

# Characters of context shown on either side of an answer, when its sentence is longer.
_SHOWN: Final = 120
_SENTENCE_END: Final = re.compile(r"[.!?]['\")\]]*\s+|\n+")


@dataclass(frozen=True)
class _Asked:
    """One question, and a phrase that leads a person to it."""

    id: str
    question: str
    context: str
    where: str


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("predict")(predict_command)


def predict_command(
    deployment: Annotated[
        Path, typer.Argument(help="Deployment folder, a trained model folder, or a zoo: stub.", metavar="DEPLOYMENT")
    ],
    question: Annotated[
        list[str] | None, typer.Option("--question", help="A question; may be given several times.", show_default=False)
    ] = None,
    context: Annotated[
        str | None, typer.Option("--context", help="The text that holds the answer.", show_default=False)
    ] = None,
    context_file: Annotated[
        str | None,
        typer.Option("--context_file", help="A text file in its place; - is standard input.", show_default=False),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="A text to classify, to find names in, or with gaps such as [MASK]; may be given several times.",
            show_default=False,
        ),
    ] = None,
    text_pair: Annotated[
        list[str] | None,
        typer.Option("--text_pair", help="The second text of a pair; as often as --text.", show_default=False),
    ] = None,
    input_column_names: Annotated[
        str | None,
        typer.Option(
            "--input_column_names",
            help="Of --file: the column with the text, or two of them. Left out: training's.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            help="Rows with question and context, texts or tokens: JSON, JSON lines, CSV, parquet, SQuAD's, GLUE's or CoNLL's"
            " layout.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top_k", help="Fillings shown for each gap. Left out: 5.", show_default=False),
    ] = None,
    n_best: Annotated[
        int | None, typer.Option("--n_best", help="Show that many candidates for each question.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object a line: id and what was found, with scores and characters."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Write to this file, not to the screen.", show_default=False)
    ] = None,
    zoo: ZooOption = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="Left out: ONNX Runtime for a deployment, torch for a model folder.",
            metavar="onnxruntime|openvino|torch",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="Processor threads. Left out: the engine decides.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Windows in a batch.")] = 8,
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
    max_answer_length: Annotated[
        int | None, typer.Option("--max_answer_length", help="Tokens of the longest answer.", show_default=False)
    ] = None,
    on_bad_rows: Annotated[
        str,
        typer.Option(
            "--on_bad_rows", help="What a bad row does: end the command, or be left out.", metavar="error|skip"
        ),
    ] = "error",
) -> int:
    """Answer questions about texts, classify texts, label their words or fill their gaps, as the model does. Without
    --question, --text and --file, input is read from standard input, one JSON object a line with question and context (or
    text, text and text_pair, or tokens), and answered as it comes."""
    if on_bad_rows not in ("error", "skip"):
        raise OptionError(f"--on_bad_rows should be error or skip, it is {on_bad_rows!r}")
    _check_output(output)
    deployment = model_folder(deployment, "DEPLOYMENT", zoo)
    from sparse_accel.serving.deployment import task_of

    task = task_of(deployment)
    asking = {
        "question": question,
        "context": context,
        "context_file": context_file,
        "n_best": n_best,
        "doc_stride": doc_stride,
        "max_answer_length": max_answer_length,
    }
    engine_settings = _Engine(engine, threads, batch_size, max_seq_length)
    pairing = {"text_pair": text_pair, "input_column_names": input_column_names}
    if task == "masked_language_modeling":
        _refuse_foreign(asking | pairing, task, deployment)
        _fill_gaps(
            deployment,
            text or [],
            file,
            engine_settings,
            top_k=top_k,
            as_json=as_json,
            output=output,
            on_bad_rows=on_bad_rows,
        )
        return 0
    _refuse_foreign({"top_k": top_k}, task, deployment)
    if task == "text_classification":
        _refuse_foreign(asking, task, deployment)
        _classify(
            deployment,
            text or [],
            text_pair or [],
            file,
            input_column_names,
            engine_settings,
            as_json=as_json,
            output=output,
            on_bad_rows=on_bad_rows,
        )
        return 0
    if task == "token_classification":
        _refuse_foreign(asking | pairing, task, deployment)
        _label_words(
            deployment, text or [], file, engine_settings, as_json=as_json, output=output, on_bad_rows=on_bad_rows
        )
        return 0
    _refuse_foreign({"text": text, **pairing}, task, deployment)
    source = _source(question or [], context, context_file, file)
    from sparse_accel.serving.predicting import Predictor

    if source == "file":
        assert file is not None
        asked: Iterator[_Asked] = iter(_rows_of_file(file, on_bad_rows))
    elif source == "arguments":
        asked = iter(_from_arguments(question or [], context, context_file))
    else:
        asked = _from_lines(sys.stdin.buffer, on_bad_rows)
    predictor = Predictor(
        deployment,
        engine,
        threads=threads,
        batch_size=batch_size,
        max_seq_length=max_seq_length,
        doc_stride=doc_stride,
        max_answer_length=max_answer_length,
    )
    for note in predictor.notes:
        _say(f"note: {note}")
    with _opened(output) as stream:
        show = _JsonLines(stream) if as_json else _Readable(stream)
        for one, answer in _answered(predictor, asked, n_best, on_bad_rows, at_once=source == "lines"):
            show(one, answer)
    return 0


@dataclass(frozen=True)
class _Engine:
    """What runs the model, and how."""

    engine: str | None
    threads: int | None
    batch_size: int
    max_seq_length: int | None


def _refuse_foreign(options: Mapping[str, Any], task: str, folder: Path) -> None:
    """Raise OptionError for the first option that was given though a model for `task` has no use for it."""
    for name, value in options.items():
        if value is not None:
            raise OptionError(f"--{name}: {folder} is a model for {task.replace('_', ' ')}, which has no such option")


def _classify(
    folder: Path,
    texts: Sequence[str],
    pairs: Sequence[str],
    file: str | None,
    input_column_names: str | None,
    settings: _Engine,
    *,
    as_json: bool,
    output: Path | None,
    on_bad_rows: str,
) -> None:
    from sparse_accel.cli import predict_texts
    from sparse_accel.serving.text_predicting import TextPredictor
    from sparse_accel.tasks.text_rows import named_columns

    def refuse(message: str) -> None:
        _refuse(message, on_bad_rows)

    source = predict_texts.source_of(texts, pairs, file, has_input=not (sys.stdin is None or sys.stdin.isatty()))
    predictor = TextPredictor(
        folder,
        settings.engine,
        threads=settings.threads,
        batch_size=settings.batch_size,
        max_seq_length=settings.max_seq_length,
    )
    trained_with = predictor.deployment.facts.settings
    named = named_columns(input_column_names or trained_with.get("input_column_names"))
    label = trained_with.get("label_column_name") or "label"
    if source == "file":
        assert file is not None
        asked = predict_texts.from_file(
            file, named, label, trained_with.get("task_name"), refuse, lambda note: _say(f"note: {note}")
        )
    elif source == "arguments":
        if input_column_names is not None:
            raise OptionError("--input_column_names names columns of --file or of JSON lines, and --text has none")
        asked = iter(predict_texts.from_arguments(texts, pairs))
    else:
        asked = predict_texts.from_lines(sys.stdin.buffer, named, label, refuse)
    for note in predictor.notes:
        _say(f"note: {note}")
    with _opened(output) as stream:
        show = predict_texts.JsonLines(stream) if as_json else predict_texts.Readable(stream)
        for one, found in predict_texts.classified(predictor, asked, refuse, at_once=source == "lines"):
            show(one, found)


def _label_words(
    folder: Path,
    texts: Sequence[str],
    file: str | None,
    settings: _Engine,
    *,
    as_json: bool,
    output: Path | None,
    on_bad_rows: str,
) -> None:
    from sparse_accel.cli import predict_tokens
    from sparse_accel.serving.token_predicting import TokenPredictor

    def refuse(message: str) -> None:
        _refuse(message, on_bad_rows)

    source = predict_tokens.source_of(texts, file, has_input=not (sys.stdin is None or sys.stdin.isatty()))
    predictor = TokenPredictor(
        folder,
        settings.engine,
        threads=settings.threads,
        batch_size=settings.batch_size,
        max_seq_length=settings.max_seq_length,
    )
    named = predictor.deployment.facts.settings.get("text_column_name")
    if source == "file":
        assert file is not None
        asked = predict_tokens.from_file(file, named, refuse)
    elif source == "arguments":
        asked = iter(predict_tokens.from_arguments(texts))
    else:
        asked = predict_tokens.from_lines(sys.stdin.buffer, named, refuse)
    for note in predictor.notes:
        _say(f"note: {note}")
    with _opened(output) as stream:
        show = predict_tokens.JsonLines(stream) if as_json else predict_tokens.Readable(stream)
        for one, found in predict_tokens.tagged(predictor, asked, refuse, at_once=source == "lines"):
            show(one, found)


def _fill_gaps(
    folder: Path,
    texts: Sequence[str],
    file: str | None,
    settings: _Engine,
    *,
    top_k: int | None,
    as_json: bool,
    output: Path | None,
    on_bad_rows: str,
) -> None:
    if not texts and file is None:
        raise OptionError(
            f'{folder} is a masked language model: pass --text "Paris is the [MASK] of France.", or --file'
        )
    if texts and file is not None:
        raise OptionError("--text and --file: pass one of them")
    with _opened(output) as stream:
        fill_masks(
            folder,
            texts or texts_of_file(str(file), on_bad_rows, _say),
            stream,
            top_k=top_k,
            as_json=as_json,
            refuse=lambda message: _refuse(message, on_bad_rows),
            say=_say,
            engine=settings.engine,
            threads=settings.threads,
            batch_size=settings.batch_size,
            max_seq_length=settings.max_seq_length,
        )


def _source(questions: Sequence[str], context: str | None, context_file: str | None, file: str | None) -> str:
    """Where the questions come from: arguments, file or lines. Raises OptionError where that is not clear."""
    if context is not None and context_file is not None:
        raise OptionError("--context and --context_file contradict each other; pass one of them")
    has_context = context is not None or context_file is not None
    if file is not None:
        if questions or has_context:
            raise OptionError("--file brings questions and contexts; --question and --context do not go with it")
        return "file"
    if questions:
        if not has_context:
            raise OptionError("--question needs --context TEXT, or --context_file FILE (- is standard input)")
        return "arguments"
    if has_context:
        raise OptionError("a context without --question")
    if sys.stdin is None or sys.stdin.isatty():
        raise OptionError(
            "predict: no questions; pass --question TEXT and --context TEXT, or --file FILE, or pipe JSON lines with"
            ' "question" and "context" into it'
        )
    return "lines"


# --- questions --------------------------------------------------------------------------------------------------------


def _from_arguments(questions: Sequence[str], context: str | None, context_file: str | None) -> list[_Asked]:
    from sparse_accel.serving.predicting import problem_of

    where = "--context"
    if context is None:
        assert context_file is not None
        where = f"--context_file {context_file}"
        context = _read_text(context_file, where)
    if not context.strip():
        raise DataError(f"{where}: is empty")
    for number, question in enumerate(questions, start=1):
        problem = problem_of(question, context)
        if problem is not None:
            which = f" (number {number})" if len(questions) > 1 else ""
            raise DataError(f"--question{which}: {problem}")
    return [
        _Asked(f"row-{number}", question, context, f"--question {question!r}")
        for number, question in enumerate(questions, start=1)
    ]


def _read_text(name: str, where: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        # As Python reads text, so that offsets count the characters that it counts.
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 (byte {data[error.start]:#04x})") from error


def _rows_of_file(file: str, on_bad_rows: str) -> list[_Asked]:
    from sparse_accel.tasks.reading import read_file
    from sparse_accel.tasks.rows import BadRows
    from sparse_accel.tasks.squad_rows import check_rows

    bad = BadRows(on_bad_rows)
    examples, notes = check_rows(read_file(file), bad, answers="ignored")
    for note in [*notes, *([bad.note(file)] if bad.messages else [])]:
        _say(f"note: {note}")
    return [_Asked(example.id, example.question, example.context, example.where) for example in examples]


def _from_lines(stream: IO[bytes], on_bad_rows: str) -> Iterator[_Asked]:
    """Questions line by line, none read before it is asked for."""
    return json_lines.from_lines(
        stream, "'question' and 'context'", _from_object, lambda message: _refuse(message, on_bad_rows)
    )


def _from_object(row: Mapping[str, Any], number: int, where: str) -> _Asked:
    from sparse_accel.serving.predicting import problem_of

    for name in ("question", "context"):
        if name not in row:
            raise DataError(f"{where}: has no {name!r}{suggestion(name, row)}")
    name = json_lines.id_of(row, number, where)
    problem = problem_of(row["question"], row["context"])
    if problem is not None:
        raise DataError(f"{where}: {problem}")
    return _Asked(name, row["question"], row["context"], where)


def _refuse(message: str, on_bad_rows: str) -> None:
    """A row that cannot be answered: the end, or a line on standard error."""
    if on_bad_rows == "error":
        raise DataError(f"{message} (--on_bad_rows skip leaves such rows out)")
    _say(f"left out: {message}")


def _answered(
    predictor: Predictor, asked: Iterator[_Asked], n_best: int | None, on_bad_rows: str, *, at_once: bool
) -> Iterator[tuple[_Asked, Answer]]:
    """Questions with their answers. `at_once` reads no question before the last is answered."""
    from collections import deque

    waiting: deque[_Asked] = deque()

    def pairs() -> Iterator[tuple[str, str]]:
        for one in asked:
            waiting.append(one)
            yield one.question, one.context

    chunk = {"chunk": 1} if at_once else {}
    for answer in predictor.answers(pairs(), n_best=n_best, **chunk):
        one = waiting.popleft()
        if isinstance(answer, DataError):
            _refuse(f"{one.where}: {answer}", on_bad_rows)
        else:
            yield one, answer


# --- answers ----------------------------------------------------------------------------------------------------------


class _JsonLines:
    """One JSON object a line."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def __call__(self, one: _Asked, answer: Answer) -> None:
        """Write an answer."""
        found = asdict(answer)
        row = {"id": one.id, "question": one.question, "answer": found.pop("text"), **found}
        print(json.dumps(row, ensure_ascii=False), file=self.stream, flush=True)


class _Readable:
    """The question, the answer, and the sentence that it stands in."""

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console

        self.console: Console = Console(file=stream, highlight=False)

    def __call__(self, one: _Asked, answer: Answer) -> None:
        """Write an answer."""
        from rich.text import Text

        self._line(Text(one.question.strip(), style="bold"))
        self._line(_score_line(answer))
        if answer.text:
            before, text, after = sentence_around(one.context, answer.start, answer.end)
            self._line(
                Text("  ") + Text(before, style="dim") + Text(text, style="bold green") + Text(after, style="dim")
            )
        for rank, candidate in enumerate(answer.n_best, start=1):
            self._line(Text(f"  {rank}. ", style="dim") + _score_line(candidate))
        self.console.print()
        self.console.file.flush()

    def _line(self, text: Any) -> None:
        self.console.print(text, soft_wrap=True)


def _score_line(found: Any) -> Any:
    from rich.text import Text

    text = Text("  " if hasattr(found, "n_best") else "")
    if not found.text:
        return text + Text("no answer", style="italic") + Text(f"  (score {found.score:.3f})", style="dim")
    where = f"  (score {found.score:.3f}, characters {found.start} to {found.end})"
    return text + Text(" ".join(found.text.split()), style="bold green") + Text(where, style="dim")


def sentence_around(context: str, start: int, end: int) -> tuple[str, str, str]:
    """What stands before a span in its sentence, the span, and what stands behind it; on one line, long parts cut."""
    ends = [match.end() for match in _SENTENCE_END.finditer(context)]
    first = max((place for place in ends if place <= start), default=0)
    last = min((place for place in ends if place >= end), default=len(context))
    before, after = context[first:start], context[end:last].rstrip()
    before = "..." + before[-_SHOWN:] if len(before) > _SHOWN else before
    after = after[:_SHOWN] + "..." if len(after) > _SHOWN else after
    # Line breaks and runs of spaces, without joining what they part.
    return tuple(re.sub(r"\s+", " ", part) for part in (before, context[start:end], after))  # type: ignore[return-value]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_output(output: Path | None) -> None:
    if output is None:
        return
    if output.is_dir():
        raise OutputError(f"--output: {output} is a folder; name a file")
    if not output.absolute().parent.is_dir():
        raise OutputError(f"--output: there is no folder {output.parent}")
    if not os.access(output.absolute().parent, os.W_OK | os.X_OK):
        raise OutputError(f"--output: the folder {output.absolute().parent} may not be written to")


@contextmanager
def _opened(output: Path | None) -> Iterator[IO[str]]:
    """Where answers go. A file appears when all are there, or not at all."""
    if output is None:
        yield sys.stdout
        return
    from sparse_accel.tasks.files import replacing

    try:
        with replacing(output) as file:
            stream = io.TextIOWrapper(file, encoding="utf-8")
            yield stream
            stream.flush()
            # The wrapper would close the file that is still to be renamed.
            stream.detach()
    except OSError as error:
        raise OutputError(f"--output: {output} cannot be written: {error.strerror or error}") from error
