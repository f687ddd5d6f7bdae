"""What one optimizer step hands to the collectives, counted there: `accelerate launch ... -m tests.distributed.wire FILE`.

FILE holds {"cases": {name: options of a training command}, "out": where the first process writes what was counted}. Every case
goes through the program's own preparation and loop; nothing is evaluated or published.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sparse_accel.benchmarking.counting import Wire
from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.layers import compressed_layers


def count(options: dict[str, Any]) -> dict[str, Any]:
    """Train as the options say, and tell what each step handed to the collectives and what this process holds at the end."""
    from rich.console import Console

    from sparse_accel.runtime import checkpoint, setup, tracking
    from sparse_accel.runtime.option_parsing import load_options
    from sparse_accel.runtime.preparing import prepare
    from sparse_accel.runtime.training import train

    saves = options.pop("saves", False)
    flags = {name: str(value) for name, value in options.items()}
    parsed = setup.as_launched(load_options("question_answering", flags))
    accelerator, backend = setup.start_accelerator(parsed)
    run = prepare(parsed, accelerator, backend, tracking.Screen(Console(), is_shown=False, use_bar=False))
    session, steps = run.session, []
    trainable = {name for name, parameter in session.module.named_parameters() if parameter.requires_grad}
    with Wire() as wire:
        train(session, run.state, lambda session, state: steps.append(wire.take()))
    shapes = {
        name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in session.module.named_parameters()
    }
    layers = compressed_layers(session.module).values()
    compact = [layer for layer in layers if isinstance(layer, CompactLinear)]
    result = {
        "backend": backend.name,
        "steps": [{"bytes": dict(step.bytes), "calls": dict(step.calls)} for step in steps],
        "trained_bytes": sum(4 * shapes[name].numel() for name in trainable),
        "optimizer_bytes": optimizer_bytes(session.optimizer),
        "compact": {
            "weights": sum(layer.num_weights for layer in compact),
            "kept": sum(layer.num_kept for layer in compact),
            "values": sum(layer.num_values for layer in compact),
            "position_bytes": sum(layer.positions.nbytes for layer in compact),
        },
    }
    if saves:
        saved = checkpoint.save(session, run.state, run.output_dir, extra=lambda folder: None)
        files = {file.name: file.stat().st_size for file in sorted(saved.iterdir())} if saved.is_dir() else {}
        result["checkpoint_bytes"] = {name: size for name, size in files.items() if name.endswith(".safetensors")}
    run.close()
    return result


def optimizer_bytes(optimizer: Any) -> int:
    """Bytes of the optimizer's moments in this process; its count of steps is left out."""
    while hasattr(optimizer, "optimizer"):  # accelerate's around DeepSpeed's around torch's
        optimizer = optimizer.optimizer
    moments = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if key != "step" and isinstance(value, Tensor)
    ]
    return sum((moment.to_local() if isinstance(moment, DTensor) else moment).nbytes for moment in moments)


def main(file: Path) -> None:
    """Count every case of the file, one after the other in the same processes."""
    from accelerate.state import AcceleratorState, PartialState

    from tests.distributed.on_cpu import stand_for_gpus

    if os.environ.get("ACCELERATE_USE_CPU") != "1":
        stand_for_gpus()
    document = json.loads(file.read_text("utf-8"))
    out, counted = Path(document["out"]), {}
    for name, options in document["cases"].items():
        counted[name] = count(options)
        if PartialState().is_main_process:
            out.write_text(json.dumps(counted), "utf-8")
            print(f"counted {name}", flush=True)
        AcceleratorState._reset_state(True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
