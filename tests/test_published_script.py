"""The comparison with a published script, on a script of our own that calls what it calls."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState

from sparse_accel.errors import InvariantError

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import argparse
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, default_data_collator, get_scheduler
from transformers.utils import check_min_version, send_example_telemetry
import evaluate

check_min_version("{version}")
parser = argparse.ArgumentParser()
for name in "model_name_or_path train_file validation_file output_dir".split():
    parser.add_argument("--" + name)
for name in (
    "max_seq_length per_device_train_batch_size gradient_accumulation_steps max_train_steps max_train_samples"
    " max_eval_samples seed"
).split():
    parser.add_argument("--" + name, type=int)
parser.add_argument("--pad_to_max_length", action="store_true")
args = parser.parse_args()
send_example_telemetry("qa", args)
accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
set_seed(args.seed)
tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
model = AutoModelForQuestionAnswering.from_pretrained(args.model_name_or_path)

def prepare(rows):
    found = tokenizer(
        rows["question"], rows["context"], truncation="only_second", max_length=args.max_seq_length, padding="max_length"
    )
    found["start_positions"] = [20 + number % 7 for number in range(len(rows["question"]))]
    found["end_positions"] = [25 + number % 7 for number in range(len(rows["question"]))]
    return found

raw = load_dataset("json", data_files=dict(train=args.train_file), field="data")["train"]
data = raw.map(prepare, batched=True, remove_columns=raw.column_names)
loader = DataLoader(
    data, shuffle=True, collate_fn=default_data_collator, batch_size=args.per_device_train_batch_size
)
evaluate.load("squad")
sides = ("bias", "LayerNorm.weight")
groups = [
    dict(params=[p for n, p in model.named_parameters() if any(s in n for s in sides) == side], weight_decay=0.0)
    for side in (False, True)
]
optimizer = torch.optim.AdamW(groups, lr={rate})
schedule = get_scheduler(
    "linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=args.max_train_steps
)
model, optimizer, loader, _, schedule = accelerator.prepare(model, optimizer, loader, DataLoader(data), schedule)
for _ in range(args.max_train_steps):
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
"""


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a script of this rate, which asks for this version, beside B1."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("published_script")

    def run(rate: float = 5e-5, version: str = "4.57.0") -> dict[str, Any]:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.replace("{rate}", str(rate)).replace("{version}", version), "utf-8")
        given = {"shape": "tiny", "precision": "fp32", "features": 8, "micro_batch_size": 2, "micro_batches": 2}
        try:
            found: dict[str, Any] = module.measured(
                argparse.Namespace(**given, script=script, data=None, rounds=2, threads=1)
            )
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
        return found

    return run


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_a_script_that_does_the_same_is_found_to(compared: Any) -> None:
    found = compared(version="99.0")
    assert found["steps_compared"] == 6 and found["batch_shape"] == [2, 384]
    assert found["losses"]["script"] == found["losses"]["b1"]
    assert len(set(found["losses"]["script"])) == 12
    assert [len(seconds["cpu"]) for seconds in found["seconds_an_epoch"].values()] == [2, 2]
    assert found["script"]["asks_for"] == "99.0" and "99.0" in found["script"]["refused_these_versions"]


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_a_script_that_learns_faster_is_found_out(compared: Any) -> None:
    with pytest.raises(InvariantError, match="losses"):
        compared(rate=5e-4)
