"""The tables in the documentation are those that the benchmarks make of their results."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize(
    "name", ["distributed_bytes", "fast_paths", "published_script", "step_overhead", "task_tables", "two_nodes"]
)
def test_the_table_is_that_of_the_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module(name)
    found = benchmark.BLOCK.search(benchmark.PAGE.read_text("utf-8"))
    assert found is not None
    assert found[0] == benchmark.table(json.loads(benchmark.RESULTS.read_text("utf-8"))), (
        f"run: python benchmarks/{name}.py --table"
    )


@pytest.mark.parametrize("block", ["bars", "runs"])
def test_the_tables_of_training_are_those_of_the_results(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("training")
    for page in (benchmark.PAGE, benchmark.README) if block == "bars" else (benchmark.PAGE,):
        found = benchmark.BLOCKS[block].search(page.read_text("utf-8"))
        assert found is not None
        assert found[0] == benchmark.table(block, benchmark.documents()), "run: python benchmarks/training.py --table"


def test_the_bytes_counted_keep_to_their_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("distributed_bytes")
    document = json.loads(benchmark.RESULTS.read_text("utf-8"))
    assert document["ways"].keys() == benchmark.WAYS.keys()
    for arms in document["ways"].values():
        for arm, bar in benchmark.BARS.items():
            for size in (benchmark.gradients, lambda counted: counted["optimizer_bytes"]):
                assert size(arms[arm]) <= bar * size(arms["dense"])
    ddp = document["ways"]["DDP"]
    stored = ddp["compact"]["compact"]
    assert benchmark.matrix_bytes(ddp, "dense") == 4 * stored["weights"]
    assert benchmark.matrix_bytes(ddp, "compact") == 4 * stored["values"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_results_name_no_folder_of_the_machine(path: Path) -> None:
    text = path.read_text("utf-8")
    assert '"command"' in text
    assert not any(f"{folder}/" in text for folder in ("/home", "/root", "/tmp", "/work", "/Users"))
