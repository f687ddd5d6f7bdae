"""Folders that a training run wrote, opened as they were trained: masks in the weights, quantizers with fixed ranges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors.torch import load_file
from torch import Tensor

from sparse_accel.compress.attention import ATTENTION_NAME, quantized_attention
from sparse_accel.compress.plan import CompressionPlan, install, needs_quantized_attention, set_phase
from sparse_accel.compress.ranges import Phase, load_quantization_state, without_range
from sparse_accel.errors import ModelError
from sparse_accel.folders.loading import HUB_DEFAULTS, HubOptions, load_model, load_tokenizer

if TYPE_CHECKING:
    from sparse_accel.tasks.base import Task

PLAN_FILE: Final = "compression_plan.json"
RANGES_FILE: Final = "quantization.safetensors"


@dataclass(frozen=True)
class TrainedModel:
    """A model in eval mode whose quantizers, as far as it has any, are frozen: its forward is what training ended with.

    `plan` is empty for a float model. `notes` are sentences for the person.
    """

    folder: Path
    model: Any
    tokenizer: Any
    plan: CompressionPlan
    notes: tuple[str, ...] = ()


def open_trained(folder: str | Path, task: Task, hub: HubOptions = HUB_DEFAULTS) -> TrainedModel:
    """Open a model folder (or hub id) for `task` as it was trained. Raises ModelError when it cannot be, among others
    when its head is missing or a quantizer never saw data."""
    from sparse_accel.folders.sparseml import is_sparseml_state, open_sparseml  # which builds on this module

    name = str(folder)
    if is_sparseml_state(name):
        return open_sparseml(name, task, hub)
    model, missing = load_model(name, task, hub, "MODEL")
    if missing:
        raise ModelError(
            f"{name}: the folder holds no weights for {', '.join(missing[:3])}, so it was not trained for "
            f"{task.name.replace('_', ' ')}"
        )
    tokenizer = load_tokenizer(name, hub, "MODEL")
    plan = trained_plan(name)
    notes = []
    if plan is None and (Path(name) / PLAN_FILE).is_file():
        unquantized = CompressionPlan.load(Path(name) / PLAN_FILE)
        if unquantized.num_quantizers:
            raise ModelError(
                f"{name}: {PLAN_FILE} quantizes {unquantized.num_quantizers} tensors, but their ranges, {RANGES_FILE}, are "
                "not there: quantization had not begun, or the file was left behind"
            )
    plan = plan or CompressionPlan()
    if plan.num_quantizers:
        if needs_quantized_attention(plan) and not use_own_attention(model):
            raise ModelError(f"{name}: {type(model).__name__} does not go through transformers' attention interface")
        install(model, plan)
        load_ranges(name, model)
        blind = without_range(model)
        if blind:
            notes.append(
                f"{len(blind)} quantizers never saw data, among them {blind[0]}: the task may not use that module"
            )
    model.eval()
    return TrainedModel(Path(name), model, tokenizer, plan, tuple(notes))


def trained_plan(folder: str) -> CompressionPlan | None:
    """The plan of a folder that brings its quantizers' ranges, so that it is evaluated as it was trained; weights are
    whole in it, however the run stored them."""
    path = Path(folder)
    if not (path / RANGES_FILE).is_file() or not (path / PLAN_FILE).is_file():
        return None
    return CompressionPlan.load(path / PLAN_FILE).with_whole_weights()


def load_ranges(folder: str, model: Any) -> None:
    """Put a trained folder's ranges under the installed quantizers, and fix them."""
    try:
        load_quantization_state(model, load_file(Path(folder) / RANGES_FILE))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/{RANGES_FILE} cannot be read: {error}") from error
    set_phase(model, Phase.FROZEN)


def use_own_attention(model: Any) -> bool:
    """Let the model compute attention through `quantized_attention`; whether it can.

    Where nothing is quantized that is torch's fused attention, as before, but transformers does not look into the mask for
    padding first: on a GPU that would wait for the device in every forward.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, quantized_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _padding_mask)
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    except (ValueError, KeyError):
        return False
    return bool(model.config._attn_implementation == ATTENTION_NAME)


def _padding_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The additive mask [batch, 1, queries, keys], or None where every token attends to every other: a packed batch, whose
    length would make it large."""
    from transformers.masking_utils import eager_mask

    if attention_mask is None and kwargs.get("allow_is_bidirectional_skip"):
        return None
    mask: Tensor = eager_mask(attention_mask=attention_mask, **kwargs)
    return mask
