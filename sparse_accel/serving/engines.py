"""Engines: ONNX Runtime, OpenVINO and torch behind one call from numpy arrays to numpy arrays."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from sparse_accel.errors import ModelError, OptionError, suggestion

if TYPE_CHECKING:
    from sparse_accel.tasks.base import Task

# Where a deployment folder keeps its graph: flat, or as transformers.js looks for it.
MODEL_FILES: Final = ("model.onnx", "onnx/model.onnx")


class Engine(Protocol):
    """A model that is ready to run on one machine.

    `input_names` are the arrays that it wants, int64 [B, S] each; `output_names` what it gives, float32 arrays.
    """

    name: str
    device: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One forward. `inputs` may hold more than is wanted; raises KeyError when something is missing."""
        ...


class OrtEngine:
    """ONNX Runtime."""

    name = "onnxruntime"

    def __init__(self, path: Path, threads: int | None, device: str = "cpu") -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        if device == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise OptionError(
                    "ONNX Runtime has no CUDA provider here (it comes with the package onnxruntime-gpu); leave --device out "
                    "to run on the CPU"
                )
            providers.insert(0, "CUDAExecutionProvider")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime raises a family of its own without a common name
            raise ModelError(f"{path}: ONNX Runtime cannot open it: {_first_line(error)}") from error
        if providers[0] not in self.session.get_providers():
            # One that is there but cannot start, for want of a library, is left out without a word.
            raise OptionError(
                f"ONNX Runtime could not start its {providers[0]}: are CUDA and cuDNN of the versions that it was built for "
                "installed? Leave --device out to run on the CPU"
            )
        self.device = device
        self.input_names = tuple(entry.name for entry in self.session.get_inputs())
        self.output_names = tuple(entry.name for entry in self.session.get_outputs())

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine`."""
        values = self.session.run(None, {name: inputs[name] for name in self.input_names})
        return dict(zip(self.output_names, values, strict=True))


class OpenVinoEngine:
    """OpenVINO. It chooses its own precision for what the graph leaves in float: bfloat16 where the processor has it;
    `precision` "f32" forbids that."""

    name = "openvino"

    def __init__(self, path: Path, threads: int | None, device: str = "cpu", precision: str | None = None) -> None:
        import openvino

        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        core = openvino.Core()
        target = {"cpu": "CPU", "cuda": "GPU", "gpu": "GPU"}[device]
        if target not in {name.partition(".")[0] for name in core.available_devices}:
            raise OptionError(f"OpenVINO has no {target} here; it has {', '.join(core.available_devices)}")
        try:
            self.model = core.compile_model(core.read_model(str(path)), target, settings)
        except RuntimeError as error:
            raise ModelError(f"{path}: OpenVINO cannot open it: {_first_line(error)}") from error
        self.device = device
        self.input_names = tuple(port.get_any_name() for port in self.model.inputs)
        self.output_names = tuple(port.get_any_name() for port in self.model.outputs)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine`."""
        values = self.model({name: inputs[name] for name in self.input_names})
        return {name: values[port] for name, port in zip(self.output_names, self.model.outputs, strict=True)}


class TorchEngine:
    """A torch model with the quantizers of its training: the reference that an export is compared with."""

    name = "torch"

    def __init__(self, model: Any, output_names: tuple[str, ...], device: str = "cpu") -> None:
        import inspect

        self.model = model.to(device).eval()
        self.device = device
        accepted = inspect.signature(model.forward).parameters
        known = ("input_ids", "attention_mask", "token_type_ids")
        self.input_names = tuple(name for name in known if name in accepted)
        self.output_names = output_names

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine`."""
        import torch

        with torch.inference_mode():
            tensors = {
                name: torch.from_numpy(inputs[name]).to(self.device) for name in self.input_names if name in inputs
            }
            outputs = self.model(**tensors)
        return {name: outputs[name].float().cpu().numpy() for name in self.output_names}


def _ort(path: Path, threads: int | None, device: str) -> Engine:
    return OrtEngine(path, threads, device)


def _openvino(path: Path, threads: int | None, device: str) -> Engine:
    return OpenVinoEngine(path, threads, device)


# Engines that run an ONNX file: name -> how one is opened. The name is that of the package.
ENGINES: Final[dict[str, Callable[[Path, int | None, str], Engine]]] = {"onnxruntime": _ort, "openvino": _openvino}


def is_installed(name: str) -> bool:
    """Whether the package of an engine is there."""
    return importlib.util.find_spec(name) is not None


def model_file(folder: str | Path) -> Path | None:
    """The ONNX file of a deployment folder (or the file itself); None where there is none."""
    path = Path(folder)
    if path.is_file():
        return path if path.suffix == ".onnx" else None
    return next((path / name for name in MODEL_FILES if (path / name).is_file()), None)


def open_engine(
    folder: str | Path, name: str = "onnxruntime", *, threads: int | None = None, device: str = "cpu"
) -> Engine:
    """Open a deployment folder or an ONNX file. `threads` None leaves their number to the engine.

    Raises OptionError for an engine that is unknown or not installed, ModelError for a folder without a graph and for a
    graph that the engine refuses.
    """
    if name not in ENGINES:
        raise OptionError(f"there is no engine {name!r}{suggestion(name, ENGINES)}")
    if not is_installed(name):
        raise OptionError(f"the engine {name} is not installed; run `python -m pip install {name}`")
    if threads is not None and threads < 1:
        raise OptionError(f"threads: 1 or more, got {threads}")
    path = model_file(folder)
    if path is None:
        raise ModelError(
            f"{folder}: no {' or '.join(MODEL_FILES)} there; `sparse_accel export MODEL_DIR` makes a deployment"
        )
    return ENGINES[name](path, threads, device)


def torch_engine(folder: str | Path, task: Task, *, threads: int | None = None, device: str = "cpu") -> TorchEngine:
    """Open a trained model folder with its masks and quantizers. Raises ModelError when it cannot be."""
    import torch

    from sparse_accel.folders.trained import open_trained

    if threads is not None:
        torch.set_num_threads(threads)
    return TorchEngine(open_trained(folder, task).model, task.output_keys, device)


def num_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
