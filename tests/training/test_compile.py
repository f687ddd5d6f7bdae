"""Compiled layers compute what plain ones do, once for all batches; what is not offered is refused by name."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from sparse_accel.compress.plan import install
from sparse_accel.compress.ranges import Phase, calibrating, set_phase
from sparse_accel.errors import OptionError
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime import compiling
from sparse_accel.runtime.option_parsing import load_options
from sparse_accel.runtime.pauses import Run
from sparse_accel.runtime.preemption import StopRequest
from sparse_accel.timeline import Clock
from tests import running
from tests.unit.qat_bert import bert, tutorial_plan


def test_without_a_compiler_the_run_ends_with_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OptionError, match=r"needs a C\+\+ compiler, and there is none here \(g\+\+, clang"):
        compiling.require_compiler(torch.device("cpu"))
    compiling.require_compiler(torch.device("cuda"))


def test_what_is_not_offered_is_refused_by_name() -> None:
    backend: Any = SimpleNamespace(name="DeepSpeed ZeRO-3", shards_weights=True)
    with pytest.raises(OptionError, match=r"DeepSpeed ZeRO-3: it gathers each weight .* or FSDP2"):
        compiling.check_compile(backend)
    backend.name, backend.shards_weights = "DeepSpeed ZeRO-2", False
    with pytest.raises(OptionError, match=r"DeepSpeed ZeRO-2: that was never seen"):
        compiling.check_compile(backend)
    for name, shards_weights in (("DDP", False), ("FSDP2", True)):
        backend.name, backend.shards_weights = name, shards_weights
        compiling.check_compile(backend)
    with pytest.raises(OptionError, match="no list of layers"):
        compiling.compile_blocks(nn.Linear(2, 2))


def test_it_is_said_up_to_where_a_run_is_compiled() -> None:
    quantizes = Recipe.load("question_answering/pruned_quant", '{"num_epochs": 3, "qat_start_epoch": 1.0}')
    told = compiling.compiled_part(quantizes, Clock(3, 4))
    assert told is not None and "until quantization starts, at epoch 1 (step 4)" in told
    told = compiling.compiled_part(quantizes, Clock(4, 4))
    assert told is not None and "no effect" in told
    assert compiling.compiled_part(Recipe.load("question_answering/pruned"), Clock(0, 4)) is None


def test_a_layer_is_compiled_while_its_quantizers_rest_and_never_after(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(forward: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
        def compiled(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            called.append(block)
            return forward(block, *args, **kwargs)

        return compiled

    called: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", stand_in)
    model = bert()
    install(model, tutorial_plan(model))
    ids = torch.ones(1, 4, dtype=torch.long)
    assert compiling.compile_blocks(model) == 1
    blocks = compiling.encoder_blocks(model)

    def compiled_in_a_forward(model: nn.Module) -> list[nn.Module]:
        called.clear()
        model(ids)
        return called[:]

    assert compiled_in_a_forward(model) == blocks
    twin = copy.deepcopy(model)
    assert compiled_in_a_forward(twin) == compiling.encoder_blocks(twin), "a copy runs its own layers"
    with calibrating(model):
        assert compiled_in_a_forward(model) == []
    assert compiled_in_a_forward(model) == blocks
    for phase in (Phase.OBSERVE, Phase.FROZEN, Phase.OFF):
        set_phase(model, phase)
        assert compiled_in_a_forward(model) == []


def test_compilers_outlive_a_signal_to_the_group_and_the_run_takes_it() -> None:
    """What torch starts while it compiles is a child process, here one that sleeps."""
    from torch._dynamo.callback import CallbackTrigger, callback_handler

    stop = StopRequest(1, None)
    with stop.listening(), compiling.sheltered_compilers():
        with callback_handler.install_callbacks(CallbackTrigger.DYNAMO, "0"):
            compiler = subprocess.Popen(["sleep", "60"])
            compiler.send_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                compiler.wait(0.2)
        assert stop.is_due()
        other = subprocess.Popen(["sleep", "60"])
        other.send_signal(signal.SIGTERM)
        assert other.wait(10) == -signal.SIGTERM, "only compilers are sheltered"
    assert callback_handler.start_callbacks == callback_handler.end_callbacks == []
    compiler.kill()
    compiler.wait()


def test_hugging_faces_name_means_the_same(tmp_path: Path) -> None:
    world = running.tiny_world(tmp_path)
    flags = {"train_file": world["train_file"], "model_name_or_path": world["model_name_or_path"], "do_train": "True"}
    options = load_options(
        "question_answering", {**flags, "output_dir": str(tmp_path / "out"), "torch_compile": "True"}
    )
    assert options.compile


@pytest.mark.filterwarnings("ignore")  # torch warns of its own code
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["dense", "compact", "masked"])
def test_compiled_training_is_plain_training_and_compiles_nothing_after_its_first_steps(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed batches of another number of tokens in every step."""
    from torch._dynamo.utils import counters

    world = running.tiny_world(tmp_path, dropout=0.0)
    changes: dict[str, Any] = {"recipe_args": None, "distill_teacher": None, "recipe": None, "max_steps": 6}
    if kind != "dense":
        changes |= {"recipe": "question_answering/pruned", "sparse_storage": kind, "distill_teacher": "disable"}
    changes |= {"do_eval": None, "num_train_epochs": None if kind != "dense" else 3}
    plain = running.run(world, tmp_path / "plain", **changes)
    graphs, after_step = [], Run.after_step

    def note(run: Run, *args: Any) -> None:
        graphs.append(counters["stats"]["unique_graphs"])
        after_step(run, *args)

    monkeypatch.setattr(Run, "after_step", note)
    torch._dynamo.reset()
    counters.clear()
    compiled = running.run(world, tmp_path / "compiled", compile=True, **changes)
    assert graphs[0] > 0 and graphs[-1] == graphs[1], graphs
    assert [line["loss"] for line in running.log(compiled)] == pytest.approx(
        [line["loss"] for line in running.log(plain)], rel=1e-5
    )
    assert (
        running.largest_difference(plain, compiled) < 1e-3
    )  # AdamW's first steps are as large for a gradient of any size


@pytest.mark.filterwarnings("ignore")  # torch warns of its own code
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_a_run_that_quantizes_is_compiled_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluated after each epoch: dense, observing, frozen. Resumed before quantization and in its last phase."""
    from torch._dynamo.utils import counters

    world = running.tiny_world(tmp_path, dropout=0.0) | {"eval_strategy": "epoch"}
    plain = running.run(world, tmp_path / "plain")
    graphs, after_step = [], Run.after_step

    def note(run: Run, *args: Any) -> None:
        graphs.append(counters["stats"]["unique_graphs"])
        after_step(run, *args)

    def graphs_of(output_dir: Path, **changes: Any) -> list[int]:
        torch.compiler.reset()
        counters.clear()
        graphs.clear()
        running.run(world, output_dir, compile=True, **changes)
        return graphs[:]

    monkeypatch.setattr(Run, "after_step", note)
    counted = graphs_of(tmp_path / "compiled")
    assert 0 < counted[1] == counted[3] < counted[4] == counted[-1], "training, the first evaluation, and no more"
    assert "until quantization starts, at epoch 1 (step 4)" in capsys.readouterr().out
    for ours, theirs in zip(running.log(tmp_path / "compiled"), running.log(plain), strict=True):
        # Once tensors are rounded to a grid, noise of 1e-7 now and then decides which point of the grid they go to.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5 if ours["phase"] == "dense" else 5e-3)
    assert running.largest_difference(plain, tmp_path / "compiled") < 5e-3
    assert running.results(plain)["eval_f1"] == running.results(tmp_path / "compiled")["eval_f1"]
    for stop in (2, 9):
        out = tmp_path / f"stopped at {stop}"
        graphs_of(out, max_steps=stop)
        counted = graphs_of(out)
        assert (counted[0] > 0) == (stop == 2), counted
        assert running.differing(tmp_path / "compiled", out) == []


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_told_to_end_while_it_compiles_a_run_saves_as_ever(tmp_path: Path) -> None:
    """The signal goes to the whole process group, compilers included, as schedulers send it."""
    world = running.tiny_world(tmp_path, dropout=0.0)
    changes = {"recipe": "question_answering/pruned", "recipe_args": '{"num_epochs": 3}', "compile": True}
    words = running.command(world, tmp_path / "out", **changes)
    process = running.start(
        words,
        "setsid",
        "--wait",
        sys.executable,
        "-m",
        "sparse_accel",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled"),
    )
    deadline = time.monotonic() + 600
    compilers: list[psutil.Process] = []
    while not compilers and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "cc1plus" in child.name() and ".main.cpp" in " ".join(child.cmdline()):
                    compilers.append(child)
    os.killpg(os.getpgid(compilers[0].pid), signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output
    assert "told to end (SIGTERM): saved checkpoint-1" in output
    assert "Traceback" not in output and "CppCompileError" not in output
    assert (tmp_path / "out" / "preempted.json").is_file()
