"""Predictions: the span that the logits say, its characters, its probability; from Python and from the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_accel.cli import main
from sparse_accel.cli.predict_command import sentence_around
from sparse_accel.errors import DataError, ModelError, OptionError
from sparse_accel.serving.deployment import read_deployment
from sparse_accel.serving.predicting import Predictor
from sparse_accel.tasks.features import length_sorted_batches
from sparse_accel.tasks.qa_windows import Question, cut_windows, window_spec
from tests.tiny import tiny_bert, tiny_rows, tiny_squad
from tests.tiny_deployment import exported_deployment, pointing_deployment

CONTEXT = "Ada bought a chair in Oslo. Bruno found the old red lamp in Turin. Clara moved."
AT = CONTEXT.index("red lamp")
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def pointing(tiny_world: Path) -> Path:
    return pointing_deployment(tiny_world / "pointing")


@pytest.fixture(scope="module")
def exported(tiny_world: Path, tiny_student: Path) -> Path:
    return exported_deployment(tiny_world / "deployment", tiny_student)


# --- spans ------------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_span_that_the_logits_point_at(pointing: Path) -> None:
    answer = Predictor(pointing)(question="What did Bruno find?", context=CONTEXT)
    assert (answer.text, answer.start, answer.end) == ("red lamp", AT, AT + 8)
    assert answer.n_best == ()


def test_the_score_is_the_softmax_over_the_kept_candidates(pointing: Path) -> None:
    # Two tokens: the span of both has 20, each token alone 10 (red as start, lamp as end).
    answer = Predictor(pointing)(question="what", context="red lamp", n_best=3)
    powers = np.exp(np.array([20.0, 10.0, 10.0]) - 20.0)
    assert answer.n_best[0].text == "red lamp"
    assert sorted(candidate.text for candidate in answer.n_best) == ["lamp", "red", "red lamp"]
    assert [candidate.score for candidate in answer.n_best] == pytest.approx(list(powers / powers.sum()))
    assert answer.score == answer.n_best[0].score


def test_a_span_is_found_in_whichever_window_holds_it(pointing: Path) -> None:
    context = "the old chair in the market. " * 200 + CONTEXT
    predictor = Predictor(pointing, max_seq_length=32, doc_stride=12)
    answer = predictor(question="What did Bruno find?", context=context, n_best=10)
    assert (answer.text, answer.start) == ("red lamp", len(context) - len(CONTEXT) + AT)
    # Overlapping windows find it twice, and it is one candidate all the same.
    spans = [(candidate.start, candidate.end) for candidate in answer.n_best]
    assert len(set(spans)) == len(spans) == 10
    assert all(candidate.text == context[candidate.start : candidate.end] for candidate in answer.n_best)


def test_an_answer_longer_than_allowed_is_not_given(pointing: Path) -> None:
    context = "red chair and table and boat and lamp"
    assert Predictor(pointing)(question="what", context=context).text == context
    limited = Predictor(pointing, max_answer_length=3)(question="what", context=context)
    assert limited.text != context and len(limited.text.split()) <= 3


def test_offsets_count_characters_as_python_does(pointing: Path) -> None:
    context = "é😀 ü — the RED Lamp."
    answer = Predictor(pointing)(question="what", context=context)
    assert answer.text == context[answer.start : answer.end] == "RED Lamp"


def test_no_answer_is_given_where_the_folder_allows_it_and_the_logits_say_so(tmp_path: Path) -> None:
    # Nothing in this context is pointed at, so all spans and "no answer" have the score 0.
    for threshold, text in ((-1.0, ""), (1.0, "Clara")):
        folder = pointing_deployment(
            tmp_path / str(threshold), version_2_with_negative=True, null_score_diff_threshold=threshold
        )
        answer = Predictor(folder)(question="who", context="Clara", n_best=5)
        assert answer.text == text
        assert answer.score == pytest.approx(0.5)
        assert {candidate.text for candidate in answer.n_best} == {"", "Clara"}
        assert (answer.start, answer.end) == (0, len(text))


def test_where_the_search_finds_no_span_there_is_no_text(tmp_path: Path) -> None:
    # One start and one end are kept, and they are in the wrong order.
    folder = pointing_deployment(tmp_path / "crossed", first="lamp", last="red", n_best_size=1)
    answer = Predictor(folder)(question="what", context="the red lamp", n_best=1)
    assert (answer.text, answer.score, answer.start, answer.end, answer.n_best) == ("", 0.0, 0, 0, ())


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra", "albert"])
def test_torch_answers_are_the_best_spans_over_all_windows(tmp_path: Path, kind: str) -> None:
    """Reference: every span of every window that transformers' tokenizer and model give, without any search."""
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    folder = tiny_bert(tmp_path / kind, seed=4, kind=kind)
    row = tiny_rows(4, seed=9)[3]
    settings: dict[str, Any] = {"max_length": 48, "stride": 16, "truncation": "only_second", "padding": True}
    encoded = AutoTokenizer.from_pretrained(folder)(
        row["question"],
        row["context"],
        **settings,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    offsets = encoded.pop("offset_mapping").tolist()
    encoded.pop("overflow_to_sample_mapping")
    assert len(offsets) >= 2
    with torch.no_grad():
        outputs = AutoModelForQuestionAnswering.from_pretrained(folder).eval()(**encoded)
    found = []
    for window, spans in enumerate(offsets):
        tokens = [token for token, owner in enumerate(encoded.sequence_ids(window)) if owner == 1]
        for first in tokens:
            for last in (token for token in tokens if first <= token < first + 30):
                score = float(outputs.start_logits[window, first] + outputs.end_logits[window, last])
                found.append((score, spans[first][0], spans[last][1]))
    _, start, end = max(found)

    (folder / "deployment.json").write_text('{"n_best_size": 48, "max_seq_length": 48, "doc_stride": 16}')
    answer = Predictor(folder)(question=row["question"], context=row["context"])
    assert (answer.start, answer.end) == (start, end)
    assert answer.text == row["context"][start:end]


def test_every_engine_gives_torchs_answers(exported: Path, tiny_student: Path) -> None:
    rows = tiny_rows(6, seed=3)
    questions, contexts = [row["question"] for row in rows], [row["context"] for row in rows]
    limits = {"max_seq_length": 64, "doc_stride": 16}
    expected = Predictor(tiny_student, **limits)(questions, contexts, n_best=3)
    for engine in ("onnxruntime", "openvino"):
        pytest.importorskip(engine)
        answers = Predictor(exported, engine, threads=1, **limits)(questions, contexts, n_best=3)
        assert [(one.text, one.start, one.end) for one in answers] == [
            (one.text, one.start, one.end) for one in expected
        ]
        tolerance = 1e-4 if engine == "onnxruntime" else 2e-2  # OpenVINO computes in bfloat16 where it can
        assert [one.score for one in answers] == pytest.approx([one.score for one in expected], abs=tolerance)


def test_answers_do_not_depend_on_what_shares_their_batch(exported: Path) -> None:
    rows = tiny_rows(8, seed=6)
    questions = [row["question"] for row in rows]
    contexts = [row["context"] * (1 + number % 3) for number, row in enumerate(rows)]
    together = Predictor(exported, threads=1, batch_size=5, max_seq_length=64, doc_stride=16)(questions, contexts)
    alone = Predictor(exported, threads=1, batch_size=1, max_seq_length=64, doc_stride=16)
    for question, context, answer in zip(questions, contexts, together, strict=True):
        one = alone(question, context)
        assert (one.text, one.start, one.end) == (answer.text, answer.start, answer.end)
        assert one.score == pytest.approx(answer.score, abs=1e-5)


def test_padding_may_be_on_the_left(tmp_path: Path) -> None:
    folder = _edited(pointing_deployment(tmp_path / "left"), "tokenizer_config.json", padding_side="left")
    contexts = ["the red lamp", CONTEXT, "an old red lamp in the market"]
    answers = Predictor(folder, batch_size=3)("what", contexts)
    assert [(one.text, one.start) for one in answers] == [("red lamp", text.index("red lamp")) for text in contexts]


def test_lists_are_paired_and_single_texts_are_shared(pointing: Path) -> None:
    predictor = Predictor(pointing)
    assert [one.text for one in predictor(["what", "who"], context="the red lamp")] == ["red lamp"] * 2
    assert [one.start for one in predictor("what", context=["red lamp", "the red lamp"])] == [0, 4]
    assert predictor([], context="the red lamp") == []
    with pytest.raises(DataError, match="2 questions and 3 contexts"):
        predictor(["a", "b"], context=["c", "d", "e"])


@pytest.mark.parametrize(
    ("question", "context", "message"),
    [
        (" ", "a red lamp", "the question is empty"),
        ("what", "\n", "the context is empty"),
        (["what", "what"], ["a red lamp", ""], "question 2: the context is empty"),
        ("what", "half \ud800", "surrogate pair at character 5"),
    ],
)
def test_text_that_cannot_be_answered_is_an_error(pointing: Path, question: Any, context: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Predictor(pointing)(question, context)


def test_batches_are_sorted_by_length_and_hold_every_feature_once() -> None:
    lengths = np.array([3, 9, 4, 9, 1])
    batches = [batch.tolist() for batch in length_sorted_batches(lengths, 2)]
    assert batches == [[1, 3], [2, 0], [4]]


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra", "albert"])
def test_a_tokenizer_read_from_its_files_cuts_the_windows_of_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    folder = tiny_bert(tmp_path / kind, kind=kind)
    questions = [Question(row["question"], row["context"], None, None) for row in tiny_rows(8)]
    served, original = read_deployment(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    assert (served.pad_token_id, served.model_max_length) == (original.pad_token_id, original.model_max_length)
    ours, theirs = (
        cut_windows(questions, window_spec(tokenizer, max_length=48, stride=16, labels=False), None).features
        for tokenizer in (served, original)
    )
    assert ours.tokens.keys() == theirs.tokens.keys()
    for name in ours.tokens:
        np.testing.assert_array_equal(ours.tokens[name], theirs.tokens[name])
    np.testing.assert_array_equal(ours.extra["offsets"], theirs.extra["offsets"])


def test_facts_come_from_the_deployment_then_from_training_then_from_the_model(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "model", kind="roberta")
    facts = read_deployment(folder).facts
    assert (facts.max_seq_length, facts.doc_stride, facts.n_best_size, facts.max_answer_length) == (384, 128, 20, 30)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 62}))
    facts = read_deployment(folder).facts  # RoBERTa counts positions from behind the padding index
    assert (facts.max_seq_length, facts.doc_stride) == (60, 20) if config["pad_token_id"] == 1 else (61, 20)
    (folder / "run.json").write_text(json.dumps({"command": {"max_seq_length": 40, "doc_stride": 8, "seed": 1}}))
    assert read_deployment(folder).facts.max_seq_length == 40
    (folder / "deployment.json").write_text(json.dumps({"max_seq_length": 50}))
    facts = read_deployment(folder).facts
    assert (facts.max_seq_length, facts.doc_stride) == (50, 8)


def test_a_graph_of_fixed_length_is_given_that_length(tmp_path: Path) -> None:
    import onnx

    folder = pointing_deployment(tmp_path / "fixed", sequence_length=24, doc_stride=8)
    model = onnx.load(folder / "model.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = 24
    onnx.save(model, folder / "model.onnx")
    assert Predictor(folder)(question="what", context=CONTEXT).start == AT
    with pytest.raises(OptionError, match="reads at most 24 tokens"):
        Predictor(folder, max_seq_length=25)


def test_a_deployment_answers_without_torch_and_transformers(pointing: Path) -> None:
    code = (
        "import sys; from sparse_accel.serving.predicting import Predictor; "
        f"print(Predictor({str(pointing)!r})('what', {CONTEXT!r}).text, *({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "red lamp\n"


def _edited(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_folders_that_cannot_answer_are_told_apart(tmp_path: Path, tiny_student: Path) -> None:
    def made(name: str) -> Path:
        return pointing_deployment(tmp_path / name)

    empty = tmp_path / "empty"
    empty.mkdir()
    bare = made("bare")
    (bare / "model.onnx").unlink()
    damaged = made("damaged")
    (damaged / "model.onnx").write_bytes(b"nothing of the kind")
    cases = {
        tmp_path / "absent": "no such folder",
        empty: "has no config.json",
        bare: "neither model.onnx nor onnx/model.onnx",
        damaged: "cannot open it",
        _edited(made("newer"), "deployment.json", sparse_accel_deployment=2): "format 2",
        _edited(made("facts"), "deployment.json", n_best_size="many"): "n_best_size should be a whole number",
        _edited(made("task"), "deployment.json", task="translation"): "no task 'translation'",
        _edited(made("head"), "deployment.json", task=None): "",
    }
    _edited(tmp_path / "head", "config.json", architectures=["BertForMultipleChoice"])
    cases[tmp_path / "head"] = "BertForMultipleChoice"
    for folder, message in cases.items():
        with pytest.raises(ModelError, match=message):
            Predictor(folder)
    with pytest.raises(ModelError, match="leave --engine torch out"):
        Predictor(made("graph"), "torch")
    with pytest.raises(ModelError, match=r"no model\.onnx"):
        Predictor(tiny_student, "onnxruntime")
    with pytest.raises(OptionError, match="did you mean 'onnxruntime'"):
        Predictor(made("engine"), "onnxruntim")
    with pytest.raises(DataError, match="doc_stride 128 is too large"):
        Predictor(made("stride"), max_seq_length=64)


# --- the command ------------------------------------------------------------------------------------------------------


def _stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_the_command_answers_several_questions_about_a_file(
    pointing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CONTEXT)
    words = ["predict", str(pointing), "--question", "What?", "--question", "Which one?", "--context_file", str(text)]
    assert main([*words, "--n_best", "2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == ["What?", "Which one?"]
    for row in rows:
        assert list(row) == ["id", "question", "answer", "score", "start", "end", "n_best"]
        assert (row["answer"], row["start"], row["end"]) == ("red lamp", AT, AT + 8)
        assert len(row["n_best"]) == 2
        assert row["n_best"][0] == {name: row[name] for name in ("score", "start", "end")} | {"text": "red lamp"}


def test_readable_answers_stand_in_their_sentence(pointing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(pointing), "--question", "What [b]did[/b] he find?", "--context", CONTEXT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "What [b]did[/b] he find?"
    assert lines[1].startswith("  red lamp  (score 0.") and lines[1].endswith(f"characters {AT} to {AT + 8})")
    assert lines[2] == "  Bruno found the old red lamp in Turin."


def test_a_sentence_is_cut_around_its_answer() -> None:
    assert sentence_around("One. Two three\nfour! Five", 9, 14) == ("Two ", "three", "")
    assert sentence_around("It is 3.5 m. So?", 6, 9) == ("It is ", "3.5", " m.")
    before, answer, after = sentence_around("x " * 200 + "here" + " y" * 200, 400, 404)
    assert answer == "here" and before.startswith("...") and after.endswith("...") and len(before) < 130


@pytest.mark.parametrize("layout", ["flat", "nested", "lines", "csv"])
def test_the_command_reads_the_files_that_training_reads(
    pointing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    file, output = tmp_path / f"rows.{'csv' if layout == 'csv' else 'json'}", tmp_path / "out.jsonl"
    if layout in ("flat", "nested"):
        tiny_squad(file, rows=9, nested_layout=layout == "nested")
        ids = [row["id"] for row in tiny_rows(9)]
    elif layout == "lines":
        file.write_text('{"question": "what", "context": "the red lamp"}\n{"id": 7, "question": "q", "context": "c"}\n')
        ids = ["row-1", "7"]
    else:
        file.write_text("id,question,context\na,what,the red lamp\nb,who,Clara\n")
        ids = ["a", "b"]
    assert main(["predict", str(pointing), "--file", str(file), "--json", "--output", str(output)]) == 0
    assert capsys.readouterr().out == ""
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ids


def test_lines_of_standard_input_are_answered_as_they_come(pointing: Path) -> None:
    command = [sys.executable, "-m", "sparse_accel", "predict", str(pointing), "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for number, context in enumerate(("the red lamp", "an old red lamp"), start=1):
            process.stdin.write(json.dumps({"question": "what", "context": context}) + "\n")
            process.stdin.flush()
            row = json.loads(process.stdout.readline())  # the pipe is still open
            assert (row["id"], row["answer"]) == (f"row-{number}", "red lamp")
        process.stdin.close()
        assert process.wait(60) == 0


def test_a_bad_line_ends_the_command_or_is_left_out(
    pointing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = b'{"question": "what", "context": "the red lamp"}\n'
    for bad, message in (
        (b'{"question": "what", "contxt": "x"}\n', "standard input:2: has no 'context'; did you mean 'contxt'?"),
        (b"[1]\n", "standard input:2: should be an object"),
        (b"{oops\n", "standard input:2: is not JSON"),
        (b'{"question": "", "context": "x"}\n', "standard input:2: the question is empty"),
        (b'{"question": "\xff", "context": "x"}\n', "standard input:2: is not UTF-8"),
        (b'{"question": "' + b"old " * 600 + b'", "context": "x"}\n', "standard input:2: the question has 600 tokens"),
    ):
        _stdin(monkeypatch, good + bad + b"\n" + good)
        assert main(["predict", str(pointing), "--json"]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and len(captured.out.splitlines()) == 1
        _stdin(monkeypatch, good + bad + b"\n" + good)
        assert main(["predict", str(pointing), "--json", "--on_bad_rows", "skip"]) == 0
        captured = capsys.readouterr()
        assert message in captured.err and len(captured.out.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--question", "q"], "--question needs --context"),
        (["--context", "c"], "a context without --question"),
        (["--question", " ", "--context", "c"], "--question: the question is empty"),
        (["--question", "q", "--context", " "], "--context: is empty"),
        (["--question", "q", "--context", "c", "--context_file", "f"], "contradict each other"),
        (["--question", "q", "--context_file", "absent.txt"], "absent.txt: cannot be read"),
        (["--file", "absent.json"], "there is no such file"),
        (["--file", "absent.json", "--question", "q"], "do not go with it"),
        (["--question", "q", "--context", "c", "--n_best", "21"], "--n_best should be 1 to 20"),
        (["--question", "q", "--context", "c", "--batch_size", "0"], "--batch_size should be 1 or more"),
        (["--question", "q", "--context", "c", "--threads", "0"], "--threads should be 1 or more"),
        (["--question", "q", "--context", "c", "--output", "absent/out"], "there is no folder absent"),
        ([], "standard input holds no line"),
    ],
)
def test_input_that_cannot_be_is_one_message(
    pointing: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    _stdin(monkeypatch, b"")
    assert main(["predict", str(pointing), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""


def test_a_terminal_is_not_waited_for(
    pointing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    leader, follower = os.openpty()
    with open(follower, encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert main(["predict", str(pointing)]) == 2
    os.close(leader)
    assert "pass --question TEXT and --context TEXT, or --file FILE, or pipe JSON lines" in capsys.readouterr().err


def test_an_output_file_appears_whole_or_not_at_all(
    pointing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    _stdin(monkeypatch, b'{"question": "what", "context": "the red lamp"}\n{}\n')
    assert main(["predict", str(pointing), "--json", "--output", str(output)]) == 2
    assert list(tmp_path.iterdir()) == []
