"""`--compile`: each layer of a model's encoder as compiled regions, in place, so that every name stays.

Two things stay outside, by a break in the graph each: making a layer's weight from what is stored (each layer's is another,
so that it would be compiled anew for every layer), and attention over the sequences of a packed batch on a CPU, which reads
their bounds. What is left is compiled once in training and once in evaluation, for any number of tokens.
"""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.layers import CompressedEmbedding, CompressedLinear
from sparse_accel.errors import OptionError
from sparse_accel.modifiers.quantization import QuantizationModifier
from sparse_accel.recipe.schema import Recipe

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


def check_compile(recipe: Recipe, num_processes: int) -> None:
    """Raise OptionError for a run of which no part, or none that was ever tried, would be compiled well."""
    if recipe.has(QuantizationModifier):
        raise OptionError(
            "--compile: is not offered with quantization: ranges are followed on the host, which cuts a layer into dozens of "
            "pieces; leave --compile out"
        )
    if num_processes > 1:
        raise OptionError("--compile: is offered for a single process only; leave it out")


def compile_blocks(model: nn.Module) -> int:
    """Let the layers of `model`, which has its masks, be compiled when they are first called; how many.

    Raises OptionError for a model without layers.
    """
    blocks = encoder_blocks(model)
    if not blocks:
        raise OptionError(f"--compile: {type(model).__name__} has no list of layers that could be compiled")
    import torch._dynamo.config as settings

    settings.recompile_limit = max(settings.recompile_limit, _VERSIONS)
    for block in blocks:
        for module in block.modules():
            _keep_outside(module)
        # Dynamic from the start: a batch of another number of tokens is nothing new.
        block.compile(dynamic=True)
    return len(blocks)


def encoder_blocks(model: nn.Module) -> list[nn.Module]:
    """A model's layers: what its longest list of modules holds."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def _keep_outside(module: nn.Module) -> None:
    """Hide the making of a weight behind a function that is carried out as it is."""
    if isinstance(module, CompactLinear):
        module._effective_weight = torch.compiler.disable(module._effective_weight)  # type: ignore[method-assign]
    elif isinstance(module, CompressedLinear | CompressedEmbedding):
        module.effective_weight = torch.compiler.disable(module.effective_weight)  # type: ignore[method-assign]
