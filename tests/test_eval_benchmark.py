"""The comparison with Hugging Face's example refuses to time different answers, and gives what a report needs."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparse_accel.benchmarking import eval_qa
from sparse_accel.benchmarking.eval_data import make_world
from sparse_accel.benchmarking.eval_report import arms_table
from sparse_accel.benchmarking.workloads import listed
from sparse_accel.cli.program import run_command
from sparse_accel.demo_corpus import make_corpus
from sparse_accel.errors import DataError, InvariantError, OptionError, OutputError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
COMMAND = ["benchmark", "train", "eval-qa"]


def test_both_ways_give_the_same_and_a_difference_is_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path, 40, None)
    assert eval_qa.check_same(world)["different"] == 0
    with pytest.raises(InvariantError, match="nothing was measured: version 1: answers differ"):
        eval_qa.check_same(replace(world, starts=[-row for row in world.starts]))
    shifted = replace(world.features, extra={"offsets": world.features.extra["offsets"] + 1})
    with pytest.raises(InvariantError, match="window 0 differs"):
        eval_qa.check_same(replace(world, features=shifted))


def squad_folder(folder: Path, questions: int) -> Path:
    """A folder of data with so many questions in SQuAD's form."""
    paragraphs = [
        {"context": row["context"], "qas": [{**row, "answers": as_objects(row["answers"])}]}
        for row in make_corpus(1, questions)[1]
    ]
    (folder / "squad").mkdir(parents=True)
    path = folder / "squad" / "dev-v1.1.json"
    path.write_text(json.dumps({"data": [{"title": "made", "paragraphs": paragraphs}]}), "utf-8")
    return folder


def as_objects(answers: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers as SQuAD's files hold them."""
    pairs = zip(answers["text"], answers["answer_start"], strict=True)
    return [{"text": text, "answer_start": start} for text, start in pairs]


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = eval_qa.make_arms
    # Without those that start processes: the exhaustive tests run them.
    monkeypatch.setattr(
        eval_qa, "make_arms", lambda world: {arm: work for arm, work in every(world).items() if "by 2" not in arm}
    )
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    data, output = squad_folder(tmp_path / "data", 12), tmp_path / "out"
    words = ["--rounds", "2", "--questions", "8", "--data", str(data), "--output-dir", str(output)]
    assert run_command([*COMMAND, *words], speaks=True) == 0
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    text = (output / "results.json").read_text("utf-8")
    found = json.loads(text)
    assert (found["data"], found["questions"], found["rounds"]) == ("SQuAD dev-v1.1", 8, 2)
    assert found["command"] == "sparse_accel benchmark train eval-qa --rounds 2 --questions 8 --data FOLDER"
    assert str(tmp_path) not in text
    assert list(found["arms"]) == [arm for arm in eval_qa.WHAT if "by 2" not in arm]
    page = (output / "results.md").read_text("utf-8")
    shown = capsys.readouterr().out
    for row in arms_table(found).rows:
        assert f"| {' | '.join(row)} |" in page
        assert row[0] in shown
    assert "answers from logits against Hugging Face's post-processing | eval-qa, CPU" in page
    assert sorted(path.name for path in output.iterdir()) == ["results.json", "results.md"]
    with pytest.raises(OutputError, match=r"holds results\.json already"):
        run_command([*COMMAND, "--output-dir", str(output)], speaks=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [
                *("eval-qa", "--arms", "answers", "--precision", "bf16", "--features", "8", "--micro_batch_size", "8"),
                *("--micro_batches", "1", "--batching", "packed", "--threads", "1"),
            ],
            "--arms, --precision, --features, --micro_batch_size, --micro_batches, --batching, --threads mean "
            "nothing to workload eval-qa, which trains no model",
        ),
        (["eval-qa", "--rounds", "0"], "--rounds: 1 or more, got 0"),
        (["eval-qa", "--questions", "0"], "--questions: 1 or more, got 0"),
        (["tiny-ci", "--data", "."], "--data means nothing to workload tiny-ci"),
        (["eval_qa"], "no such workload; did you mean 'eval-qa'"),
        (
            ["tiny-ci", "--questions", "8", "--data", "."],
            "--questions, --data mean nothing to workload tiny-ci, only to eval-qa",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run_command(["benchmark", "train", *words], speaks=True)


def test_data_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither dev-v1\.1\.json nor squad/dev-v1\.1\.json"):
        run_command([*COMMAND, "--data", str(tmp_path)], speaks=True)
    (tmp_path / "dev-v1.1.json").write_text('{"data": [{"paragraphs": [{"qas": []}]}]}', "utf-8")
    with pytest.raises(DataError, match="has no 'context'"):
        run_command([*COMMAND, "--data", str(tmp_path)], speaks=True)


def test_the_list_names_it_among_those_that_run() -> None:
    assert "windows and answers" in listed()["eval-qa"]


@pytest.mark.exhaustive
def test_a_measurement_is_plain_data_with_every_sample() -> None:
    found = json.loads(json.dumps(eval_qa.measure(2, 20)))
    assert (found["workload"], found["questions"], found["rounds"]) == ("eval-qa", 20, 2)
    assert list(found["arms"]) == list(eval_qa.WHAT)
    for arm in found["arms"].values():
        for clock in ("cpu", "wall"):
            assert len(arm[clock]["samples"]) == 2
            assert arm[clock]["min"] <= arm[clock]["median"] <= arm[clock]["max"]
            assert arm["times_as_fast"][clock]["median"] > 0
    assert found["arms"]["windows, HF"]["times_as_fast"]["cpu"]["median"] == 1.0


@pytest.mark.exhaustive
def test_the_script_writes_what_the_tables_of_training_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script, training = importlib.import_module("eval_qa"), importlib.import_module("training")
    results = tmp_path / "eval_qa.json"
    words = ["eval_qa.py", "--rounds", "1", "--questions", "8", "--data", str(squad_folder(tmp_path, 8))]
    monkeypatch.setattr("sys.argv", [*words, "--results", "eval_qa.json"])
    monkeypatch.chdir(tmp_path)
    script.main()
    assert str(tmp_path) not in results.read_text("utf-8")
    monkeypatch.setattr(training, "EVALUATION", results)
    (row,) = [line for line in training.table("bars", {}).splitlines() if "| eval-qa, CPU |" in line]
    assert "not measured yet" not in row
