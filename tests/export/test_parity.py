"""The proof of an export: what is compared, what passes, what fails, and the text that it is done with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from transformers import AutoTokenizer

from sparse_accel.errors import DataError, OutputError
from sparse_accel.folders.trained import TrainedModel, open_trained
from sparse_accel.onnx_export.exporting import export_graph
from sparse_accel.onnx_export.graph_census import (
    census_of,
    check_census,
    check_kernels,
    expected_matmuls,
    integer_kernels,
)
from sparse_accel.onnx_export.parity import (
    FLOAT_TOLERANCES,
    INT8_TOLERANCES,
    Parity,
    compare,
    rounding_noise,
    span_scores,
)
from sparse_accel.onnx_export.report import Check, ExportReport, Sizes, print_report
from sparse_accel.onnx_export.sample_inputs import Samples, check_batches, write_samples
from sparse_accel.serving.engines import TorchEngine, open_engine
from sparse_accel.tasks import resolve_task
from tests.export.trained import trained_folder
from tests.tiny import tiny_squad, tiny_tokenizer

QA = resolve_task("question_answering")
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Recorded:
    """An engine that gives what is written down, found by the first token of a batch."""

    outputs: Mapping[int, dict[str, np.ndarray]]
    name: str = "recorded"
    device: str = "cpu"
    input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    output_names: tuple[str, ...] = ("start_logits", "end_logits")

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.outputs[int(inputs["input_ids"][0, 0])]


def batch_of(number: int, lengths: Sequence[int], width: int) -> dict[str, np.ndarray]:
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": np.full(mask.shape, number, np.int64), "attention_mask": mask}


def spans(shape: tuple[int, int], scale: float = 3.0) -> dict[str, np.ndarray]:
    return {key: (scale * RNG.standard_normal(shape)).astype(np.float32) for key in ("start_logits", "end_logits")}


def compared(before: dict[str, np.ndarray], after: dict[str, np.ndarray], lengths: Sequence[int]) -> Parity:
    width = next(iter(before.values())).shape[1]
    batches = [batch_of(1, lengths, width)]
    return compare(Recorded({1: before}), Recorded({1: after}), batches, tuple(before))


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_the_best_span_is_that_of_trying_them_all(length: int) -> None:
    start, end = RNG.standard_normal(length), RNG.standard_normal(length)
    tried = {(i, j): start[i] + end[j] for i in range(length) for j in range(i, min(i + 30, length))}
    scores = span_scores(start, end)
    first, more = np.unravel_index(scores.argmax(), scores.shape)
    assert (first, first + more) == max(tried, key=lambda span: tried[span])
    assert np.isfinite(scores).sum() == len(tried)


def test_the_numbers_are_those_of_numpy_over_real_tokens() -> None:
    before, after = spans((3, 20)), spans((3, 20))
    found = compared(before, after, lengths=(20, 11, 4)).total
    real = np.arange(20) < np.array([20, 11, 4])[:, None]
    differences = np.concatenate([np.abs(before[key] - after[key])[real] for key in before]).astype(np.float64)
    spread = np.sqrt(np.mean([before[key][real].astype(np.float64).var() for key in before]))
    assert found.num_values == 70 and found.num_features == 3 and found.num_broken == 0
    assert found.max_abs == pytest.approx(differences.max())
    assert found.mean_abs == pytest.approx(differences.mean())
    assert found.p99_abs == pytest.approx(np.quantile(differences, 0.99))
    assert found.spread == pytest.approx(spread)
    assert found.p99 == pytest.approx(found.p99_abs / spread)


def test_padding_takes_no_part() -> None:
    before = spans((2, 12))
    after = {key: values.copy() for key, values in before.items()}
    for values in after.values():
        values[1, 5:] = np.nan
    parity = compared(before, after, lengths=(12, 5))
    assert parity.total.max_abs == 0.0 and parity.total.num_same == 2
    assert parity.failures(FLOAT_TOLERANCES) == []


def test_a_single_far_logit_does_not_decide() -> None:
    before = spans((16, 50))
    after = {key: values.copy() for key, values in before.items()}
    after["start_logits"][3, before["start_logits"][3].argmin()] -= 2.0
    parity = compared(before, after, lengths=[50] * 16)
    assert parity.total.max_abs == pytest.approx(2.0, abs=1e-5)
    assert parity.failures(INT8_TOLERANCES) == []


def test_a_constant_shift_of_all_logits_fails() -> None:
    before = spans((16, 50))
    after = {key: values + np.float32(0.7) for key, values in before.items()}
    mean, p99 = compared(before, after, lengths=[50] * 16).failures(INT8_TOLERANCES)
    assert "mean difference" in mean and "1 in 100" in p99


def test_other_answers_fail_though_the_differences_are_small() -> None:
    before = spans((20, 30))
    after = {key: values.copy() for key, values in before.items()}
    before["start_logits"][:, 4] = before["end_logits"][:, 4] = 20.0
    after["start_logits"][:, 4] = after["end_logits"][:, 4] = 20.0
    # Two of 600 starts and two of 600 ends in two rows: below what a 99th percentile sees.
    for row in (3, 8):
        for key in after:
            after[key][row, 4], after[key][row, 9] = before[key][row, 9], before[key][row, 4]
    parity = compared(before, after, lengths=[30] * 20)
    assert parity.total.p99_abs == 0.0 and parity.total.agreement == 0.9
    assert any("18 of 20 features" in sentence for sentence in parity.failures(INT8_TOLERANCES))


def test_an_answer_that_is_as_good_to_the_reference_is_a_tie() -> None:
    # Starts 3 and 7 differ by 0.01, and every logit is off by 0.02.
    before = {"start_logits": np.zeros((1, 10), np.float32), "end_logits": np.zeros((1, 10), np.float32)}
    before["start_logits"][0, [3, 7]] = 5.0, 4.99
    before["end_logits"][0, 9] = 5.0
    after = {key: values - np.float32(0.02) for key, values in before.items()}
    after["start_logits"][0, 7] += 0.04
    total = compared(before, after, lengths=[10]).total
    assert (total.num_same, total.num_ties, total.agreement) == (0, 1, 1.0)


def test_logits_that_are_not_finite_fail() -> None:
    before, after = spans((2, 12)), spans((2, 12))
    after = {key: np.full_like(values, np.nan) for key, values in after.items()}
    parity = compared(before, after, lengths=(12, 12))
    json.dumps(parity.to_json(), allow_nan=False)
    sentences = parity.failures(INT8_TOLERANCES)
    assert sentences[0].startswith("48 of 48 logits are infinite or not a number")
    assert len(sentences) == 4


def test_nearly_constant_logits_may_differ_by_rounding() -> None:
    # A model that was not trained, with a large bias: float32 has steps of 5e-7 there.
    before = {key: values + np.float32(5) for key, values in spans((4, 30), scale=1e-6).items()}
    after = {key: np.nextafter(values, np.float32(9)) for key, values in before.items()}
    parity = compared(before, after, lengths=[30] * 4)
    assert parity.total.max_abs > 0 and parity.failures(replace(FLOAT_TOLERANCES, agreement=0.0)) == []


@pytest.mark.parametrize("shape", [(6, 3), (6, 8, 3)], ids=["of a feature", "of each token"])
def test_classes_agree_by_the_highest_logit(shape: tuple[int, ...]) -> None:
    before = {"logits": RNG.standard_normal(shape).astype(np.float32)}
    after = {"logits": before["logits"].copy()}
    after["logits"][2] = -after["logits"][2]
    batches = [batch_of(1, [8] * 6, 8)]
    total = compare(Recorded({1: before}), Recorded({1: after}), batches, ("logits",)).total
    assert total.num_values == before["logits"].size
    # Of six features, or of the 48 tokens that they have, those of one changed their mind.
    assert (total.num_predictions, total.num_same) == ((6, 5) if len(shape) == 2 else (48, 40))


def test_shapes_are_told_apart() -> None:
    before, after = {1: spans((1, 8)), 2: spans((4, 16))}, {1: spans((1, 8)), 2: spans((4, 16))}
    batches = [batch_of(1, [8], 8), batch_of(2, [16, 9, 3, 2], 16), batch_of(1, [8], 8)]
    parity = compare(Recorded(before), Recorded(after), batches, QA.output_keys)
    assert [(s.batch, s.length, s.difference.num_features) for s in parity.shapes] == [(1, 8, 2), (4, 16, 4)]
    assert parity.total.num_features == 6
    assert sum(s.difference.num_same + s.difference.num_ties for s in parity.shapes) == (
        parity.total.num_same + parity.total.num_ties
    )


def test_comparing_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no batches"):
        compare(Recorded({}), Recorded({}), [], QA.output_keys)


# --- a real export ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    trained: TrainedModel
    graph: Path
    samples: Samples

    def parity(self, graph: Path | None = None) -> Parity:
        reference = TorchEngine(self.trained.model, QA.output_keys)
        engine = open_engine(graph or self.graph, threads=1)
        return compare(reference, engine, self.samples.batches, QA.output_keys)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A masked and quantized BERT of one layer, per channel, as a QDQ graph."""
    folder = tmp_path_factory.mktemp("exported")
    trained = open_trained(trained_folder(folder / "model", sparsity=0.6, per_channel=True), QA)
    export_graph(trained, QA, folder / "model.onnx")
    return Exported(trained, folder / "model.onnx", check_batches(QA, trained.tokenizer, max_length=64))


def edited(source: Path, target: Path, name: str, change: Any) -> Path:
    """A copy of a graph with one initializer changed."""
    model = ir.load(source)
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = np.array(value.const_value.numpy())
    value.const_value = ir.tensor(change(array).astype(array.dtype), name=name)
    ir.save(model, target)
    return target


def test_an_export_is_what_was_planned_and_agrees_with_torch(exported: Exported) -> None:
    assert check_census(census_of(exported.graph), exported.trained) == []
    assert check_kernels(integer_kernels(exported.graph), exported.trained) == []
    parity = exported.parity()
    assert parity.failures(INT8_TOLERANCES) == []
    assert parity.total.num_features >= 64 and len(parity.shapes) >= 5
    assert (parity.reference, parity.exported) == ("torch", "onnxruntime")


def test_comparing_leaves_the_model_as_it_was(exported: Exported) -> None:
    reference = TorchEngine(exported.trained.model, QA.output_keys)
    batch = exported.samples.batches[0]
    alone = reference(batch)
    total = compare(reference, Recorded({int(batch["input_ids"][0, 0]): alone}), [batch], QA.output_keys).total
    # Weights that are rounded once give the same bits, and after it each forward reads the present weight again.
    assert total.max_abs == 0.0
    layer = exported.trained.model.qa_outputs
    scale = layer.weight_quantizer.scale.clone()
    layer.weight_quantizer.scale.mul_(2)
    moved = reference(batch)
    layer.weight_quantizer.scale.copy_(scale)
    assert not np.array_equal(moved["start_logits"], alone["start_logits"])
    np.testing.assert_array_equal(reference(batch)["start_logits"], alone["start_logits"])


def test_one_lost_zero_in_the_file_is_found(exported: Exported, tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.intermediate.dense.weight_quantized_transposed"

    def revive(integers: np.ndarray) -> np.ndarray:
        integers.flat[np.flatnonzero(integers == 0)[0]] = 1
        return integers

    graph = edited(exported.graph, tmp_path / "model.onnx", name, revive)
    (sentence,) = check_census(census_of(graph), exported.trained)
    assert sentence.startswith("bert.encoder.layer.0.intermediate.dense: ")


def test_a_wrong_scale_in_the_file_fails_the_comparison(exported: Exported, tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.output.dense.weight_scale"
    graph = edited(exported.graph, tmp_path / "model.onnx", name, lambda scale: 1.5 * scale)
    assert check_census(census_of(graph), exported.trained) == []
    assert exported.parity(graph).failures(INT8_TOLERANCES) != []


def test_a_model_with_quantizers_differs_from_itself_and_a_float_one_hardly(
    exported: Exported, tiny_student: Path
) -> None:
    batches = exported.samples.batches[:3]
    quantized = rounding_noise(exported.trained.model, batches, QA.output_keys)
    smooth = rounding_noise(open_trained(tiny_student, QA).model, batches, QA.output_keys)
    assert 0 < smooth.max_abs and smooth.p99 < 1e-4
    assert INT8_TOLERANCES.allowing(smooth) == INT8_TOLERANCES
    rough = replace(quantized, mean_abs=0.2 * quantized.spread, p99_abs=0.5 * quantized.spread)
    allowed = INT8_TOLERANCES.allowing(rough)
    assert allowed.mean == pytest.approx(0.5) and allowed.p99 == pytest.approx(1.25)
    # The hook is gone: the model gives what it gave.
    assert exported.parity().failures(INT8_TOLERANCES) == []


def test_the_report_is_json_and_says_what_failed(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    census, kernels, parity = census_of(exported.graph), integer_kernels(exported.graph), exported.parity()
    report = ExportReport(
        folder=exported.graph.parent,
        model="BertForQuestionAnswering",
        task=QA.name,
        graph_format="qdq",
        sizes=Sizes.of(exported.trained.model, census),
        census=census,
        kernels=kernels,
        expected=expected_matmuls(exported.trained),
        check=Check(parity, INT8_TOLERANCES, exported.samples.source, parity.total),
        failures=("a sentence",),
        seconds={"graph": 1.23456},
    )
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    parameters = sum(parameter.numel() for parameter in exported.trained.model.parameters())
    assert document["sizes"]["float_bytes"] == 4 * parameters
    assert document["sizes"]["file_bytes"] == exported.graph.stat().st_size
    assert document["parity"]["total"]["num_features"] == exported.samples.num_features
    assert document["kernels"]["integer"] == document["kernels"]["expected_integer"] == 9
    assert document["passed"] is False and document["seconds"] == {"graph": 1.235}
    print_report(report)
    shown = capsys.readouterr().out
    assert "failed: a sentence" in shown and "the check passed" not in shown
    print_report(replace(report, failures=()))
    assert "the check passed" in capsys.readouterr().out


# --- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("max_length", [16, 128, 384])
def test_batches_have_several_shapes_and_fit_the_model(tmp_path: Path, kind: str, max_length: int) -> None:
    tokenizer = tiny_tokenizer(tmp_path, kind)
    samples = check_batches(QA, tokenizer, max_length=max_length)
    shapes = [batch["input_ids"].shape for batch in samples.batches]
    assert samples.source == "the built-in demo corpus" and samples.num_features >= 64
    assert shapes[0][0] == shapes[1][0] == 1 and shapes[0][1] < shapes[1][1] == max_length
    assert len(set(shapes)) >= 4
    assert samples.batches[1]["attention_mask"].all(), "the row at full length is full of tokens"
    assert not samples.batches[2]["attention_mask"].all(), "there is a batch with padding"
    for batch in samples.batches:
        assert set(batch) == set(tokenizer.model_input_names)
        assert all(column.dtype == np.int64 for column in batch.values())
        assert batch["input_ids"].max() < len(tokenizer)
        assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_a_fixed_length_holds_for_every_batch(tmp_path: Path) -> None:
    samples = check_batches(QA, tiny_tokenizer(tmp_path), max_length=384, sequence_length=48)
    assert {batch["input_ids"].shape[1] for batch in samples.batches} == {48}


def test_the_text_is_that_of_the_named_file(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    file = tiny_squad(tmp_path / "dev.json", rows=20)
    samples = check_batches(QA, tokenizer, file, max_length=128, num=12)
    assert samples.source == str(file)
    assert "bought" in tokenizer.decode(samples.batches[0]["input_ids"][0])
    assert 12 <= samples.num_features <= 16


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        check_batches(QA, tiny_tokenizer(tmp_path), tmp_path / "dev.json", max_length=128)


@pytest.mark.parametrize("form", ["argv", "argv=", "command"])
def test_the_text_is_that_which_the_model_was_trained_with(tmp_path: Path, form: str) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    file = str(tiny_squad(tmp_path / "data.json", rows=80))
    words = {"argv": ["--validation_file", file], "argv=": [f"--validation-file={file}"], "command": []}[form]
    command = {"train_file": file if form == "command" else "elsewhere.json"}
    (tmp_path / "run.json").write_text(json.dumps({"argv": ["sparse_accel", *words], "command": command}))
    samples = check_batches(QA, tokenizer, model_dir=tmp_path, max_length=128)
    assert samples.source == file and samples.notes == ()


@pytest.mark.parametrize("content", ["{}", '{"data": []}'])
def test_data_that_changed_since_training_is_noted_and_left(tmp_path: Path, content: str) -> None:
    file = tmp_path / "data.json"
    file.write_text(content)
    run = {"argv": [], "command": {"train_file": str(file)}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    samples = check_batches(QA, tiny_tokenizer(tmp_path), model_dir=tmp_path, max_length=64)
    assert samples.source == "the built-in demo corpus"
    assert len(samples.notes) == 1 and str(file) in samples.notes[0]


def test_samples_are_one_file_a_row_without_the_batch_dimension(tiny_student: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    engine = TorchEngine(open_trained(tiny_student, QA).model, QA.output_keys)
    batches = check_batches(QA, tokenizer, max_length=64, num=8).batches
    assert write_samples(tmp_path, batches, [engine(batch) for batch in batches], 3) == 3
    names = [
        sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("sample-inputs", "sample-outputs")
    ]
    assert names == [[f"inp-000{n}.npz" for n in range(3)], [f"out-000{n}.npz" for n in range(3)]]
    with (
        np.load(tmp_path / "sample-inputs/inp-0002.npz") as inputs,
        np.load(tmp_path / "sample-outputs/out-0002.npz") as outputs,
    ):
        assert inputs["input_ids"].ndim == outputs["start_logits"].ndim == 1
        again = engine({name: inputs[name][None] for name in inputs.files})
        np.testing.assert_allclose(again["start_logits"][0], outputs["start_logits"], atol=1e-5)


def test_asking_for_more_samples_than_there_are_gives_those_there_are(tmp_path: Path) -> None:
    batches, outputs = [batch_of(1, [4, 4], 4)], [{"start_logits": np.zeros((2, 4), np.float32)}]
    assert write_samples(tmp_path, batches, outputs, 10) == 2


def test_an_unwritable_place_for_samples_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the samples cannot be written"):
        write_samples(tmp_path / "file", [batch_of(1, [4], 4)], [{"start_logits": np.zeros((1, 4))}], 1)
