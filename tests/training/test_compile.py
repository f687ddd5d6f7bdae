"""Compiled layers compute what plain ones do, once for all batches; what is not offered is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_accel.errors import OptionError
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime import compiling
from sparse_accel.runtime.option_parsing import load_options
from sparse_accel.runtime.pauses import Run
from tests import running


def test_without_a_compiler_the_run_ends_with_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OptionError, match=r"needs a C\+\+ compiler, and there is none here \(g\+\+, clang"):
        compiling.require_compiler(torch.device("cpu"))
    compiling.require_compiler(torch.device("cuda"))


def test_what_is_not_offered_is_refused_by_name() -> None:
    quantizes = Recipe.load("question_answering/pruned_quant")
    with pytest.raises(OptionError, match="not offered with quantization"):
        compiling.check_compile(quantizes, 1)
    with pytest.raises(OptionError, match="single process"):
        compiling.check_compile(Recipe.empty(), 2)
    with pytest.raises(OptionError, match="no list of layers"):
        compiling.compile_blocks(nn.Linear(2, 2))


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
