"""The tiny world of text classification: questions and passages, sorted by what is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.tiny import tiny_bert, tiny_rows

# By the first words of a question.
KINDS = {"What color": "colour", "Where did": "place", "In which year": "year"}
LABELS = tuple(sorted(KINDS.values()))


def tiny_text_rows(rows: int, seed: int = 0) -> list[dict[str, str]]:
    """`rows` pairs of texts with the kind of answer as their label."""
    made = []
    for row in tiny_rows(rows, seed):
        kind = next(kind for words, kind in KINDS.items() if row["question"].startswith(words))
        made.append({"sentence1": row["question"], "sentence2": row["context"].split(". ")[0], "label": kind})
    return made


def tiny_text_bert(
    path: Path, seed: int = 0, labels: tuple[str, ...] | int = LABELS, kind: str = "bert", dropout: float = 0.1
) -> Path:
    """Save a random `*ForSequenceClassification` with its tokenizer into the folder `path`, which is returned."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tiny_bert(path, kind=kind, dropout=dropout)
    names = tuple(f"LABEL_{place}" for place in range(labels)) if isinstance(labels, int) else labels
    config = AutoConfig.from_pretrained(path, num_labels=len(names))
    config.id2label, config.label2id = dict(enumerate(names)), {name: place for place, name in enumerate(names)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    return path


def tiny_text_world(folder: Path, *, rows: int = 64, dropout: float = 0.1, sparsity: float = 0.6) -> dict[str, Any]:
    """A pruned student, a teacher with its labels in another order, and data under `folder`; returns the options of a command."""
    from sparse_accel.compress.masks import magnitude_mask

    tiny_text_bert(folder / "teacher", seed=1, labels=("year", "colour", "place"))
    tiny_text_bert(folder / "student", seed=2, dropout=dropout)
    weights = folder / "student" / "model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if ".layer." in name and tensor.dim() == 2:
            tensor[~magnitude_mask(tensor, sparsity)] = 0
    save_file(tensors, weights, metadata={"format": "pt"})
    for name, count, seed in (("train", rows, 0), ("val", 24, 5)):
        lines = [json.dumps(row) for row in tiny_text_rows(count, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {
        "train_file": str(folder / "train.jsonl"),
        "validation_file": str(folder / "val.jsonl"),
        "model_name_or_path": str(folder / "student"),
        "distill_teacher": str(folder / "teacher"),
        "recipe": "text_classification/pruned_quant",
        "recipe_args": '{"num_epochs": 3, "qat_start_epoch": 1.0, "observer_epoch": 2.0, "init_lr": 1e-3}',
        "do_train": True,
        "do_eval": True,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_seq_length": 64,
        "logging_steps": 1,
        "save_steps": 1000,
        "cache_dir": str(folder / "cache"),
    }
