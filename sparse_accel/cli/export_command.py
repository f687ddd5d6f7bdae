"""The commands `export` and, spelled as SparseML's users know it, `export_onnx`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparse_accel.cli.stubs import ZooOption, model_folder
from sparse_accel.errors import OptionError
from sparse_accel.onnx_export.options import ExportOptions

_Task = Annotated[
    str | None,
    typer.Option("--task", help="The model's task. Left out: what its config says.", show_default=False),
]
_Length = Annotated[
    int | None,
    typer.Option("--sequence_length", help="Fix the length of all inputs. Left out: any length.", show_default=False),
]
_Opset = Annotated[int, typer.Option("--opset", help="ONNX operator set.")]
_Target = Annotated[
    Path | None,
    typer.Option(
        "--deployment_dir",
        help="Folder to write. [dim](default: deployment in the model's folder)[/dim]",
        show_default=False,
    ),
]
_Layout = Annotated[
    str,
    typer.Option(
        "--layout",
        metavar="flat|transformers.js",
        help="Where the graph lies in it: model.onnx, or onnx/model.onnx for transformers.js.",
    ),
]
_FileName = Annotated[str, typer.Option("--onnx_file_name", help="Name of the graph's file.")]
_Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="qdq|integer|float",
        help="qdq: integers that ONNX Runtime and OpenVINO run as such; integer: products spelled out as MatMulInteger, for"
        " DeepSparse; float: no quantization. [dim](default: qdq for a quantized model, else float)[/dim]",
        show_default=False,
    ),
]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier deployment.")]
_KeepFloat = Annotated[bool, typer.Option("--keep_float", help="Write model_float.onnx, without quantization, too.")]
_Compress = Annotated[
    bool,
    typer.Option("--compress", help="Write the weights without their zeros too, for sparse_accel.load and decompress."),
]
_Validate = Annotated[
    bool, typer.Option("--validate/--no_validate", help="Compare the graph with torch and with the compression plan.")
]
_Data = Annotated[
    str | None,
    typer.Option(
        "--validation_file",
        help="Data for that comparison. Left out: what the model was trained with, or the demo's corpus.",
        show_default=False,
    ),
]
_NumFeatures = Annotated[int, typer.Option("--num_check_features", help="Features for that comparison.")]
_NumSamples = Annotated[
    int, typer.Option("--num_export_samples", help="Write so many inputs and outputs beside the graph, as .npz files.")
]


def register(app: typer.Typer) -> None:
    """Add both commands to the program."""
    app.command("export")(export_command)
    app.command("export_onnx")(export_onnx_command)


def export_command(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a trained model, or a zoo: stub.", metavar="MODEL_DIR")],
    task: _Task = None,
    sequence_length: _Length = None,
    opset: _Opset = 21,
    deployment_dir: _Target = None,
    layout: _Layout = "flat",
    onnx_file_name: _FileName = "model.onnx",
    graph_format: _Format = None,
    keep_float: _KeepFloat = False,
    compress: _Compress = False,
    validate: _Validate = True,
    validation_file: _Data = None,
    num_check_features: _NumFeatures = 32,
    num_export_samples: _NumSamples = 0,
    overwrite: _Overwrite = False,
    zoo: ZooOption = None,
) -> int:
    """Write a trained model as ONNX, with integer weights if it was trained so, and prove that it computes the same."""
    options = ExportOptions(
        task=task,
        graph_format=graph_format,
        opset=opset,
        sequence_length=sequence_length,
        deployment_dir=deployment_dir,
        layout=layout,
        onnx_file_name=onnx_file_name,
        overwrite=overwrite,
        keep_float=keep_float,
        compress=compress,
        validate=validate,
        validation_file=validation_file,
        num_check_features=num_check_features,
        num_export_samples=num_export_samples,
    )
    return _export(model_folder(model_dir, "MODEL_DIR", zoo), options)


def export_onnx_command(
    model_path: Annotated[Path, typer.Option("--model_path", help="Folder of a trained model, or a zoo: stub.")],
    task: _Task = None,
    sequence_length: _Length = None,
    opset: _Opset = 21,
    deployment_dir: _Target = None,
    layout: _Layout = "flat",
    onnx_file_name: _FileName = "model.onnx",
    graph_format: _Format = None,
    no_convert_qat: Annotated[
        bool, typer.Option("--no_convert_qat", help="The same as --format qdq, which is what is written anyway.")
    ] = False,
    keep_float: _KeepFloat = False,
    compress: _Compress = False,
    validate: _Validate = True,
    validation_file: _Data = None,
    data_args: Annotated[
        str | None,
        typer.Option(
            "--data_args",
            help="SparseML's way to name the data: JSON or key=value,... with validation_file.",
            show_default=False,
        ),
    ] = None,
    num_check_features: _NumFeatures = 32,
    num_export_samples: _NumSamples = 0,
    overwrite: _Overwrite = False,
    zoo: ZooOption = None,
) -> int:
    """The command export, spelled as in sparseml.transformers.export_onnx."""
    if no_convert_qat and graph_format not in (None, "qdq"):
        raise OptionError(f"--no_convert_qat and --format {graph_format} contradict each other")
    if data_args is not None:
        if validation_file is not None:
            raise OptionError("--validation_file and --data_args both name the data; give one of them")
        validation_file = _data_file(data_args)
    return export_command(
        model_path,
        task=task,
        sequence_length=sequence_length,
        opset=opset,
        deployment_dir=deployment_dir,
        layout=layout,
        onnx_file_name=onnx_file_name,
        graph_format="qdq" if no_convert_qat else graph_format,
        keep_float=keep_float,
        compress=compress,
        validate=validate,
        validation_file=validation_file,
        num_check_features=num_check_features,
        num_export_samples=num_export_samples,
        overwrite=overwrite,
        zoo=zoo,
    )


def _data_file(text: str) -> str | None:
    """The data file of `--data_args`. Raises OptionError for anything else in it."""
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise OptionError(f"--data_args: not JSON: {error}") from None
    else:
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        given = {name.strip(): value.strip() for name, _, value in pairs}
    unknown = [name for name in given if name != "validation_file"]
    if unknown:
        raise OptionError(
            f"--data_args: {unknown[0]} is not used by an export; validation_file is, and windows are cut as in training"
        )
    return str(given["validation_file"]) if "validation_file" in given else None


def _export(model_dir: Path, options: ExportOptions) -> int:
    from sparse_accel.folders.libraries import quiet_libraries

    quiet_libraries()
    from sparse_accel.onnx_export.exporting import export
    from sparse_accel.onnx_export.report import print_report

    print_report(export(model_dir, options))
    return 0
