"""One rank of a launch that calls the functions and a loop of its own: `python_worker.py FOLDER`, with what
`running.tiny_world` makes in it."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from sparse_accel import AttachedRecipe, attach, train
from tests import running

RECIPE = "question_answering/pruned_quant"
ARGS = {"num_epochs": 3, "qat_start_epoch": 1.0, "observer_epoch": 2.0, "init_lr": 0.5}


def features(folder: Path) -> list[dict[str, torch.Tensor]]:
    """32 of one length, with made-up labels."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows = json.loads((folder / "train.json").read_text("utf-8"))["data"][:32]
    texts = [(row["question"], row["context"]) for row in rows]
    tokens = tokenizer(texts, max_length=64, truncation="only_second", padding="max_length", return_tensors="pt")
    labels = torch.arange(32) + 20
    return [
        {
            **{name: values[at] for name, values in tokens.items()},
            "start_positions": labels[at],
            "end_positions": labels[at],
        }
        for at in range(32)
    ]


def own_loop(
    folder: Path, output: Path, *, accumulation: int, pause: int | None = None, resume: bool = False
) -> AttachedRecipe:
    """12 steps of 8 features each, over all ranks together, and the model's folder; at `pause` accelerate's state is left."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=os.environ.get("ACCELERATE_USE_CPU") == "1", gradient_accumulation_steps=accumulation)
    assert accelerator.is_fsdp2 == (os.environ.get("ACCELERATE_USE_FSDP") == "true")
    model = AutoModelForQuestionAnswering.from_pretrained(folder / "student")
    teacher = AutoModelForQuestionAnswering.from_pretrained(folder / "teacher")
    batch_size = 8 // accumulation // accelerator.num_processes
    sparse = attach(model, RECIPE, ARGS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = DataLoader(features(folder), batch_size=batch_size)
    model, optimizer, loader = sparse.prepare(accelerator, model, optimizer, loader, teacher=teacher)
    assert sparse.num_steps == 12, sparse.num_steps
    if resume:
        accelerator.load_state(str(output))
        assert sparse.step == pause
    model.train()
    while sparse.step < 12:
        for batch in itertools.islice(loader, sparse.step % 4 * accumulation, None):
            with accelerator.accumulate(model):
                sparse.begin(batch)
                outputs = model(**batch)
                accelerator.backward(sparse.loss(outputs.loss, batch, outputs))
                optimizer.step()
                optimizer.zero_grad()
                sparse.end()
            if sparse.step == pause and not resume and accelerator.sync_gradients:
                accelerator.save_state(str(output))
    sparse.save(output / ("again" if resume else "model"))
    accelerator.wait_for_everyone()
    return sparse


def main(folder: Path) -> None:
    """Two trainings one after the other, then the loop, whole and in two parts."""
    options = json.loads((folder / "options.json").read_text("utf-8"))
    results = [train("question_answering", **options, output_dir=folder / name) for name in ("first", "second")]
    assert results[0].metrics["eval_f1"] == results[1].metrics["eval_f1"]
    assert running.differing(folder / "first", folder / "second") == []
    own_loop(folder, folder / "loop", accumulation=1, pause=6)
    own_loop(folder, folder / "loop", accumulation=1, pause=6, resume=True)
    own_loop(folder, folder / "accumulated", accumulation=2)


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_CPU") != "1":
        from tests.distributed.on_cpu import stand_for_gpus

        stand_for_gpus()
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
