"""A recipe in somebody's own loop: the same bits as the command, and what can be done wrong with it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from sparse_accel.errors import LoopError, RecipeError
from sparse_accel.folders.publishing import RUN_FILE
from sparse_accel.folders.trained import open_trained
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime import setup
from sparse_accel.runtime.option_parsing import load_options
from sparse_accel.runtime.own_loop import AttachedRecipe, attach
from sparse_accel.tasks.question_answering import QuestionAnswering
from sparse_accel.timeline import Clock
from tests import running

ARGS = {"num_epochs": 3, "qat_start_epoch": 1.0, "observer_epoch": 2.0, "init_lr": 1e-3}
RECIPE = "question_answering/pruned_quant"
GRADUAL = """
modifiers:
  - !GMPruningModifier
      start_epoch: 0.0
      end_epoch: 2.0
      update_frequency: 0.5
      init_sparsity: 0.1
      final_sparsity: 0.5
      params: ["re:.*encoder.*output.dense.weight"]
  - !EpochRangeModifier
      start_epoch: 0.0
      end_epoch: 3.0
"""


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = running.tiny_world(tmp_path_factory.mktemp("world"), rows=32)
    return made | {
        "do_eval": None, "batching": "padded", "teacher_cache": "off", "sparse_storage": "masked", "save_strategy": "no",
    }  # fmt: skip


def model_of(world: dict[str, Any], name: str = "model_name_or_path") -> Any:
    return AutoModelForQuestionAnswering.from_pretrained(world[name])


def train_like_the_command(
    world: dict[str, Any], folder: Path, *, accumulation: int, storage: str, pauses_at: int | None = None
) -> AttachedRecipe:
    """The loop of the program, written by hand around the five calls: its data in its order, its loss and optimizer."""
    changes = {"gradient_accumulation_steps": accumulation, "output_dir": str(folder)}
    options = load_options("question_answering", {**given(world), **changes})
    accelerator = Accelerator(cpu=True)
    tokenizer = AutoTokenizer.from_pretrained(world["model_name_or_path"])
    torch.manual_seed(options.seed)
    model = model_of(world)
    task = QuestionAnswering()
    data = task.load(options, tokenizer, max_positions=512)
    batches = setup.build_loader(options, data.train, data.collate, "random", task, accelerator)

    sparse = attach(model, RECIPE, ARGS, sparse_storage=storage)
    accepted = setup.accepted_inputs(model) - set(task.label_keys)
    optimizer = setup.build_optimizer(options, model)
    model, optimizer = sparse.prepare(
        accelerator,
        model,
        optimizer,
        steps_per_epoch=batches.steps_per_epoch,
        teacher=model_of(world, "distill_teacher"),
    )
    torch.manual_seed(options.seed)
    model.train()
    assert sparse.num_steps is not None
    for micro_batches in batches.steps(Clock(0, batches.steps_per_epoch), sparse.num_steps):
        sparse.begin(*(micro.inputs for micro in micro_batches))
        num_features = torch.tensor(float(sum(micro.num_units for micro in micro_batches)))
        for micro in micro_batches:
            outputs = model(**{name: value for name, value in micro.inputs.items() if name in accepted})
            loss = sparse.loss(task.loss(outputs, micro.inputs), micro.inputs, outputs)
            accelerator.backward(loss * (micro.num_units / num_features))
        accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        sparse.end()
        if sparse.step == pauses_at:
            sparse.save(folder.with_name("half_way"))
    sparse.save(folder, tokenizer)
    return sparse


@pytest.mark.parametrize(
    ("accumulation", "storage"),
    [(2, "masked"), pytest.param(1, "auto", marks=pytest.mark.exhaustive)],
)
def test_the_loop_gives_the_commands_bits(
    world: dict[str, Any], tmp_path: Path, accumulation: int, storage: str
) -> None:
    changes = {"gradient_accumulation_steps": accumulation, "sparse_storage": storage}
    theirs = running.run(world, tmp_path / "command", **changes)
    sparse = train_like_the_command(world, tmp_path / "loop", accumulation=accumulation, storage=storage, pauses_at=2)
    assert sparse.step == sparse.num_steps
    assert running.differing(theirs, tmp_path / "loop") == []
    for name in ("compression_plan.json", "recipe.yaml"):
        assert (tmp_path / "loop" / name).read_text() == (theirs / name).read_text()
    # Written half way, before quantization: a float model, and the rest of the training has not noticed.
    assert not (tmp_path / "half_way" / "quantization.safetensors").exists()


@pytest.fixture(scope="module")
def features(world: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """32 features with labels, all of one length."""
    options = load_options("question_answering", {**given(world), "output_dir": "none", "pad_to_max_length": True})
    tokenizer = AutoTokenizer.from_pretrained(world["model_name_or_path"])
    data = QuestionAnswering().load(options, tokenizer, max_positions=512)
    assert data.train is not None
    batch = data.collate(data.train, np.arange(32))
    return [{name: values[row] for name, values in batch.items()} for row in range(32)]


def given(world: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in world.items() if value is not None}


class Loop:
    """A loop as people write it: accelerate's own accumulation, a loader of theirs, the model's own loss."""

    def __init__(self, world: dict[str, Any], features: Any, *, accumulation: int = 1, recipe: Any = RECIPE) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        model = model_of(world)
        self.sparse = attach(model, recipe, None if isinstance(recipe, Recipe) else ARGS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
        loader = DataLoader(features, batch_size=8)
        teacher = model_of(world, "distill_teacher")
        self.model, self.optimizer, self.loader = self.sparse.prepare(
            self.accelerator, model, optimizer, loader, teacher=teacher
        )
        self.rates: list[float] = []

    def train(self, until: int) -> None:
        self.model.train()
        accumulation = self.accelerator.gradient_accumulation_steps
        while self.sparse.step < until:
            done = self.sparse.step % (len(self.loader) // accumulation) * accumulation
            for batch in itertools.islice(self.loader, done, None):
                if self.sparse.step == until:
                    return
                with self.accelerator.accumulate(self.model):
                    self.sparse.begin(batch)
                    outputs = self.model(**batch)
                    self.accelerator.backward(self.sparse.loss(outputs.loss, batch, outputs))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    self.sparse.end()
                self.rates.append(self.optimizer.param_groups[0]["lr"])

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            logits: torch.Tensor = self.model(**batch).start_logits
        return logits


def test_what_is_saved_is_what_was_trained(world: dict[str, Any], features: Any, tmp_path: Path) -> None:
    loop = Loop(world, features, accumulation=2)
    assert loop.sparse.num_steps == 6
    loop.train(until=6)
    steps = [Clock(step, 2).epoch for step in range(6) for _ in range(2)]
    assert loop.rates == pytest.approx([1e-3 * (1 - epoch / 3) for epoch in steps])
    loop.sparse.save(tmp_path / "out", AutoTokenizer.from_pretrained(world["model_name_or_path"]))
    trained = open_trained(tmp_path / "out", QuestionAnswering())
    batch = next(iter(loop.loader))
    with torch.no_grad():
        saved = trained.model(**batch).start_logits
    assert torch.equal(saved, loop.logits(batch))
    assert trained.plan.num_quantizers and not trained.notes
    zeros = model_of(world).bert.encoder.layer[0].output.dense.weight == 0
    assert torch.equal(trained.model.bert.encoder.layer[0].output.dense.weight == 0, zeros)


@pytest.mark.parametrize("pause", [3, pytest.param(5, marks=pytest.mark.exhaustive)])
def test_a_loop_goes_on_from_accelerates_checkpoint(
    world: dict[str, Any], features: Any, tmp_path: Path, pause: int
) -> None:
    """Across the start of quantization (step 4) and after it."""
    whole = Loop(world, features)
    whole.train(until=pause)
    whole.accelerator.save_state(str(tmp_path / "state"))
    held = whole.logits(next(iter(whole.loader)))
    whole.train(until=7)
    AcceleratorState._reset_state(True)
    again = Loop(world, features)
    again.accelerator.load_state(str(tmp_path / "state"))
    assert again.sparse.step == pause
    assert torch.equal(again.logits(next(iter(again.loader))), held)
    again.train(until=7)
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_modules_that_the_loop_holds_in_eval_mode_stay_there(world: dict[str, Any], features: Any) -> None:
    loop = Loop(world, features)
    loop.train(until=4)
    loop.model.bert.embeddings.eval()
    loop.sparse.begin(next(iter(loop.loader)))
    assert not loop.model.bert.embeddings.dropout.training
    assert loop.model.bert.encoder.layer[0].output.dropout.training


def test_a_scheduler_has_the_learning_rate_that_no_modifier_sets(world: dict[str, Any], features: Any) -> None:
    accelerator = Accelerator(cpu=True)
    model = model_of(world)
    recipe = Recipe.load("modifiers:\n- !ConstantPruningModifier\n    params: __ALL_PRUNABLE__\n")
    sparse = attach(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model, optimizer, loader, scheduler = sparse.prepare(
        accelerator, model, optimizer, DataLoader(features, batch_size=8), scheduler
    )
    rates = []
    for batch in loader:
        sparse.begin(batch)
        accelerator.backward(sparse.loss(model(**batch).loss, batch, {}))
        optimizer.step()
        scheduler.step()
        sparse.end()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.25, 0.125, 0.0625]
    assert sparse.num_epochs is None and sparse.epoch == 1.0


def test_weights_are_pruned_gradually(world: dict[str, Any], features: Any, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = model_of(world, "distill_teacher")
    sparse = attach(model, GRADUAL)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model, optimizer, loader = sparse.prepare(accelerator, model, optimizer, DataLoader(features, batch_size=16))
    for _ in range(3):
        for batch in loader:
            sparse.begin(batch)
            accelerator.backward(sparse.loss(model(**batch).loss, batch, {}))
            optimizer.step()
            optimizer.zero_grad()
            sparse.end()
    sparse.save(tmp_path / "out")
    saved = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    weight = saved.bert.encoder.layer[0].output.dense.weight
    assert int((weight == 0).sum()) == round(0.5 * weight.numel())


def test_what_an_earlier_run_said_of_its_model_does_not_stay(world: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    ours = [
        "README.md",
        "all_results.json",
        "model.safetensors",
        "recipe.yaml",
        "report.html",
        "tokenizer.json",
        "train_log.jsonl",
    ]
    for name in (*ours, "notes.md"):
        (out / name).write_text("of an earlier run")
    (out / "runs").mkdir()
    (out / RUN_FILE).write_text(
        json.dumps({"sparse_accel_run": 1, "command": {}, "files": [*ours, "runs", "../notes"]})
    )
    model = model_of(world, "distill_teacher")
    sparse = attach(model, Recipe.empty())
    sparse.prepare(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=1)
    sparse.save(out)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "model.safetensors", "notes.md", "runs", "tokenizer.json", "train_log.jsonl",
    ]  # fmt: skip
    (out / "recipe.yaml").write_text("of an earlier loop")
    sparse.save(out)
    assert not (out / "recipe.yaml").exists()


def test_a_teacher_may_be_a_function(world: dict[str, Any], features: Any) -> None:
    accelerator = Accelerator(cpu=True)
    model, teacher = model_of(world), model_of(world, "distill_teacher").eval()
    sparse = attach(model, RECIPE, ARGS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, loader = sparse.prepare(
        accelerator,
        model,
        optimizer,
        DataLoader(features, batch_size=8),
        teacher=lambda batch: teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]),
    )
    batch = next(iter(loader))
    sparse.begin(batch)
    outputs = model(**batch)
    # The recipe's hardness is 1.0: the task's own loss plays no part.
    loss = sparse.loss(outputs.loss, batch, outputs)
    assert torch.equal(loss, sparse.loss(outputs.loss * 2, batch, outputs))
    assert loss.requires_grad and loss > 0


def test_wrong_calls_are_told_apart(world: dict[str, Any], features: Any, tmp_path: Path) -> None:
    model = model_of(world)
    with pytest.raises(LoopError, match="sparse_storage: 'compct' is not offered; did you mean 'compact'"):
        attach(model, RECIPE, ARGS, sparse_storage="compct")
    with pytest.raises(LoopError, match="a model of transformers"):
        attach(torch.nn.Linear(2, 2), RECIPE, ARGS)
    with pytest.raises(LoopError, match=r"give them to Recipe\.load"):
        attach(model, Recipe.load(RECIPE, ARGS), ARGS)
    early = torch.optim.SGD(model.parameters(), lr=1.0)
    sparse = attach(model, RECIPE, ARGS, sparse_storage="compact")
    with pytest.raises(LoopError, match="has a recipe already"):
        attach(model, RECIPE, ARGS)
    accelerator, loader = Accelerator(cpu=True), DataLoader(features, batch_size=8)
    batch = next(iter(loader))
    with pytest.raises(LoopError, match="begin: call prepare"):
        sparse.begin(batch)
    with pytest.raises(LoopError, match="made before attach"):
        sparse.prepare(accelerator, model, early, loader, teacher="disable")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(LoopError, match=r"pruned_quant\.yaml:\d+: the recipe distils, so give prepare its teacher"):
        sparse.prepare(accelerator, model, optimizer, loader)
    with pytest.raises(LoopError, match="load that model first"):
        sparse.prepare(accelerator, model, optimizer, loader, teacher=str(world["distill_teacher"]))
    with pytest.raises(LoopError, match="the model that the recipe was attached to"):
        sparse.prepare(accelerator, model_of(world), optimizer, loader, teacher="disable")
    with pytest.raises(LoopError, match="2 loaders were given, not one; say how many optimizer steps make an epoch"):
        sparse.prepare(accelerator, model, optimizer, loader, loader, teacher="disable")
    with pytest.raises(RecipeError, match=r"starts at epoch 1|nothing would be quantized"):
        sparse.prepare(accelerator, model, optimizer, loader, teacher="disable", num_epochs=1)
    model, optimizer, loader = sparse.prepare(accelerator, model, optimizer, loader, teacher="disable")
    with pytest.raises(LoopError, match="is prepared already"):
        sparse.prepare(accelerator, model, optimizer)
    with pytest.raises(LoopError, match="end: no step is under way"):
        sparse.end()
    with pytest.raises(LoopError, match="give the batch"):
        sparse.begin()
    with pytest.raises(LoopError, match=r"loss: call begin"):
        sparse.loss(torch.tensor(1.0), batch, {})
    sparse.begin(batch)
    with pytest.raises(LoopError, match="got None: a model computes its loss where the batch has labels"):
        sparse.loss(None, batch, {})
    sparse.loss(torch.tensor(1.0), batch, {})
    with pytest.raises(LoopError, match=r"the last step did not end; call end\(\)"):
        sparse.begin(batch)
    sparse.end()
    with pytest.raises(LoopError, match="counts 7 steps an epoch, this loop 4"):
        sparse.load_state_dict({"step": 1, "steps_per_epoch": 7})


def test_a_dense_model_under_a_recipe_that_holds_zeros_is_told_of(world: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="the model is dense"):
        attach(model_of(world, "distill_teacher"), RECIPE, ARGS)
