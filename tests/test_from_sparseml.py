"""docs/from-sparseml.md is true: each of its commands runs, in its order, on small data under the names that it uses."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from sparse_accel.cli import main
from sparse_accel.recipe import shipped
from sparse_accel.recipe.schema import Recipe
from tests import tiny
from tests.small_sets import write_small_sets

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "from-sparseml.md").read_text("utf-8")
_STEM = "nlp/{}/obert-base/pytorch/huggingface/{}"
UPSTREAM = "zoo:" + _STEM.format("masked_language_modeling", "wikipedia_bookcorpus/pruned90-none")
TEACHER = "zoo:" + _STEM.format("question_answering", "squad/base-none")
RECIPE = "zoo:" + _STEM.format("question_answering", "squad/pruned90_quant-none")


def commands() -> list[str]:
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A reader's folder, with what the page's commands name."""
    import datasets

    folder = tmp_path_factory.mktemp("desk")
    tiny.tiny_bert(folder / "TEACHER_DIR", seed=1)
    tiny.tiny_bert(folder / "MODEL_DIR", seed=3)
    assert (
        main(["prune", str(folder / "TEACHER_DIR"), "--sparsity", "0.5", "--output_dir", str(folder / "PRUNED_DIR")])
        == 0
    )
    tiny.tiny_squad(folder / "squadshifts-train.json", rows=32, seed=1)
    tiny.tiny_squad(folder / "squadshifts-val.json", rows=12, seed=2)
    rows = tiny.tiny_rows(32, seed=4)
    splits = {name: datasets.Dataset.from_list(rows) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "squad"))
    write_small_sets(folder)
    short = Recipe.load("question_answering/pruned_quant", "num_epochs=2,qat_start_epoch=1.0,observer_epoch=1.5")
    (folder / "recipe.yaml").write_text(short.to_yaml())
    (folder / "short.yaml").write_text(short.to_yaml())
    # The published models' places, taken by small ones. The page's own `zoo add` writes zoo.yaml.
    (folder / "catalogue.yaml").write_text(
        f"{UPSTREAM}:\n  model: PRUNED_DIR\n{TEACHER}:\n  model: TEACHER_DIR\n{RECIPE}:\n  recipe: short.yaml\n"
    )
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("SPARSE_ACCEL_ZOO", "catalogue.yaml")
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    yield folder
    patch.undo()


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command.split()[1:4]))
def test_the_command_runs_as_it_stands(command: str, desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program, *words = shlex.split(command)
    assert program == "sparse_accel"
    if "recipe_type" in command or words[:2] == ["zoo", "add"]:
        # A second catalogue of the reader's, or none, is what these two are about.
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("SPARSE_ACCEL_ZOO")
            assert main(words) == 0, capfd.readouterr().err
        return
    try:
        code = main(words)
    finally:
        AcceleratorState._reset_state(True)
    shown = capfd.readouterr()
    assert code == 0, shown.err + shown.out
    output = re.search(r"--output_dir (\S+)", command)
    if output is not None:
        results = json.loads((desk / output[1] / "all_results.json").read_text("utf-8"))
        assert any(name.startswith("eval_") for name in results)
        assert (desk / output[1] / "model.safetensors").is_file()
    if words[0] == "export_onnx":
        assert json.loads((desk / "my_student/deployment/export_report.json").read_text("utf-8"))["passed"]
    if words[0] == "predict":
        assert "score" in shown.out


def test_every_task_and_every_way_in_is_on_the_page() -> None:
    from sparse_accel.tasks import ALIASES, TASKS

    for name in (*TASKS, "export_onnx", "predict", "zoo list", "--recipe_args", "--distill_teacher my_teacher"):
        assert any(name in command for command in commands()), name
    assert all(f"`{alias}`" in PAGE or alias not in ("qa", "glue", "ner", "mlm") for alias in ALIASES)
    named = set(re.findall(r"--recipe (\w+/\w+)", PAGE))
    assert named <= set(shipped.names())
