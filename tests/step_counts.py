"""What one steady optimizer step asks of torch, counted as it is dispatched: `python -m tests.step_counts` writes counts.json.

Times on a shared machine say little about a change of a few percent; counts are exact. For each arm, of one step after the
first ones: dispatched operations that are no views (each is a kernel on a GPU) in forward, backward and update; new memory in
bytes; where and how often the host reads a tensor, which on a GPU waits for the device; tensors built from host numbers, which are
copied there; and what goes through the reductions over ranks (DDP's own are counted in tests/distributed/test_bytes.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState
from rich.console import Console
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_accel.runtime import setup, tracking
from sparse_accel.runtime.option_parsing import load_options
from sparse_accel.runtime.preparing import prepare
from sparse_accel.runtime.training import train
from tests import running

FILE = Path(__file__).parent / "counts.json"
COMMAND = "python -m tests.step_counts"

# What the host learns numbers by, or shapes that depend on numbers: what is dispatched, and, of a CPU's tensor, what is not.
_READS = frozenset("tolist numpy cpu __array__".split())
_DEPENDENT = frozenset(
    "aten::_local_scalar_dense aten::nonzero aten::equal aten::masked_select aten::_unique2 aten::is_nonzero"
    " aten::repeat_interleave.Tensor aten::bincount aten::histc".split()
)
_FROM_HOST = frozenset({"aten::lift_fresh", "aten::lift"})


class Dispatched(TorchDispatchMode):
    """Within, what torch dispatches is counted under the present `phase`."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.counted: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation and count it."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        full_name = f"{name}.{func._overloadname}" if func._overloadname != "default" else name
        if full_name in _DEPENDENT or name in _DEPENDENT or _indexes_by_mask(name, args):
            self.reads[_place()] += 1
        elif name in _FROM_HOST:
            self.counted["from_host"] += 1
        elif not func.is_view:
            self.counted[self.phase] += 1
            self.counted["bytes"] += _new_bytes(out, (args, kwargs))
        return out


class Read(TorchFunctionMode):
    """Within, what Python reads of tensors is counted; of a CPU's tensor not all of it is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out a function and count it if it reads."""
        if getattr(func, "__name__", "") in _READS:
            self.reads[_place()] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line of this package or the model library that is being carried out, by its file and function."""
    for frame in reversed(traceback.extract_stack()):
        if any(f"/{package}/" in frame.filename for package in ("sparse_accel", "transformers", "accelerate")):
            return f"{Path(frame.filename).name}: {frame.name}"
    return "elsewhere"


def _indexes_by_mask(name: str, args: Any) -> bool:
    indices = args[1] if name in ("aten::index", "aten::index_put_", "aten::index_put") else ()
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


def _new_bytes(out: Any, given: Any) -> int:
    """Bytes of the outputs' memory that is not the inputs'."""
    old = {leaf.untyped_storage()._cdata for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
    new = {
        leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(out)
        if isinstance(leaf, Tensor)
    }
    return sum(size for storage, size in new.items() if storage not in old)


@contextmanager
def phases(session: Any, mode: Dispatched) -> Iterator[None]:
    """Within, `mode` learns what the session's step is at."""
    accelerator = session.accelerator
    backward, clip = accelerator.backward, accelerator.clip_grad_norm_

    def in_backward(loss: Tensor) -> None:
        mode.phase = "backward"
        backward(loss)
        mode.phase = "forward"

    def in_update(*args: Any) -> Any:
        mode.phase = "update"
        return clip(*args)

    accelerator.backward, accelerator.clip_grad_norm_ = in_backward, in_update
    try:
        yield
    finally:
        del accelerator.backward, accelerator.clip_grad_norm_


def count_steps(options: dict[str, Any], folder: Path, num_steps: int) -> list[dict[str, Any]]:
    """The counts of each of the first steps of a training command."""
    flags = {name: str(value) for name, value in {**options, "output_dir": folder}.items() if value is not None}
    parsed = setup.as_launched(load_options("question_answering", flags))
    accelerator, backend = setup.start_accelerator(parsed)
    run = prepare(parsed, accelerator, backend, tracking.Screen(Console(), is_shown=False, use_bar=False))
    session = run.session
    # Putting batches together is the host's work: it is done before, and not counted.
    batches = list(session.loader.steps(run.state.clock, num_steps))
    loader = SimpleNamespace(steps=lambda clock, last_step: iter(batches), sampler=session.loader.sampler)
    session.loader, run.state.last_step = loader, num_steps
    reduced: Counter[str] = Counter()

    def reduce(tensor: Tensor) -> Tensor:
        reduced.update(calls=1, bytes=tensor.nbytes)
        return tensor.clone()

    session.reduce_sum = session.reduce_max = reduce
    found: list[dict[str, Any]] = []
    try:
        with Read() as reading, Dispatched() as dispatched, phases(session, dispatched):

            def after_step(session: Any, state: Any) -> None:
                counted = dispatched.counted
                found.append(
                    {
                        "operations": {phase: counted[phase] for phase in ("forward", "backward", "update")},
                        "new_bytes": counted["bytes"],
                        "reads": dict(dispatched.reads + reading.reads),
                        "from_host": counted["from_host"],
                        "reductions": {key: reduced[key] for key in ("calls", "bytes")},
                    }
                )
                dispatched.phase = "forward"
                for counter in (counted, dispatched.reads, reading.reads, reduced):
                    counter.clear()

            train(session, run.state, after_step)
    finally:
        run.close()
        AcceleratorState._reset_state(True)
    return found


def count(folder: Path) -> dict[str, dict[str, Any]]:
    """A steady step of each arm, of a model of two small layers; 4 steps an epoch, quantized from 1.0, frozen from 2.0."""
    world = {**running.tiny_world(folder, rows=32), "gradient_accumulation_steps": 1, "do_eval": None}
    plain = {**world, "recipe": None, "recipe_args": None, "distill_teacher": None}
    alone = {**world, "distill_teacher": "disable"}
    quantized = count_steps(alone, folder / "alone", 11)
    return {
        "dense": count_steps(plain, folder / "dense", 3)[2],
        "masks, compact": quantized[2],
        "masks and quantizers that observe": quantized[6],
        "masks and frozen quantizers": quantized[10],
        "masks and distillation": count_steps(world, folder / "distilled", 3)[2],
    }


def versions() -> dict[str, str]:
    """What the counts depend on beside this package."""
    return {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}


def main() -> None:
    """Count anew and write the file."""
    with tempfile.TemporaryDirectory() as folder:
        document = {"versions": versions(), "arms": count(Path(folder))}
    FILE.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    sys.stdout.write(FILE.read_text("utf-8"))


if __name__ == "__main__":
    main()
