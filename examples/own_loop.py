"""A recipe in a training loop of one's own, on what `make demo` made: `python examples/own_loop.py`, or `accelerate launch`"""

import json
import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from sparse_accel import attach

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/demo"
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/pruned")
model = AutoModelForQuestionAnswering.from_pretrained(f"{folder}/pruned")
teacher = AutoModelForQuestionAnswering.from_pretrained(f"{folder}/teacher")


def encode(row: dict) -> dict:
    """A question about a passage as the model reads it, and between which tokens the answer lies."""
    tokens = tokenizer(row["question"], row["context"], max_length=128, truncation="only_second", padding="max_length")
    first = row["answers"]["answer_start"][0]
    last = first + len(row["answers"]["text"][0]) - 1
    start, end = (tokens.char_to_token(at, sequence_index=1) or 0 for at in (first, last))
    columns = {**tokens, "start_positions": start, "end_positions": end}
    return {name: torch.tensor(values) for name, values in columns.items()}


with open(f"{folder}/data/train.json") as file:
    loader = DataLoader([encode(row) for row in json.load(file)["data"]], batch_size=16, shuffle=True)

accelerator = Accelerator(gradient_accumulation_steps=2)
settings = {"num_epochs": 3, "qat_start_epoch": 1.0, "observer_epoch": 2.0, "init_lr": 4e-4}

sparse = attach(model, "question_answering/pruned_quant", settings)
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer, loader = sparse.prepare(accelerator, model, optimizer, loader, teacher=teacher)

model.train()
for epoch in range(3):
    for batch in loader:
        with accelerator.accumulate(model):
            sparse.begin(batch)
            outputs = model(**batch)
            loss = sparse.loss(outputs.loss, batch, outputs)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            sparse.end()
    accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

sparse.save(f"{folder}/own_loop", tokenizer)
accelerator.print(f"{sparse.step} steps; `sparse_accel export {folder}/own_loop` makes it a deployment")
