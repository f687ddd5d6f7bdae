"""Makes a pruned start: a model folder in, the same model with its smallest weights set to zero out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from sparse_accel.compress.census import Census, Count
from sparse_accel.compress.masks import global_magnitude_masks, magnitude_mask
from sparse_accel.compress.plan import prunable_parameters
from sparse_accel.errors import ModelError, OptionError, OutputError, suggestion
from sparse_accel.folders.libraries import quiet_libraries
from sparse_accel.folders.loading import has_tokenizer
from sparse_accel.folders.publishing import published_model
from sparse_accel.folders.sources import check_source
from sparse_accel.runtime.outputs import check_disk
from sparse_accel.targets import match_parameters

SCOPES: Final = ("layer", "global")


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did: all parameters of the pruned model counted, those that were pruned alone, and notes, which are
    sentences for the person."""

    output_dir: Path
    architecture: str
    census: Census
    pruned: Census
    notes: tuple[str, ...]


def prune(
    model: str,
    output_dir: str | Path,
    sparsity: float,
    *,
    scope: str = "layer",
    targets: Sequence[str] | None = None,
    overwrite: bool = False,
) -> PruneReport:
    """Set the smallest magnitudes of `model` (a folder or hub id) to zero and save it, with its tokenizer, to
    `output_dir`.

    Exactly round(sparsity * n) of the n entries become zero: of each tensor for scope `layer`, of all together for
    `global`. `targets` are parameter names, `re:` patterns or `__ALL_PRUNABLE__`; left out, they are what
    `__ALL_PRUNABLE__` means within the encoder: its linear and convolution weights without the pooler. The task's head
    stays dense, since it is trained anew. The class, dtype and parameter names of the model stay as they are.

    Raises OptionError, ModelError, TargetError, OutputError; `output_dir` is complete or untouched.
    """
    output = Path(output_dir)
    _check_request(model, output, sparsity, scope, overwrite)
    loaded, missing, notes = _load(model)
    names = [name for name, _ in loaded.named_parameters() if name not in missing]
    prunable = [name for name in prunable_parameters(loaded) if name not in missing]
    chosen = (
        _encoder_weights(loaded, prunable)
        if targets is None
        else match_parameters(list(targets), names, prunable, what="--targets")
    )
    if not chosen:
        raise ModelError(f"{model}: {type(loaded).__name__} has no weight to prune; name some with --targets")
    parameters = dict(loaded.named_parameters())
    # A pattern also hits biases and norms, whose zeros no recipe would hold.
    chosen = [name for name in chosen if parameters[name].dim() > 1]
    if not chosen:
        raise ModelError(f"{model}: --targets name biases or norms only; weights of at least two dimensions are pruned")
    _set_zeros({name: parameters[name] for name in chosen}, sparsity, scope)
    state = {name: value for name, value in loaded.state_dict().items() if name not in missing}
    check_disk(output, checkpoint_bytes=0, final_bytes=sum(t.nbytes for t in state.values()), num_checkpoints=0)
    tokenizer = _load_tokenizer(model)
    if tokenizer is None:
        notes = [*notes, f"{model} has no tokenizer, so there is none beside the pruned model"]
    _save(loaded, state, tokenizer, output)
    return PruneReport(
        output,
        type(loaded).__name__,
        Census.of({name: parameters[name] for name in names}),
        Census.of({name: parameters[name] for name in chosen}),
        tuple(notes),
    )


def _check_request(model: str, output: Path, sparsity: float, scope: str, overwrite: bool) -> None:
    if not 0.0 <= sparsity < 1.0:
        percent = f"; {sparsity:g} percent is {sparsity / 100:g}" if 1.0 < sparsity < 100.0 else ""
        raise OptionError(f"--sparsity: must be at least 0 and less than 1, got {sparsity:g}{percent}")
    if scope not in SCOPES:
        raise OptionError(f"--scope: {scope!r} is not offered{suggestion(scope, SCOPES)}")
    check_source(model, "MODEL", weights=True)
    if output.exists():
        if not output.is_dir():
            raise OutputError(f"--output_dir: is a file, not a folder: {output}")
        if Path(model).exists() and output.samefile(model):
            raise OutputError(f"--output_dir is the model's own folder, {output}; name another")
        if any(output.iterdir()) and not overwrite:
            raise OutputError(
                f"--output_dir: {output} is not empty; name another, or pass --overwrite to replace the model in it"
            )


def _load(source: str) -> tuple[Any, frozenset[str], list[str]]:
    """The model in the class that its config names, the parameters that the source does not hold (they were made up
    and are not saved), and notes."""
    quiet_libraries()  # what transformers would say about missing and unexpected weights is said below
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except Exception as error:  # transformers raises whatever its readers raise
        raise ModelError(f"{source}: its config cannot be read: {_first_line(error)}") from error
    architecture = (config.architectures or ["AutoModel"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ModelError(f"{source}: its config names the class {architecture}, which transformers does not have")
    try:
        # Pickled weights (.bin) are read by transformers with torch's weights_only, so no code of theirs runs.
        model, info = model_class.from_pretrained(source, config=config, dtype="auto", output_loading_info=True)
    except Exception as error:
        raise ModelError(f"{source}: its weights cannot be loaded: {_first_line(error)}") from error
    if info["mismatched_keys"]:
        raise ModelError(
            f"{source}: weights of another shape than config.json says: {sorted(info['mismatched_keys'])[:3]}"
        )
    broken = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ModelError(f"{source}: weights that are not finite: {', '.join(broken[:3])}")
    notes = []
    if info["unexpected_keys"]:
        names = ", ".join(sorted(info["unexpected_keys"])[:3])
        notes.append(
            f"{len(info['unexpected_keys'])} tensors have no place in {architecture} and were left out ({names} ...)"
        )
    return model, frozenset(info["missing_keys"]), notes


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _encoder_weights(model: Any, prunable: Sequence[str]) -> list[str]:
    """The prunable weights below the model's encoder, without its pooler; all but the pooler's for a bare encoder."""
    prefix = f"{model.base_model_prefix}."
    has_head = isinstance(getattr(model, model.base_model_prefix, None), nn.Module)
    inside = [name for name in prunable if not has_head or name.startswith(prefix)]
    return [name for name in inside if "pooler" not in name.split(".")]


@torch.no_grad()
def _set_zeros(weights: Mapping[str, nn.Parameter], sparsity: float, scope: str) -> None:
    if scope == "global":
        masks = global_magnitude_masks(weights, sparsity)
    else:
        masks = {name: magnitude_mask(weight, sparsity) for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.masked_fill_(~masks[name], 0.0)


def _load_tokenizer(source: str) -> Any | None:
    from transformers import AutoTokenizer

    if not has_tokenizer(source):
        return None
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise ModelError(f"{source}: its tokenizer cannot be read: {_first_line(error)}") from error


def _save(model: Any, state: Mapping[str, Tensor], tokenizer: Any | None, output: Path) -> None:
    with published_model(output) as partial:
        model.save_pretrained(partial, state_dict=dict(state))
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def print_report(report: PruneReport) -> None:
    """The table of zeros per kind of layer, and where the model is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.architecture}, pruned by magnitude")
    for heading in ("Layers", "Weights", "Zeros", "Sparsity"):
        table.add_column(heading, justify="left" if heading == "Layers" else "right")
    for row in report.census.kinds():
        table.add_row(row.kind, f"{row.numel:,}", f"{row.zeros:,}", f"{row.sparsity:.2%}")
    table.add_section()
    tensors = report.pruned.parameters
    pruned = sum(tensors, Count(0, 0))
    table.add_row(f"{len(tensors)} pruned", f"{pruned.numel:,}", f"{pruned.zeros:,}", f"{pruned.sparsity:.2%}")
    console = Console()
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False)
    console.print(f"saved to {report.output_dir}", highlight=False, soft_wrap=True)
