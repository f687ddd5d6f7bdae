"""Evaluation of folders: training's metrics, whatever engine runs the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_accel.cli import main
from sparse_accel.errors import DataError, OptionError
from sparse_accel.serving.deployment import open_deployment
from sparse_accel.serving.predicting import Predictor
from sparse_accel.serving.scoring import FolderScore, ScoreOptions, open_to_score, score
from sparse_accel.tasks.data_settings import DataSettings
from sparse_accel.tasks.question_answering import QuestionAnswering
from tests.tiny import tiny_rows, tiny_squad
from tests.tiny_deployment import exported_deployment, pointing_deployment

LIMITS = {"max_seq_length": 64, "doc_stride": 16}


def score_folder(
    folder: Path, options: ScoreOptions, *, engine: str | None = None, threads: int | None = None, batch_size: int = 8
) -> FolderScore:
    return score(open_to_score(folder, options, engine=engine, threads=threads), options, batch_size=batch_size)


@pytest.fixture(scope="module")
def exported(tiny_world: Path, tiny_student: Path) -> Path:
    return exported_deployment(tiny_world / "deployment", tiny_student)


@pytest.fixture
def pointed(tmp_path: Path) -> Path:
    """Four questions; the graph that points at `red lamp` has one of them right, and half of the words of another."""
    rows = [
        ("what", "the red lamp", "red lamp"),
        ("who", "a red lamp of Clara", "Clara"),
        ("which", "an old red lamp", "old red lamp"),
        ("where", "red lamp in Oslo", "Oslo"),
    ]
    data = [
        {"id": str(n), "question": q, "context": c, "answers": {"text": [a], "answer_start": [c.index(a)]}}
        for n, (q, c, a) in enumerate(rows)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": data}))
    return path


def test_exact_match_and_f1_are_those_of_the_answers(tmp_path: Path, pointed: Path) -> None:
    found = score_folder(pointing_deployment(tmp_path / "pointing"), ScoreOptions(validation_file=str(pointed)))
    # 1 of 4 exactly; "red lamp" for "old red lamp" has precision 1 and recall 2/3.
    assert found.scored.metrics == pytest.approx({"exact_match": 25.0, "f1": 100 * (1 + 0.8) / 4})
    assert found.scored.files["predictions"] == {str(n): "red lamp" for n in range(4)}
    assert (found.engine, found.num_features) == ("onnxruntime", 4)


def test_every_engine_predicts_what_training_would(
    exported: Path, tiny_student: Path, tiny_validation: Path, tmp_path: Path
) -> None:
    """Reference: the evaluation of the training command, on the same folder."""
    from tests.running import run

    options = {"model_name_or_path": str(tiny_student), "validation_file": str(tiny_validation), "do_eval": True}
    trained = run({**options, **LIMITS, "per_device_eval_batch_size": 8}, tmp_path / "trained")
    expected = json.loads((trained / "eval_predictions.json").read_text())
    results = json.loads((trained / "eval_results.json").read_text())
    wanted = ScoreOptions(validation_file=str(tiny_validation), **LIMITS)
    for folder, engine in ((tiny_student, None), (exported, None), (exported, "onnxruntime")):
        found = score_folder(folder, wanted, engine=engine, threads=1, batch_size=5)
        assert found.scored.files["predictions"] == expected
        for name, value in found.scored.metrics.items():
            assert value == pytest.approx(results[f"eval_{name}"])
        assert found.num_features == results["eval_samples"]


def test_what_training_held_out_is_scored_again(tmp_path: Path, pointed: Path) -> None:
    settings = DataSettings(
        train_file=str(pointed), validation_split_percentage=50, do_train=True, do_eval=True, **LIMITS
    )
    folder = pointing_deployment(tmp_path / "pointing")
    held_out = QuestionAnswering().load(settings, open_deployment(folder).deployment.tokenizer).validation
    assert held_out is not None
    options = ScoreOptions(train_file=str(pointed), validation_split_percentage=50, **LIMITS)
    found = score_folder(folder, options)
    assert list(found.scored.files["predictions"]) == [example.id for example in held_out.examples]
    assert len(held_out.examples) == 2


def test_predict_gives_the_answers_that_evaluate_counts(exported: Path, tmp_path: Path) -> None:
    rows = tiny_rows(16, seed=8, unanswerable=0.3)
    file = tiny_squad(tmp_path / "rows.json", rows=16, seed=8, unanswerable=0.3)
    folder = tmp_path / "v2"
    folder.mkdir()
    for source in exported.iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    # A threshold that some answers pass and some do not.
    for threshold in (-1.0, -0.5, 0.0, 0.5):
        facts = {"version_2_with_negative": True, "null_score_diff_threshold": threshold, **LIMITS}
        (folder / "deployment.json").write_text(json.dumps(facts))
        predicted = Predictor(folder, threads=1)([r["question"] for r in rows], [r["context"] for r in rows])
        found = score_folder(folder, ScoreOptions(validation_file=str(file)), threads=1)
        assert [one.text for one in predicted] == list(found.scored.files["predictions"].values())
        assert set(found.scored.files) == {"predictions", "nbest_predictions", "null_odds"}
        best = [entries[0]["probability"] for entries in found.scored.files["nbest_predictions"].values()]
        for answer, probability, row in zip(predicted, best, rows, strict=True):
            assert answer.text == row["context"][answer.start : answer.end]
            assert answer.score <= probability + 1e-9


def test_the_command_shows_folders_side_by_side_and_writes_each(
    tmp_path: Path, pointed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        pointing_deployment(tmp_path / "red"),
        pointing_deployment(tmp_path / "old", first="old"),
    ]
    words = ["evaluate", *map(str, folders), "--validation_file", str(pointed), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--batch_size", "2", "--threads", "1"]) == 0
    lines = capsys.readouterr().out
    assert "Exact match" in lines and "25.00" in lines and "onnxruntime" in lines and "x)" in lines
    for folder in folders:
        results = json.loads((tmp_path / "out" / folder.name / "eval_results.json").read_text())
        found = score_folder(folder, ScoreOptions(validation_file=str(pointed)), batch_size=2)
        assert results["eval_f1"] == pytest.approx(found.scored.metrics["f1"])
        assert (results["engine"], results["eval_samples"]) == ("onnxruntime", 4)
        written = json.loads((tmp_path / "out" / folder.name / "eval_predictions.json").read_text())
        assert written == found.scored.files["predictions"]
        assert (tmp_path / "out" / folder.name / "eval_nbest_predictions.json").is_file()


def test_one_folder_writes_into_the_output_folder_itself_and_nothing_without_it(
    tmp_path: Path, pointed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pointing_deployment(tmp_path / "pointing")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    words = ["evaluate", str(folder), "--validation_file", str(pointed), "--max_eval_samples", "2"]
    assert main(words) == 0
    assert list(here.iterdir()) == []
    assert main([*words, "--output-dir", "out"]) == 0
    assert json.loads((here / "out/eval_results.json").read_text())["eval_samples"] == 2
    assert capsys.readouterr().out.count("50.00") == 4  # exact match and F1, twice


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "on what? pass --validation_file FILE"),
        (["--train_file", "{data}"], "say how much of it training held out, as its command did: --validation_split"),
        (
            ["--validation_split_percentage", "5"],
            "--validation_split_percentage: of what? pass training's --train_file",
        ),
        (["--train_file", "{data}", "--validation_split_percentage", "100"], "must lie between 0 and 100, got 100"),
        (["--train_file", "{data}", "--validation_ratio", "0.5"], "--validation_ratio: belongs to text_classification"),
        (["--train_file", "{data}", "--validation_file", "{data}"], "score the file, or what training held out"),
        (["--validation_file", "absent.json"], "there is no such file"),
        (["--validation_file", "{data}", "--engine", "torch", "--engine", "openvino"], "given 2 times for 1 folder"),
        (["--validation_file", "{data}", "--engine", "tensorrt"], "no engine 'tensorrt'"),
        (["--validation_file", "{data}", "--batch_size", "0"], "--per_device_eval_batch_size should be 1 or more"),
        (["--validation_file", "{data}", "--max_eval_samples", "0"], "--max_eval_samples should be 1 or more"),
        (["--validation_file", "{data}", "--max_seq_length", "1024"], "reads at most 512 tokens"),
        (["--validation_file", "{data}", "--n_best_size", "0"], "--n_best_size should be 1 or more"),
        (["--validation_file", "{data}", "--output_dir", "{data}"], "cannot be made"),
    ],
)
def test_input_that_cannot_be_is_one_message(
    tmp_path: Path, pointed: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    folder = pointing_deployment(tmp_path / "pointing")
    assert main(["evaluate", str(folder), *(word.format(data=pointed) for word in words)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""


def test_a_folder_that_cannot_be_scored_is_found_before_the_first_is(
    tmp_path: Path, pointed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(pointing_deployment(tmp_path / "pointing")), str(tmp_path / "absent")]
    words = ["--validation_file", str(pointed), "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", *folders, *words]) == 2
    assert "absent: there is no such folder" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_rows_without_answers_need_version_2(tmp_path: Path) -> None:
    file = tiny_squad(tmp_path / "rows.json", rows=8, seed=3, unanswerable=0.5)
    folder = pointing_deployment(tmp_path / "pointing")
    options = ScoreOptions(validation_file=str(file))
    with pytest.raises(DataError, match="--version_2_with_negative"):
        score_folder(folder, options)
    assert "NoAns_exact" in score_folder(folder, replace(options, version_2_with_negative=True)).scored.metrics
    with pytest.raises(OptionError, match="--doc_stride should be 0 or more"):
        score_folder(folder, replace(options, doc_stride=-1))
