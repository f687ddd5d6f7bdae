"""Pruning a model folder: exact counts, what stays as it is, and what is refused with nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_accel.cli import main
from sparse_accel.errors import ModelError, OptionError, OutputError, TargetError
from sparse_accel.runtime.prune import print_report, prune
from tests.tiny import tiny_bert

ENCODER = (
    "attention.self.query.weight",
    "attention.self.key.weight",
    "attention.self.value.weight",
    "attention.output.dense.weight",
    "intermediate.dense.weight",
    "output.dense.weight",
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def zeros(tensor: torch.Tensor) -> int:
    return tensor.numel() - int(torch.count_nonzero(tensor))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_every_encoder_weight_gets_exactly_its_share_of_zeros(
    tiny_student: Path, tmp_path: Path, sparsity: float
) -> None:
    report = prune(str(tiny_student), tmp_path / "out", sparsity)
    before, after = weights(tiny_student), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.endswith(ENCODER):
            assert zeros(tensor) == round(sparsity * tensor.numel())
            kept = tensor != 0
            assert torch.equal(tensor[kept], before[name][kept])
            assert not kept.all() or sparsity == 0.0
            dropped = before[name][~kept].abs().max() if sparsity else 0.0
            assert dropped <= before[name][kept].abs().min()
        else:
            assert torch.equal(tensor, before[name]), name
    assert len(report.pruned.parameters) == 2 * len(ENCODER)
    for counted in report.pruned.parameters:
        assert counted.zeros == zeros(after[counted.name])


def test_a_global_threshold_prunes_all_weights_together(tiny_student: Path, tmp_path: Path) -> None:
    prune(str(tiny_student), tmp_path / "out", 0.7, scope="global")
    before, after = weights(tiny_student), weights(tmp_path / "out")
    names = [name for name in after if name.endswith(ENCODER)]
    total = sum(after[name].numel() for name in names)
    assert sum(zeros(after[name]) for name in names) == round(0.7 * total)
    assert len({round(zeros(after[name]) / after[name].numel(), 4) for name in names}) > 1
    largest_dropped = max(before[name][after[name] == 0].abs().max() for name in names)
    assert largest_dropped <= min(after[name][after[name] != 0].abs().min() for name in names)


def test_targets_name_what_is_pruned(tiny_student: Path, tmp_path: Path) -> None:
    prune(str(tiny_student), tmp_path / "out", 0.5, targets=["re:.*query.weight", "qa_outputs.weight"])
    pruned = {name for name, tensor in weights(tmp_path / "out").items() if zeros(tensor) == tensor.numel() // 2}
    assert pruned == {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)} | {"qa_outputs.weight"}


def test_a_target_that_matches_nothing_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="--targets"):
        prune(str(tiny_student), tmp_path / "out", 0.5, targets=["qa_output.weight"])
    assert not (tmp_path / "out").exists()


def test_class_config_and_tokenizer_stay(tiny_student: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    prune(str(tiny_student), tmp_path / "out", 0.5)
    model, info = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == "BertForQuestionAnswering"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    text = "Who bought the red lamp in Oslo?"
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tiny_student))
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "electra", "albert"])
def test_other_encoders_are_pruned_without_their_heads(tmp_path: Path, kind: str) -> None:
    source = tiny_bert(tmp_path / "model", kind=kind)
    report = prune(str(source), tmp_path / "out", 0.8)
    after = weights(tmp_path / "out")
    assert report.pruned.parameters
    assert report.pruned.sparsity == pytest.approx(0.8, abs=1e-3)
    assert zeros(after["qa_outputs.weight"]) == 0
    embedding = next(name for name in after if name.endswith("word_embeddings.weight"))
    assert zeros(after[embedding]) <= after[embedding].shape[1]  # the padding row may be zero


def test_a_bare_encoder_is_pruned_but_for_its_pooler(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    BertModel(BertConfig(**shape)).save_pretrained(tmp_path / "model")
    report = prune(str(tmp_path / "model"), tmp_path / "out", 0.5)
    after = weights(tmp_path / "out")
    assert report.architecture == "BertModel"
    assert {name for name, tensor in after.items() if tensor.ndim == 2 and zeros(tensor) == tensor.numel() // 2} == {
        f"encoder.layer.0.{name}" for name in ENCODER
    }
    assert any("no tokenizer" in note for note in report.notes)


def test_weights_that_the_folder_lacks_are_not_made_up(tiny_student: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_student, source)
    without_head = {name: tensor for name, tensor in weights(source).items() if not name.startswith("qa_outputs")}
    save_file(without_head, source / "model.safetensors", metadata={"format": "pt"})
    prune(str(source), tmp_path / "out", 0.5)
    assert weights(tmp_path / "out").keys() == without_head.keys()


def test_half_precision_stays_half_precision(tiny_student: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    AutoModelForQuestionAnswering.from_pretrained(tiny_student).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    prune(str(tmp_path / "model"), tmp_path / "out", 0.5)
    after = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert zeros(after[name]) == after[name].numel() // 2


def test_pickled_weights_are_read_and_saved_as_safetensors(tiny_student: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_student, source)
    torch.save(weights(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    prune(str(source), tmp_path / "out", 0.5)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert weights(tmp_path / "out").keys() == weights(tiny_student).keys()


def test_pickled_code_is_not_run(tiny_student: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_student, source)
    (source / "model.safetensors").unlink()
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (trap,)  # type: ignore[return-value]

    torch.save({"weight": Trap()}, source / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        prune(str(source), tmp_path / "out", 0.5)
    assert not trap.exists()


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 80.0, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(tiny_student: Path, tmp_path: Path, sparsity: float) -> None:
    with pytest.raises(OptionError, match="--sparsity: must be at least 0 and less than 1"):
        prune(str(tiny_student), tmp_path / "out", sparsity)


def test_percent_are_understood_as_a_slip(tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"80 percent is 0\.8"):
        prune(str(tiny_student), tmp_path / "out", 80)


def test_broken_folders_are_refused_and_nothing_is_written(tiny_student: Path, tmp_path: Path) -> None:
    cases = {
        "no config": lambda folder: (folder / "config.json").unlink(),
        "no weights": lambda folder: (folder / "model.safetensors").unlink(),
        "torn weights": lambda folder: (folder / "model.safetensors").write_bytes(
            (tiny_student / "model.safetensors").read_bytes()[:5000]
        ),
        "torn config": lambda folder: (folder / "config.json").write_text("{"),
        "unknown class": lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((tiny_student / "config.json").read_text()) | {"architectures": ["BertForNothing"]})
        ),
        "other shape": lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((tiny_student / "config.json").read_text()) | {"intermediate_size": 48})
        ),
        "not finite": lambda folder: save_file(
            {name: tensor / 0 for name, tensor in weights(tiny_student).items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        ),
    }
    for what, breaks in cases.items():
        folder = tmp_path / what
        shutil.copytree(tiny_student, folder)
        breaks(folder)
        with pytest.raises(ModelError):
            prune(str(folder), tmp_path / "out", 0.5)
        assert not (tmp_path / "out").exists(), what
    assert not list(tmp_path.glob(".*"))


def test_an_output_folder_with_something_in_it_is_left_alone_unless_asked(tiny_student: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (output / "pytorch_model.bin").write_text("of an earlier model")
    with pytest.raises(OutputError, match="is not empty"):
        prune(str(tiny_student), output, 0.5)
    assert sorted(file.name for file in output.iterdir()) == ["notes.txt", "pytorch_model.bin"]
    prune(str(tiny_student), output, 0.5, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert (output / "model.safetensors").exists()
    assert not (output / "pytorch_model.bin").exists()


def test_the_model_is_never_pruned_in_place(tiny_student: Path) -> None:
    with pytest.raises(OutputError, match="the model's own folder"):
        prune(str(tiny_student), tiny_student, 0.5, overwrite=True)


def test_an_output_that_cannot_be_written_is_an_error_and_leaves_nothing(tiny_student: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        prune(str(tiny_student), tmp_path / "file" / "out", 0.5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_pruning_twice_gives_the_same_bytes(tiny_student: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prune(str(tiny_student), tmp_path / name, 0.6)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_the_report_is_a_table_of_kinds(tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(prune(str(tiny_student), tmp_path / "out", 0.5))
    printed = capsys.readouterr().out
    for text in ("attention", "feed-forward", "embeddings", "50.00%", "12 pruned"):
        assert text in printed


def test_the_command_prunes_and_its_errors_are_readable(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["prune", str(tiny_student), "--output-dir", str(tmp_path / "out"), "--sparsity", "0.5"]
    assert main([*argv, "--global", "--targets", "re:.*query.weight", "--targets", "re:.*key.weight"]) == 0
    capsys.readouterr()
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("error: --output_dir: ")
    assert main([*argv, "--scope", "layer", "--global"]) == 2
    assert "contradict" in capsys.readouterr().err
