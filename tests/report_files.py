"""What a training run leaves for its report, made by hand; and a reader that tells whether a page is well formed."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from sparse_accel.compress.census import kind_of_name
from sparse_accel.compress.inspection import place_of

# Elements that have no end.
_VOID = {"meta", "br", "img", "link", "hr", "input"}
MATRICES = {
    "bert.embeddings.word_embeddings.weight": (1000, 0, 0),
    "bert.encoder.layer.0.attention.self.query.weight": (400, 200, 300),
    "bert.encoder.layer.10.output.dense.weight": (800, 640, 720),
}


def facts(**changes: Any) -> dict[str, Any]:
    """report.json of a run of 8 steps, 4 an epoch."""
    matrices = []
    for name, (numel, before, after) in MATRICES.items():
        row, column = place_of(name)
        counts = {"numel": numel, "zeros_before": before, "zeros": after}
        matrices.append({"name": name, "kind": kind_of_name(name), "row": row, "column": column, **counts})
    kinds = [{key: entry[key] for key in ("kind", "numel", "zeros_before", "zeros")} for entry in matrices]
    return {
        "sparse_accel_report": 1,
        "name": "a run",
        "task": "question_answering",
        "model": "models/<student> & co",
        "class": "BertForQuestionAnswering",
        "teacher": None,
        "command": "sparse_accel train question_answering --train_file 'a<b>.json'",
        "finished": "2026-01-02 03:04 UTC",
        "seconds": 3723.0,
        "one_shot": False,
        "steps": {"done": 8, "last": 8, "per_epoch": 4, "features": 16},
        "ran_on": {"processes": 2, "backend": "DDP", "precision": "bf16", "device": "cpu", "memory_of": "host"},
        "peak_memory_bytes": 1_234_000_000,
        "versions": {"sparse_accel": "9.8.7", "torch": "6.5.4"},
        "matrices": matrices,
        "kinds": [{**kind, "quantized": 1} for kind in kinds],
        "prunable": {"numel": 1200, "zeros_before": 840, "zeros": 1020, "quantized": 2},
        **changes,
    }


def history() -> list[dict[str, Any]]:
    """The log of that run: a line a step, an evaluation an epoch."""
    lines: list[dict[str, Any]] = []
    for step in range(1, 9):
        epoch = step / 4
        losses = {"loss": 2.0 / step, "task_loss": 1.5 / step, "distillation_loss": 0.5 / step}
        phase = "float" if step <= 3 else "observing" if step <= 6 else "frozen"
        lines.append({"step": step, "epoch": epoch, **losses, "learning_rate": 1e-4 * (9 - step) / 8, "phase": phase})
        if step % 4 == 0:
            scores = {"eval_exact_match": 61.25 + step, "eval_f1": 71.5 + step, "eval_samples": 17}
            lines.append({"step": step, "epoch": epoch, **scores, "eval_samples_per_second": 123.4 + step})
    return lines


def results() -> dict[str, Any]:
    """Its all_results.json."""
    return {
        "epoch": 2.0,
        "train_loss": 0.6789,
        "train_samples_per_second": 45.6,
        "train_steps_per_second": 2.85,
        "eval_exact_match": 69.25,
        "eval_f1": 79.5,
        "eval_samples": 17,
        "eval_samples_per_second": 131.4,
    }


def write_run(folder: Path) -> None:
    """The files of which a report is made, and a page that says nothing yet."""
    for name, content in (
        ("report.json", facts()),
        ("trainer_state.json", {"log_history": history()}),
        ("all_results.json", results()),
    ):
        (folder / name).write_text(json.dumps(content), "utf-8")
    (folder / "report.html").write_text("nothing yet", "utf-8")


class Page(HTMLParser):
    """Reads a page; raises AssertionError for an element that is not closed where it should be. `text` is all that is shown,
    by a space each, `attributes` every attribute's value."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(source)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.words.append(data.strip())

    def check_self_contained(self) -> None:
        """Nothing is loaded, nothing runs."""
        assert not any(tag in ("script", "link", "iframe", "img") for tag, _, _ in self.attributes)
        assert not any(name in ("src", "href") or name.startswith("on") for _, name, _ in self.attributes)
        assert any("default-src 'none'" in value for _, _, value in self.attributes)
