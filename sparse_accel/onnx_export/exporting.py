"""Exports a trained model: captures its graph, runs the passes, writes a deployment and proves it."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import onnx_ir as ir

import sparse_accel
from sparse_accel.compress.plan import set_phase
from sparse_accel.compress.ranges import Phase, without_range
from sparse_accel.errors import InvariantError, ModelError, OptionError, OutputError, suggestion
from sparse_accel.folders.storage import compress_folder
from sparse_accel.folders.trained import TrainedModel, open_trained
from sparse_accel.onnx_export import deployment
from sparse_accel.onnx_export.capture import capture, unsupported
from sparse_accel.onnx_export.graph_census import (
    MatMuls,
    census_of,
    check_census,
    check_kernels,
    expected_matmuls,
    integer_kernels,
    num_calls,
)
from sparse_accel.onnx_export.options import DEFAULT_OPSET, ExportOptions
from sparse_accel.onnx_export.parity import FLOAT_TOLERANCES, INT8_TOLERANCES, compare, rounding_noise
from sparse_accel.onnx_export.pipeline import PIPELINES, run_passes
from sparse_accel.onnx_export.report import REPORT_FILE, Check, ExportReport, Sizes
from sparse_accel.onnx_export.sample_inputs import Samples, check_batches, write_samples
from sparse_accel.reports.run_files import tell_of_export
from sparse_accel.serving.deployment import Deployment, read_deployment
from sparse_accel.serving.engines import OrtEngine, TorchEngine
from sparse_accel.tasks import resolve_task

if TYPE_CHECKING:
    from sparse_accel.tasks.base import Task

# The first opset whose QuantizeLinear the exporter writes without conversion, and the last that it knows.
OPSETS: Final = range(18, 24)
FLOAT_GRAPH_FILE: Final = "model_float.onnx"
COMPRESSED_FOLDER: Final = "compressed"
_INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids")
# A protobuf message ends at 2 GiB: larger weights lie in a file of their own.
_LARGEST_FILE: Final = 1_800_000_000


def export(model_dir: str | Path, options: ExportOptions) -> ExportReport:
    """Write the deployment of a trained model folder and return what it holds and how well it agrees with torch.

    Raises OptionError, ModelError, DataError and OutputError before anything is written, and InvariantError when the
    graph is not what the plan says or differs from torch by more than the tolerances: it then lies in
    `<deployment_dir>.failed`, with its report.
    """
    folder = Path(model_dir)
    _check_options(options)
    target = options.deployment_dir or folder / "deployment"
    deployment.check_target(target, folder, options.overwrite)
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        described = _described(folder, options.task)
        _check_length(described, options)
        task = resolve_task(described.task)
        trained = open_trained(folder, task)
    graph_format = _graph_format(trained, options)
    with deployment.published(target) as partial:
        deployment.write_companions(trained, task, options.sequence_length, options.layout, partial)
        graph = partial / deployment.LAYOUTS[options.layout] / options.onnx_file_name
        graph.parent.mkdir(exist_ok=True)
        with _timed(seconds, "graph"):
            export_graph(
                trained,
                task,
                graph,
                graph_format=graph_format,
                opset=options.opset,
                sequence_length=options.sequence_length,
            )
        if options.keep_float and graph_format != "float":
            with _timed(seconds, "float graph"):
                export_graph(
                    trained,
                    task,
                    graph.with_name(FLOAT_GRAPH_FILE),
                    graph_format="float",
                    opset=options.opset,
                    sequence_length=options.sequence_length,
                )
        if options.compress:
            with _timed(seconds, "compression"):
                compress_folder(folder, partial / COMPRESSED_FOLDER)
        report = _prove(trained, task, graph, partial, target, graph_format, options, seconds)
        (partial / REPORT_FILE).write_text(json.dumps(report.to_json(), indent=2) + "\n", "utf-8")
        if not report.passed:
            raise InvariantError(
                f"{folder}: the exported graph is not what was trained: {'; '.join(report.failures)}. It lies in "
                f"{target}.failed, with {REPORT_FILE}"
            )
    problem = tell_of_export(folder, target, target / REPORT_FILE)
    return report if problem is None else replace(report, notes=(*report.notes, problem))


def export_graph(
    trained: TrainedModel,
    task: Task,
    path: Path,
    *,
    graph_format: str = "qdq",
    opset: int = DEFAULT_OPSET,
    sequence_length: int | None = None,
) -> None:
    """Write the model's graph in one of the formats of PIPELINES to `path`.

    Raises ModelError when the model cannot be captured, or has quantizers without an integer form or without a range
    that its forward uses.
    """
    if graph_format not in PIPELINES:
        raise OptionError(f"--format: {graph_format!r} is not offered{suggestion(graph_format, PIPELINES)}")
    if graph_format != "float":
        _check_quantizers(trained)
    names = graph_inputs(trained.model, trained.tokenizer)
    with _without_quantizers(trained) if graph_format == "float" else nullcontext():
        try:
            model = capture(trained.model, names, task.output_keys, opset=opset, sequence_length=sequence_length)
        except Exception as error:  # torch.export raises a large family without a common name
            raise ModelError(
                f"{trained.folder}: {type(trained.model).__name__} cannot be captured as a graph: {_first_line(error)}"
            ) from error
    run_passes(model, graph_format)
    model.producer_name, model.producer_version = "sparse_accel", sparse_accel.__version__
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    try:
        ir.save(model, path, external_data=f"{path.name}.data" if size > _LARGEST_FILE else None)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def _described(folder: Path, asked: str | None) -> Deployment:
    """What the folder's files say of its model, before it is opened; `asked` must be its task."""
    described = read_deployment(folder)
    if asked is not None and resolve_task(asked).name != described.task:
        raise OptionError(
            f"--task {asked}: {folder} is a model for {described.task}; leave --task out, or name that folder's task"
        )
    return described


def graph_inputs(model: Any, tokenizer: Any) -> tuple[str, ...]:
    """What the graph is fed: the tokenizer's outputs that the model's forward takes."""
    accepted = inspect.signature(model.forward).parameters
    return tuple(name for name in _INPUTS if name in accepted and name in tokenizer.model_input_names)


# --- checks before ----------------------------------------------------------------------------------------------------


def _check_options(options: ExportOptions) -> None:
    if options.opset not in OPSETS:
        raise OptionError(f"--opset: {OPSETS[0]} to {OPSETS[-1]} are offered, got {options.opset}")
    if options.layout not in deployment.LAYOUTS:
        raise OptionError(
            f"--layout: {options.layout!r} is not offered{suggestion(options.layout, deployment.LAYOUTS)}"
        )
    if options.graph_format is not None and options.graph_format not in PIPELINES:
        raise OptionError(
            f"--format: {options.graph_format!r} is not offered{suggestion(options.graph_format, PIPELINES)}"
        )
    name = options.onnx_file_name
    if Path(name).name != name or not name.endswith(".onnx"):
        raise OptionError(f"--onnx_file_name: expected a plain name that ends in .onnx, got {name!r}")
    for option, value, least in (
        ("sequence_length", options.sequence_length, 8),
        ("num_export_samples", options.num_export_samples, 0),
        ("num_check_features", options.num_check_features, 1),
    ):
        if value is not None and value < least:
            raise OptionError(f"--{option}: {least} or more, got {value}")
    if options.validation_file is not None and not Path(options.validation_file).is_file():
        raise OptionError(f"--validation_file: no such file: {options.validation_file}")


def _graph_format(trained: TrainedModel, options: ExportOptions) -> str:
    has_quantizers = trained.plan.num_quantizers > 0
    chosen = options.graph_format or ("qdq" if has_quantizers else "float")
    if chosen != "float" and not has_quantizers:
        raise OptionError(
            f"--format {chosen}: {trained.folder} holds no quantized model (no compression_plan.json with ranges), so that "
            "there is nothing to write as integers; train with a QuantizationModifier, or pass --format float"
        )
    return chosen


def _check_length(described: Deployment, options: ExportOptions) -> None:
    longest = described.longest
    if options.sequence_length is not None and longest is not None and options.sequence_length > longest:
        raise OptionError(f"--sequence_length {options.sequence_length}: the model reads at most {longest} tokens")


def _check_quantizers(trained: TrainedModel) -> None:
    """Refuse what would give a wrong graph, and say which quantizers are to blame."""
    used = num_calls(trained.model)
    blind = [name for name in without_range(trained.model) if used[name]]
    if blind:
        raise ModelError(
            f"{trained.folder}: {len(blind)} quantizers never saw data, among them {', '.join(blind[:3])}: train or calibrate "
            "the model (--one_shot --num_calibration_steps), or pass --format float"
        )
    refused = {name: why for name, why in unsupported(trained.model).items() if used[name]}
    if refused:
        name, why = next(iter(refused.items()))
        raise ModelError(
            f"{trained.folder}: {len(refused)} quantized tensors have no integer form, among them {name} ({why}); pass "
            "--format float"
        )


@contextmanager
def _without_quantizers(trained: TrainedModel) -> Iterator[None]:
    set_phase(trained.model, Phase.OFF)
    try:
        yield
    finally:
        set_phase(trained.model, Phase.FROZEN)


# --- the proof --------------------------------------------------------------------------------------------------------


def _prove(
    trained: TrainedModel,
    task: Task,
    graph: Path,
    folder: Path,
    target: Path,
    graph_format: str,
    options: ExportOptions,
    seconds: dict[str, float],
) -> ExportReport:
    """Compare the file with the plan, and ONNX Runtime with torch, unless that is switched off."""
    is_float = graph_format == "float"
    census = census_of(graph)
    failures: list[str] = []
    notes = list(trained.notes)
    kernels: dict[str, int] = {}
    expected = MatMuls(0, 0)
    check = None
    with _without_quantizers(trained) if is_float else nullcontext():
        if options.validate:
            with _timed(seconds, "check"):
                failures += check_census(census, trained, integer=not is_float)
                kernels, expected = dict(integer_kernels(graph)), expected_matmuls(trained)
                failures += check_kernels(kernels, trained)
                check, more = _compare(trained, task, graph, is_float, options)
                failures += check.parity.failures(check.tolerances)
                notes += more
        if options.num_export_samples:
            written = _write_samples(trained, task, graph, folder, options)
            if written < options.num_export_samples:
                notes.append(f"{written} samples were written of {options.num_export_samples}: the text has no more")
    return ExportReport(
        folder=target,
        model=type(trained.model).__name__,
        task=task.name,
        graph_format=graph_format,
        sizes=Sizes.of(trained.model, census),
        census=census,
        kernels=kernels,
        expected=expected,
        check=check,
        failures=tuple(failures),
        notes=tuple(notes),
        options={name: value if not isinstance(value, Path) else str(value) for name, value in asdict(options).items()},
        seconds=seconds,
    )


def _samples(trained: TrainedModel, task: Task, options: ExportOptions, num: int) -> Samples:
    described = read_deployment(trained.folder)
    facts = described.facts
    return check_batches(
        task,
        trained.tokenizer,
        options.validation_file,
        max_length=facts.max_seq_length,
        model_dir=trained.folder,
        num=num,
        doc_stride=facts.doc_stride,
        sequence_length=options.sequence_length,
        labels=described.labels,
        settings=facts.settings,
    )


def _compare(
    trained: TrainedModel, task: Task, graph: Path, is_float: bool, options: ExportOptions
) -> tuple[Check, list[str]]:
    samples = _samples(trained, task, options, options.num_check_features)
    parity = compare(
        TorchEngine(trained.model, task.output_keys), OrtEngine(graph, None), samples.batches, task.output_keys
    )
    tolerances, noise = FLOAT_TOLERANCES if is_float else INT8_TOLERANCES, None
    if not is_float and parity.failures(tolerances):
        # Is it the export, or a model in which the last bit of a sum decides? Only then is it worth four more forwards.
        noise = rounding_noise(trained.model, samples.batches, task.output_keys)
        tolerances = tolerances.allowing(noise)
    return Check(parity, tolerances, samples.source, noise), list(samples.notes)


def _write_samples(trained: TrainedModel, task: Task, graph: Path, folder: Path, options: ExportOptions) -> int:
    batches = _samples(trained, task, options, options.num_export_samples).batches
    engine = OrtEngine(graph, None)
    return write_samples(folder, batches, [engine(batch) for batch in batches], options.num_export_samples)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
