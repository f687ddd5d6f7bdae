"""What an export is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_OPSET = 21
GRAPH_FILE = "model.onnx"


@dataclass(frozen=True)
class ExportOptions:
    """What an export is told.

    `graph_format` None is qdq for a quantized model and float for any other. `sequence_length` None leaves the length free.
    `deployment_dir` None is `deployment` in the model's folder. `keep_float` and `compress` write the float graph and the
    compressed weights too. `validate` compares with torch on `num_check_features` features of `validation_file`.
    """

    task: str | None = None
    graph_format: str | None = None
    opset: int = DEFAULT_OPSET
    sequence_length: int | None = None
    deployment_dir: Path | None = None
    layout: str = "flat"
    onnx_file_name: str = GRAPH_FILE
    overwrite: bool = False
    keep_float: bool = False
    compress: bool = False
    validate: bool = True
    validation_file: str | None = None
    num_check_features: int = 32
    num_export_samples: int = 0
