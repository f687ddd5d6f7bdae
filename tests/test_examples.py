"""The examples run, and docs/python.md shows what they say."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from tests import running, tiny

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names of the demo's, in small."""
    folder = tmp_path_factory.mktemp("demo")
    running.tiny_world(folder, rows=16)
    (folder / "student").rename(folder / "pruned")
    tiny.tiny_squad(folder / "data" / "train.json", rows=16)
    tiny.tiny_squad(folder / "data" / "validation.json", rows=8, seed=5)
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("name", ["ten_lines", "own_loop"])
def test_the_example_runs(
    name: str, demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(demo)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert re.search(r"\d+ steps; ", shown)
    assert {"model.safetensors", "tokenizer.json", "compression_plan.json", "quantization.safetensors"} <= {
        file.name for file in (demo / name).iterdir()
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["ten_lines", "own_loop"])
def test_the_example_can_be_launched_and_its_model_exported(name: str, demo: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    target = tmp_path / "demo"
    target.symlink_to(demo)
    for folder in demo.glob(name):
        folder.rename(tmp_path / "earlier")
    command = [*launch, str(ROOT / "launch_configs/cpu.yaml"), str(EXAMPLES / f"{name}.py"), str(target)]
    subprocess.run(command, cwd=ROOT, check=True)
    subprocess.run(
        [sys.executable, "-m", "sparse_accel", "export", str(demo / name), "--overwrite"], cwd=ROOT, check=True
    )
    assert (demo / name / "deployment" / "model.onnx").is_file()


@pytest.mark.parametrize(
    "shown", re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text("utf-8"), re.M | re.S)
)
def test_the_page_shows_what_the_examples_do(shown: str) -> None:
    assert any(shown in file.read_text("utf-8") for file in EXAMPLES.glob("*.py"))
