"""Other tools' quantization-aware training in B1's loop, where they are installed: NNCF with pruning, and ModelOpt.

Each is used as its documentation shows, with its own defaults: the model is converted once, its ranges are taken from the
first batches, and from there it is trained like any other. Their versions and torch's are theirs to reconcile.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor, nn

from sparse_accel.benchmarking.baselines import Loop, accelerated, padded_dataset, shuffled
from sparse_accel.benchmarking.models import random_model
from sparse_accel.benchmarking.own import Bench

# From so many micro-batches ranges are taken before training.
_CALIBRATION_BATCHES: Final = 2

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Tool:
    """A package by the name that is imported and the name that is installed, and how it is used.

    `convert` makes a model fake-quantize, after looking at some batches; `disable` switches its quantizers off. `is_sparse` is
    whether it holds zeros, so that it starts from a pruned model.
    """

    package: str
    distribution: str
    what: str
    numerics: str
    convert: Callable[[Any, Batches, float], Any]
    disable: Callable[[Any], None]
    is_sparse: bool

    @property
    def missing(self) -> str:
        """Why it cannot be used, or nothing where it is installed."""
        if importlib.util.find_spec(self.package) is not None:
            return ""
        return f"the package {self.distribution} is not installed"


def build_tool(tool: Tool, bench: Bench, *, dropout: float | None = None) -> Loop:
    """B1 with a model that the tool converted. Raises ImportError where it is not installed."""
    if tool.missing:
        raise ImportError(tool.missing)
    workload, seed = bench.settings.workload, bench.settings.seed
    sparsity = workload.sparsity if tool.is_sparse else 0.0
    model = random_model(workload.shape, seed, sparsity=sparsity, dropout=dropout).to(bench.device)
    model.set_attn_implementation("sdpa")
    dataset = padded_dataset(bench.features, workload.max_length)
    first = [
        {name: value.to(bench.device) for name, value in batch.items()}
        for batch in islice(shuffled(bench, dataset), _CALIBRATION_BATCHES)
    ]
    with _quiet(), torch.random.fork_rng():
        converted = tool.convert(model.eval(), first, sparsity).train()
    loop = accelerated(bench, converted, shuffled(bench, dataset))
    loop.masks = held_masks(converted) if tool.is_sparse else None
    return loop


def _prune_and_quantize_by_nncf(model: Any, batches: Batches, sparsity: float) -> Any:
    """Masks by magnitude on the encoder's matrices, then fake quantizers whose ranges are learnt. Biases are left as they are,
    so that with its quantizers off the model is still the one that it was made of."""
    import logging

    import nncf

    nncf.set_log_level(logging.ERROR)
    _load_nncf_kernels(batches[0]["input_ids"].device)
    pruned = nncf.prune(
        model,
        mode=nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL,
        ratio=sparsity,
        ignored_scope=nncf.IgnoredScope(types=["embedding"], patterns=[".*qa_outputs.*"]),
        examples_inputs=batches[0],
    )
    return nncf.quantize(
        pruned,
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )


def _load_nncf_kernels(device: torch.device) -> None:
    """Have NNCF compile what it quantizes with. Raises RuntimeError where it cannot: it would fall back on slower operations,
    and the comparison would not be fair."""
    from nncf import torch as nncf_torch
    from nncf.torch.quantization import extensions, reference

    on_gpu = device.type == "cuda"
    kernels = extensions.QuantizedFunctionsCUDA if on_gpu else extensions.QuantizedFunctionsCPU
    try:
        # However long that takes; `get` by itself gives up after a minute.
        (nncf_torch.force_build_cuda_extensions if on_gpu else nncf_torch.force_build_cpu_extensions)()
        forward = kernels.get("Quantize_forward")
    except Exception as error:  # of NNCF's own classes
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"NNCF's kernels cannot be compiled: {why}") from error
    if forward is reference.ReferenceQuantizedFunctions.Quantize_forward:
        raise RuntimeError("NNCF's kernels cannot be compiled, and what it does without them is slower")


def _disable_nncf(model: nn.Module) -> None:
    from nncf.torch.quantization.layers import BaseQuantizer

    for module in model.modules():
        if isinstance(module, BaseQuantizer):
            module.disable_quantization()


def _quantize_by_modelopt(model: Any, batches: Batches, sparsity: float) -> Any:
    """ModelOpt's INT8_DEFAULT_CFG, calibrated by the largest magnitudes. It knows no zeros but those of two in four."""
    import modelopt.torch.quantization as mtq

    def forward(converted: Any) -> None:
        with torch.no_grad():
            for batch in batches:
                converted(**batch)

    return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward)


def _disable_modelopt(model: nn.Module) -> None:
    import modelopt.torch.quantization as mtq

    mtq.disable_quantizer(model, "*")


def held_masks(model: nn.Module) -> dict[str, Tensor]:
    """NNCF's masks by the names of the weights that they are for, bool: `...post_hooks.bert:encoder:...:weight__0.0`."""
    held = {name: module.binary_mask for name, module in model.named_modules() if hasattr(module, "binary_mask")}
    return {
        name.partition("post_hooks.")[2].rpartition("__")[0].replace(":", "."): mask.detach()
        for name, mask in held.items()
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the tools print and warn of while they convert a model."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


TOOLS: Final[Mapping[str, Tool]] = {
    "nncf": Tool(
        "nncf",
        "nncf",
        "NNCF's magnitude pruning and quantization-aware training in b1's loop, no teacher",
        "NNCF quantizes weights by channel (embeddings too), inputs of linear layers, queries and keys; it learns the ranges",
        _prune_and_quantize_by_nncf,
        _disable_nncf,
        True,
    ),
    "modelopt": Tool(
        "modelopt",
        "nvidia-modelopt",
        "NVIDIA ModelOpt's INT8 quantization-aware training in b1's loop, dense, no teacher",
        "ModelOpt quantizes weights by channel and inputs of linear layers and norms; ranges stay those of calibration",
        _quantize_by_modelopt,
        _disable_modelopt,
        False,
    ),
}
