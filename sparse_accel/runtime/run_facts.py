"""What report.json says of a run: how it was run, and zeros before and after; the report is made of it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import torch

import sparse_accel
from sparse_accel.compress.census import Census
from sparse_accel.compress.inspection import place_of, rank_of
from sparse_accel.reports.run_files import FACTS_FORMAT
from sparse_accel.runtime.options import describe_command

if TYPE_CHECKING:
    from sparse_accel.runtime.pauses import Run

_PACKAGES: Final = ("torch", "transformers", "accelerate", "datasets")


def run_facts(run: Run, model_class: str, census: Census, matrices: Collection[str]) -> dict[str, Any]:
    """Plain values. `census` is of the model as it is published, `matrices` names those of its parameters that are; called
    on the main process."""
    options, session, state = run.options, run.session, run.state
    device = session.accelerator.device
    is_cuda = device.type == "cuda"
    before = {parameter.name: parameter.zeros for parameter in run.census_at_start.parameters}
    kinds_before = {row.kind: row.zeros for row in run.census_at_start.kinds()}
    return {
        "sparse_accel_report": FACTS_FORMAT,
        "name": run.output_dir.absolute().name,
        "task": options.task,
        "model": options.origin,
        "class": model_class,
        "teacher": options.typed("distill_teacher"),
        "command": describe_command(options),
        "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(state.seconds, 3),
        "one_shot": options.one_shot,
        "steps": {
            "done": state.clock.step,
            "last": state.last_step,
            "per_epoch": state.clock.steps_per_epoch,
            "features": options.per_device_train_batch_size
            * options.gradient_accumulation_steps
            * session.accelerator.num_processes,
        },
        "ran_on": {
            "processes": session.accelerator.num_processes,
            "backend": session.backend.name,
            "precision": "fp32" if session.backend.precision == "no" else session.backend.precision,
            "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
            "memory_of": "GPU" if is_cuda else "host",
        },
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if is_cuda else _peak_host_bytes(),
        "versions": _versions(session.backend.name),
        "matrices": [
            {
                "name": parameter.name,
                "kind": parameter.kind,
                "row": row,
                "column": column,
                "numel": parameter.numel,
                "zeros_before": before.get(parameter.name, 0),
                "zeros": parameter.zeros,
            }
            for parameter in sorted(census.parameters, key=lambda parameter: rank_of(parameter.name))
            if parameter.name in matrices
            for row, column in [place_of(parameter.name)]
        ],
        "kinds": [
            {
                "kind": row.kind,
                "numel": row.numel,
                "zeros_before": kinds_before.get(row.kind, 0),
                "zeros": row.zeros,
                "quantized": row.quantized,
            }
            for row in census.kinds()
        ],
        "prunable": {
            "numel": census.prunable.numel,
            "zeros_before": run.census_at_start.prunable.zeros,
            "zeros": census.prunable.zeros,
            "quantized": len(census.quantized_modules),
        },
    }


def _versions(backend: str) -> dict[str, str]:
    names = [*_PACKAGES, *(["deepspeed"] if backend.startswith("DeepSpeed") else [])]
    own = {"sparse_accel": sparse_accel.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in names}


def _peak_host_bytes() -> int:
    if sys.platform == "win32":  # which keeps no such count for a process to read without more
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
