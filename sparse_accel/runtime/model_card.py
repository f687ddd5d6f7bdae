"""The model card: README.md of the output folder, with the numbers of this run and the command that gave them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparse_accel import __version__
from sparse_accel.compress.census import Census
from sparse_accel.compress.plan import CompressionPlan

if TYPE_CHECKING:
    from sparse_accel.runtime.pauses import Run


def model_card(run: Run, plan: CompressionPlan, census: Census, results: Mapping[str, Any], command: str) -> str:
    """Markdown with Hugging Face's front matter."""
    options = run.options
    metrics = {
        name: value
        for name, value in results.items()
        if name in ("eval_exact_match", "eval_f1", "eval_exact", "train_loss")
    }
    quantized = sum(compression.is_quantized for compression in plan.modules.values())
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {options.task.replace('_', '-')}",
        "tags:",
        "- sparse_accel",
        "- sparse" if census.sparsity > 0 else "- dense",
        *(["- quantization-aware"] if quantized else []),
        "---",
        "",
        f"# {run.output_dir.name}",
        "",
        f"`{options.origin}` fine-tuned for {options.task.replace('_', ' ')} with sparse_accel {__version__}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in metrics.items()),
        f"| sparsity of the prunable weights | {census.sparsity:.4f} |",
        f"| parameters | {census.num_parameters:,} |",
        f"| quantized modules | {quantized} ({plan.num_quantizers} tensors) |",
        f"| teacher | {options.typed('distill_teacher') or 'none'} |",
        *(f"| {name} | {resolution.note} |" for name, resolution in options.stubs.items()),
        "",
        "## Sparsity by kind of layer",
        "",
        "| kind | parameters | zeros | sparsity |",
        "|---|---:|---:|---:|",
        *(f"| {row.kind} | {row.numel:,} | {row.zeros:,} | {row.sparsity:.4f} |" for row in census.kinds()),
        "",
        "## Command",
        "",
        "```",
        command,
        "```",
        "",
    ]
    if quantized:
        lines += [
            "The weights are stored in float; `compression_plan.json` says which tensors were fake-quantized in training and "
            "`quantization.safetensors` holds their scales and zero points.",
            "",
        ]
    if run.recipe_text:
        lines += ["## Recipe", "", "```yaml", run.recipe_text.rstrip(), "```", ""]
    return "\n".join(lines)
