"""A training whose model, teacher and recipe are `zoo:` stubs, from the command to the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_accel.cli import main
from tests import running

UPSTREAM = "zoo:nlp/masked_language_modeling/obert-base/pytorch/huggingface/wikipedia_bookcorpus/pruned90-none"
TEACHER = "zoo:nlp/question_answering/obert-base/pytorch/huggingface/squad/base-none"
RECIPE = "zoo:nlp/question_answering/obert-base/pytorch/huggingface/squad/pruned90_quant-none?recipe_type=original"


def test_a_command_of_stubs_trains_what_they_stand_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world = running.tiny_world(tmp_path, rows=16)
    catalogue = tmp_path / "zoo.yaml"
    catalogue.write_text(f"{UPSTREAM}:\n  model: student\n{TEACHER}:\n  model: teacher\n")
    stubs = {"model_name_or_path": UPSTREAM, "distill_teacher": TEACHER, "recipe": RECIPE}
    command = running.command(world, tmp_path / "out", **stubs, zoo=str(catalogue), max_steps=1, do_eval=False)
    assert main(command) == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert f"--distill_teacher: {TEACHER} stands for {tmp_path / 'teacher'} ({catalogue}:4)" in printed
    assert f"--recipe: {RECIPE} stands for question_answering/pruned_quant (" in printed
    said = json.loads((tmp_path / "out" / "run.json").read_text())["command"]
    assert said["model_name_or_path"] == UPSTREAM and said["distill_teacher"] == TEACHER
    assert TEACHER in (tmp_path / "out" / "README.md").read_text()

    # The same words mean another teacher now: the folder is not theirs to continue.
    (tmp_path / "teacher").rename(tmp_path / "other")
    catalogue.write_text(catalogue.read_text().replace("model: teacher", "model: other"))
    assert main(command) == 2
    assert "holds a run of another command (zoo stubs stand for" in capfd.readouterr().err
