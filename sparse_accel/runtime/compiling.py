"""`--compile`: each layer of a model's encoder as compiled regions, in place, so that every name stays.

Two things stay outside, by a break in the graph each: making a layer's weight from what is stored (each layer's is another,
so that it would be compiled anew for every layer), and attention over the sequences of a packed batch on a CPU, which reads
their bounds. What is left is compiled once in training and once in evaluation, for any number of tokens and sequences.

A layer whose quantizers are at work runs as it is written: their ranges are followed on the host, which would cut it into
dozens of pieces. Hooks stay outside too, among them those with which FSDP gathers and frees a layer's weights.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparse_accel.compress import attention
from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.layers import CompressedEmbedding, CompressedLinear
from sparse_accel.compress.ranges import Phase, Quantizer
from sparse_accel.errors import OptionError
from sparse_accel.modifiers.quantization import QuantizationModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime.backends import Backend
from sparse_accel.timeline import Clock

# Versions of one piece of code, before torch gives up on it: layers of several shapes, in training and in evaluation.
_VERSIONS = 64


def require_compiler(device: torch.device) -> None:
    """Raise OptionError where torch could not compile for `device`."""
    if device.type != "cpu":
        return
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        raise OptionError(
            f"--compile: on a CPU it needs a C++ compiler, and there is none here ({', '.join(compilers)}); install one, or "
            "leave --compile out"
        )


def check_compile(backend: Backend) -> None:
    """Raise OptionError for a launch under which layers cannot be compiled."""
    if not backend.name.startswith("DeepSpeed"):
        return
    why = (
        "it gathers each weight in a hook of its own module, inside the layer that would be compiled"
        if backend.shards_weights
        else "that was never seen to give the same result"
    )
    raise OptionError(
        f"--compile: is not offered with {backend.name}: {why}; launch with DDP (launch_configs/ddp.yaml) or FSDP2 "
        "(launch_configs/fsdp2.yaml), or leave --compile out"
    )


def compiled_part(recipe: Recipe, clock: Clock) -> str | None:
    """What to tell the user of a run at `clock` whose recipe quantizes: up to where it runs compiled. None for the others."""
    starts = [modifier.interval.start for modifier in recipe.of(QuantizationModifier)]
    if not starts:
        return None
    epoch = min(starts)
    if clock.has_reached(epoch):
        return "--compile has no effect from here on: quantization has started, and quantized layers run uncompiled"
    return (
        f"--compile: layers run compiled until quantization starts, at epoch {epoch:g} (step {clock.step_of(epoch)}), and "
        "uncompiled from there"
    )


class _Forward:
    """The forward of one layer: compiled as long as its quantizers rest, then as it is written.

    In the layer's `__dict__`, where it comes before the class's. A deep copy of the layer gets one of its own.
    """

    def __init__(self, block: nn.Module, compiled: Callable[..., Any]) -> None:
        self.block = block
        self.compiled: Callable[..., Any] | None = compiled
        # One speaks for all: a model's quantizers change their phase together.
        self.quantizer = next((part for part in block.modules() if isinstance(part, Quantizer)), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiled is not None and self.quantizer is not None and self.quantizer.phase is not Phase.OFF:
            self._let_go()
        if self.compiled is None or (self.quantizer is not None and not self.quantizer.is_idle):
            return type(self.block).forward(self.block, *args, **kwargs)
        return self.compiled(self.block, *args, **kwargs)

    def _let_go(self) -> None:
        """Forget what was compiled: quantization does not end again."""
        self.compiled = None
        for module in self.block.modules():
            _put_back(module)
        torch.compiler.reset()


def compile_blocks(model: nn.Module) -> int:
    """Let the layers of `model`, which has its masks and quantizers, be compiled when they are first called; how many. Comes
    before a backend spreads the model.

    Raises OptionError for a model without layers.
    """
    blocks = encoder_blocks(model)
    if not blocks:
        raise OptionError(f"--compile: {type(model).__name__} has no list of layers that could be compiled")
    import torch._dynamo.config as settings

    settings.recompile_limit = max(settings.recompile_limit, _VERSIONS)
    # Layers are small enough for DDP to exchange the gradients of one while the next is worked on; to cut them up further would
    # only cost.
    settings.optimize_ddp = False
    # FSDP promises torch that modules do not change; ours say by attributes what they do.
    settings.skip_fsdp_guards = False
    if not hasattr(attention.attention_by_sequence, "_torchdynamo_disable"):
        # For good: to whom it is not compiled it is the same function.
        attention.attention_by_sequence = torch.compiler.disable(attention.attention_by_sequence)
    # Dynamic from the start: a batch of another number of tokens is nothing new. One function for each class, not for each
    # layer: what is compiled takes the layer as an argument.
    compiled = {kind: torch.compile(kind.forward, dynamic=True) for kind in {type(block) for block in blocks}}
    for block in blocks:
        for module in block.modules():
            _keep_outside(module)
        block.forward = _Forward(block, compiled[type(block)])
    return len(blocks)


def encoder_blocks(model: nn.Module) -> list[nn.Module]:
    """A model's layers: what its longest list of modules holds."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


@contextmanager
def sheltered_compilers() -> Iterator[None]:
    """Within, compilers that torch starts outlive a SIGTERM that goes to the whole process group, as schedulers send it, so
    that the step which waits for them can end.

    They inherit the signals that are blocked where they are started. This process blocks SIGTERM only while it compiles, and
    takes it afterwards.
    """
    from torch._dynamo.callback import callback_handler

    def block(_: object) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def unblock(_: object) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    callback_handler.register_start_callback(block)
    callback_handler.register_end_callback(unblock)
    try:
        yield
    finally:
        # Gone already where what was compiled was let go.
        if block in callback_handler.start_callbacks:
            callback_handler.remove_start_callback(block)
        if unblock in callback_handler.end_callbacks:
            callback_handler.remove_end_callback(unblock)


def _making(module: nn.Module) -> str | None:
    """The method that makes the weight that `module` computes with; None where it is simply stored."""
    if isinstance(module, CompactLinear):
        return "_effective_weight"
    return "effective_weight" if isinstance(module, CompressedLinear | CompressedEmbedding) else None


def _keep_outside(module: nn.Module) -> None:
    """Hide the making of a weight behind a function that is carried out as it is."""
    name = _making(module)
    if name is not None:
        setattr(module, name, torch.compiler.disable(getattr(module, name)))


def _put_back(module: nn.Module) -> None:
    """Undo `_keep_outside`."""
    name = _making(module)
    if name is not None:
        module.__dict__.pop(name, None)
