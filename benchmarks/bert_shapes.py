"""Random question-answering models of known shapes, recipes that hold their zeros, and what a result says of its machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `tests` is not installed

import accelerate
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering

from sparse_accel.compress.masks import magnitude_mask
from tests.tiny import tiny_squad, tiny_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 500,
    },
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
    "bert_base": {},
}

HOLD_ZEROS = """\
modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 1.0
  - !ConstantPruningModifier
    start_epoch: 0.0
    params: __ALL_PRUNABLE__
"""
FREEZE_EMBEDDINGS = """\
  - !TrainableParamsModifier
    params: ["re:.*embeddings.*"]
    trainable: False
"""


@torch.no_grad()
def random_model(shape: str, sparsity: float = 0.0, **config: Any) -> BertForQuestionAnswering:
    """A model of a shape of `SHAPES`; in each matrix of its encoder the share `sparsity` is zero."""
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**{**SHAPES[shape], **config}))
    for weight in encoder_matrices(model).values():
        if sparsity:
            weight[~magnitude_mask(weight, sparsity)] = 0.0
    return model


def encoder_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is pruned."""
    return {name: weight for name, weight in model.named_parameters() if ".layer." in name and weight.dim() == 2}


def write_world(folder: Path, shape: str, sparsity: float = 0.9, rows: int = 64, **config: Any) -> None:
    """`dense` and `sparse`, two model folders; train.json; and the recipes hold_zeros.yaml and freeze_embeddings.yaml."""
    for name, share in (("dense", 0.0), ("sparse", sparsity)):
        random_model(shape, share, **config).save_pretrained(folder / name)
        tiny_tokenizer(folder / name)
    tiny_squad(folder / "train.json", rows=rows)
    (folder / "hold_zeros.yaml").write_text(HOLD_ZEROS, "utf-8")
    (folder / "freeze_embeddings.yaml").write_text(HOLD_ZEROS + FREEZE_EMBEDDINGS, "utf-8")


def said_by(arm: str, folder: Path) -> dict[str, str]:
    """The options that make an arm of a comparison in a world of `write_world`."""
    if arm == "dense":
        return {"model_name_or_path": str(folder / "dense")}
    recipe, storage = {
        "masked": ("hold_zeros", "masked"),
        "compact": ("hold_zeros", "auto"),
        "compact, frozen embeddings": ("freeze_embeddings", "auto"),
    }[arm]
    return {
        "model_name_or_path": str(folder / "sparse"),
        "recipe": str(folder / f"{recipe}.yaml"),
        "sparse_storage": storage,
    }


def circumstances() -> dict[str, Any]:
    """The command, the versions and the machine, without paths and names."""
    from sparse_accel import __version__

    versions = {
        "python": platform.python_version(),
        "sparse_accel": __version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "transformers": transformers.__version__,
    }
    if importlib.util.find_spec("deepspeed") is not None:
        versions["deepspeed"] = importlib.metadata.version("deepspeed")
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": versions,
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "busy_cores_before": round(os.getloadavg()[0], 2),
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
