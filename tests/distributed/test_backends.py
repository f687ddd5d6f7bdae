"""FSDP2 and DeepSpeed ZeRO on two real processes: the result of one process, exact zeros, and resuming from anywhere.

One launch a backend carries out all of its cases; full_matrix.py measures every combination. 49 rows: the last step of an
epoch has a single feature, so that the second process has none.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import running
from tests.distributed.launching import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
NAMES = {
    "fsdp2": "FSDP2",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "zero3_offload": "DeepSpeed ZeRO-3",
}
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
# The default run takes the two that shard parameters.
MARKS = {
    "fsdp2": [],
    "zero3": [needs_deepspeed],
    **{name: [needs_deepspeed, pytest.mark.exhaustive] for name in ("zero1", "zero2", "zero3_offload")},
}
EVERY = pytest.mark.parametrize(
    "launched", [pytest.param(name, marks=marks) for name, marks in MARKS.items()], indirect=True
)

FLOAT = {"recipe": "question_answering/pruned", "recipe_args": '{"num_epochs": 3, "init_lr": 0.5}', "optim": "sgd"}
QUANTIZED = {"recipe_args": running.QUANT_ARGS.replace("1e-3", "0.5"), "optim": "sgd"}
# AdamW, quantization from step 4 on. Without clipping both storages give the same bits.
ADAMW = {"save_steps": 5, "max_grad_norm": 0}
# Once tensors are rounded to a grid, noise of 1e-7 now and then decides which point of the grid they go to.
GRID = 2e-2


@dataclass(frozen=True)
class Launched:
    """What a launch made: a folder for each case, and all that was printed."""

    config: str
    folder: Path
    cases: tuple[str, ...]
    output: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dropout off: two processes draw other random numbers than one. The first has two batches to evaluate, the second
    one."""
    made = running.tiny_world(tmp_path_factory.mktemp("world"), rows=49, dropout=0.0)
    return made | {"per_device_eval_batch_size": 9}


@pytest.fixture(scope="module")
def headless(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The student without its head, as a model that was pruned in pretraining."""
    student, folder = Path(world["model_name_or_path"]), tmp_path_factory.mktemp("headless")
    for file in student.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(student / "model.safetensors")
    encoder = {name: tensor for name, tensor in weights.items() if not name.startswith("qa_outputs.")}
    assert len(encoder) == len(weights) - 2
    save_file(encoder, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def alone(world: dict[str, Any], headless: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the same commands."""
    folder = tmp_path_factory.mktemp("alone")
    running.run(world, folder / "float", **FLOAT)
    running.run(world, folder / "bf16", **FLOAT, bf16=True)
    running.run(world, folder / "fresh", **FLOAT, model_name_or_path=headless)
    running.run(world, folder / "quantized", **QUANTIZED)
    running.run(world, folder / "whole", **ADAMW)
    running.run(world, folder / "stopped", **ADAMW, max_steps=5)
    return folder


def carry_out(config: str, world: dict[str, Any], folder: Path, cases: list[tuple[str, dict[str, Any]]]) -> Launched:
    """The cases, each into a folder of its name; a name that comes twice is resumed. They share a cache of their own."""
    two = world | {"gradient_accumulation_steps": 1, "cache_dir": str(folder / "cache")}
    output = launch(config, [running.command(two, folder / name, **changes) for name, changes in cases], folder)
    return Launched(config, folder, tuple(name for name, _ in cases), output)


def every(alone: Path, *, teacher: str = "replicated") -> list[tuple[str, dict[str, Any]]]:
    """The cases that each backend has."""
    return [
        ("float", {**FLOAT, "sparse_storage": "masked", "teacher_placement": teacher, "teacher_cache": "off"}),
        ("bf16", {**FLOAT, "sparse_storage": "compact", "bf16": True, "teacher_placement": teacher}),
        (
            "quantized",
            {
                **QUANTIZED,
                "sparse_storage": "compact",
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
            },
        ),
        ("whole", ADAMW),
        ("stopped", {**ADAMW, "max_steps": 5}),
        ("stopped", ADAMW),
        ("from_one", going_on(alone / "stopped", gradient_accumulation_steps=2)),
    ]


def going_on(folder: Path, **changes: Any) -> dict[str, Any]:
    """From another run's checkpoint, to the end."""
    return {**ADAMW, "resume_from_checkpoint": folder / "checkpoint-5", **changes}


@pytest.fixture(scope="module")
def zero1(world: dict[str, Any], alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return carry_out("zero1", world, tmp_path_factory.mktemp("zero1"), every(alone))


@pytest.fixture(scope="module")
def zero2(world: dict[str, Any], alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return carry_out("zero2", world, tmp_path_factory.mktemp("zero2"), every(alone))


@pytest.fixture(scope="module")
def zero3(world: dict[str, Any], alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return carry_out("zero3", world, tmp_path_factory.mktemp("zero3"), every(alone, teacher="zero3"))


@pytest.fixture(scope="module")
def fsdp2(
    world: dict[str, Any],
    alone: Path,
    headless: str,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Launched:
    folder = tmp_path_factory.mktemp("fsdp2")
    cases = [
        *every(alone, teacher="fsdp2"),
        ("recomputed", {**ADAMW, "gradient_checkpointing": True, "sparse_storage": "compact"}),
        ("to_masked", going_on(folder / "stopped", sparse_storage="masked")),
        ("fresh", {**FLOAT, "model_name_or_path": headless}),
    ]
    if HAS_DEEPSPEED:
        zero3: Launched = request.getfixturevalue("zero3")
        cases.append(("from_zero3", going_on(zero3.folder / "stopped")))
    return carry_out("fsdp2", world, folder, cases)


@pytest.fixture(scope="module")
def fsdp2_from_masked(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The other way about. A launch of its own, which the default run does without."""
    folder = tmp_path_factory.mktemp("fsdp2_from_masked")
    cases = [
        ("masked", {**ADAMW, "max_steps": 5, "sparse_storage": "masked"}),
        ("to_compact", going_on(folder / "masked", sparse_storage="compact")),
    ]
    return carry_out("fsdp2", world, folder, cases)


@pytest.fixture(scope="module")
def zero3_offload(
    world: dict[str, Any], alone: Path, fsdp2: Launched, tmp_path_factory: pytest.TempPathFactory
) -> Launched:
    cases = [*every(alone, teacher="zero3"), ("from_fsdp2", going_on(fsdp2.folder / "stopped"))]
    return carry_out("zero3_offload", world, tmp_path_factory.mktemp("zero3_offload"), cases)


@pytest.fixture
def launched(request: pytest.FixtureRequest) -> Launched:
    """That of the backend that the test is run with."""
    found: Launched = request.getfixturevalue(request.param)
    return found


@EVERY
def test_two_processes_give_the_result_of_one(launched: Launched, alone: Path) -> None:
    """Masked with a teacher that is spread where the student is, compact in bfloat16, and compact with quantization."""
    assert running.largest_difference(alone / "float", launched.folder / "float") < 1e-5
    assert running.largest_difference(alone / "bf16", launched.folder / "bf16") < 1e-3
    assert running.largest_difference(alone / "quantized", launched.folder / "quantized") < GRID


@EVERY
def test_unequal_numbers_of_batches_are_evaluated_to_the_same_answers(
    launched: Launched, alone: Path, world: dict[str, Any]
) -> None:
    results = running.results(launched.folder / "float")
    assert math.ceil(results["eval_samples"] / world["per_device_eval_batch_size"]) == 3
    assert results["eval_f1"] == running.results(alone / "float")["eval_f1"]
    answers = "eval_predictions.json"
    assert (launched.folder / "float" / answers).read_bytes() == (alone / "float" / answers).read_bytes()


@EVERY
def test_what_was_zero_is_zero_and_nothing_else(launched: Launched, world: dict[str, Any]) -> None:
    student = load_file(Path(world["model_name_or_path"]) / "model.safetensors")
    pruned = {name: tensor == 0 for name, tensor in student.items() if ".layer." in name and tensor.dim() == 2}
    assert sum(int(zeros.sum()) for zeros in pruned.values()) > 9000
    for case in set(launched.cases):
        trained = load_file(launched.folder / case / "model.safetensors")
        changed = [name for name, zeros in pruned.items() if not torch.equal(trained[name] == 0, zeros)]
        assert not changed, case


@EVERY
def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(launched: Launched) -> None:
    """In the middle of an epoch, after quantization began."""
    assert f"resuming this command from {launched.folder / 'stopped' / 'checkpoint-5'}" in launched.output
    assert running.differing(launched.folder / "whole", launched.folder / "stopped") == []


@EVERY
def test_a_checkpoint_of_one_process_goes_on(launched: Launched, alone: Path) -> None:
    assert "1 micro-batches a step instead of 2" in launched.output
    assert running.largest_difference(alone / "whole", launched.folder / "from_one") < GRID


@EVERY
def test_one_process_speaks_and_none_warns(launched: Launched) -> None:
    assert launched.output.count(f"2 processes ({NAMES[launched.config]})") == len(launched.cases), launched.output
    assert launched.output.count("written to") == len(launched.cases), launched.output
    assert "Warning" not in launched.output, launched.output


@pytest.mark.parametrize(
    ("launched", "placement"),
    [
        ("fsdp2", "fsdp2"),
        *(pytest.param(name, "zero3", marks=MARKS[name]) for name in ("zero3", "zero3_offload")),
    ],
    indirect=["launched"],
)
def test_the_teacher_was_spread(launched: Launched, placement: str) -> None:
    """To be asked in every step, and to fill a cache."""
    assert launched.output.count(f"{placement}; with the student about") == 2


@EVERY
def test_two_processes_fill_the_cache_of_one(launched: Launched, world: dict[str, Any]) -> None:
    """Whole teachers and, in bfloat16, one that is spread: FSDP2 gives the bits of a whole one, ZeRO-3 not quite."""
    one, two = (
        Path(root) / "sparse_accel_features/teachers" for root in (world["cache_dir"], launched.folder / "cache")
    )
    caches = {path.name for path in two.iterdir()}
    assert len(caches) == 2 and caches <= {path.name for path in one.iterdir()}
    for cache in caches:
        ours, theirs = (load_file(root / cache / "outputs.safetensors") for root in (one, two))
        for name, expected in ours.items():
            tolerance = 1e-2 if expected.dtype == torch.bfloat16 and launched.config.startswith("zero3") else 0.0
            torch.testing.assert_close(theirs[name], expected, rtol=tolerance, atol=tolerance)


def test_recomputed_activations_change_no_bit(fsdp2: Launched) -> None:
    """Compact weights and quantizers, whose ranges must be updated once, in backward's second forward as well."""
    assert running.differing(fsdp2.folder / "whole", fsdp2.folder / "recomputed") == []


@pytest.mark.parametrize(
    ("launched", "first", "then"),
    [
        ("fsdp2", "stopped", "to_masked"),
        pytest.param("fsdp2_from_masked", "masked", "to_compact", marks=pytest.mark.exhaustive),
    ],
    indirect=["launched"],
)
def test_a_sharded_run_goes_on_with_the_other_storage_to_the_same_bits(
    launched: Launched, first: str, then: str, fsdp2: Launched
) -> None:
    is_compact = (launched.folder / first / "checkpoint-5" / "model.compact.safetensors").is_file()
    assert is_compact == (then == "to_masked")
    assert running.differing(fsdp2.folder / "whole", launched.folder / then) == []


def test_a_fresh_head_is_the_same_on_all_ranks(fsdp2: Launched, alone: Path) -> None:
    """Only the first rank reads weights and draws the head; each then trains its own slice of it."""
    assert fsdp2.output.count("is new and starts at random") == 1
    assert running.largest_difference(alone / "fresh", fsdp2.folder / "fresh") < 1e-5


@needs_deepspeed
@pytest.mark.parametrize(
    ("launched", "case"),
    [("fsdp2", "from_zero3"), pytest.param("zero3_offload", "from_fsdp2", marks=MARKS["zero3_offload"])],
    indirect=["launched"],
)
def test_another_backends_checkpoint_goes_on(launched: Launched, case: str) -> None:
    assert running.largest_difference(launched.folder / "whole", launched.folder / case) < GRID
