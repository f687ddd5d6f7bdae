"""The nine tasks of GLUE: their columns, labels and metrics, and the tab-separated files in which they were published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sparse_accel.errors import DataError, OptionError, suggestion
from sparse_accel.tasks.reading import Row, read_text

# The data set's name on the Hugging Face hub; its configurations are the tasks.
HUB_NAME: Final = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One task. `texts` are its columns on the hub, `file_texts` and `file_label` those of its own files.

    `labels` are the classes in the order of their numbers, none for regression; `positive` is the class whose F1 counts.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    file_texts: tuple[str, ...] = ()
    file_label: str = "label"
    positive: str | None = None

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers on a scale."""
        return not self.labels

    @property
    def columns_in_files(self) -> tuple[str, ...]:
        """The columns of texts in the task's own files."""
        return self.file_texts or self.texts

    @property
    def layout(self) -> str:
        """The columns that its own files have, for a message."""
        return ", ".join((*self.columns_in_files, self.file_label))


_ENTAILMENT: Final = ("entailment", "not_entailment")
_SENTENCES: Final = ("sentence1", "sentence2")

GLUE: Final[dict[str, GlueTask]] = {
    task.name: task
    for task in (
        GlueTask("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            file_texts=_SENTENCES,
            file_label="gold_label",
        ),
        GlueTask(
            "mrpc",
            _SENTENCES,
            ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
            file_texts=("#1 String", "#2 String"),
            file_label="Quality",
            positive="equivalent",
        ),
        GlueTask("qnli", ("question", "sentence"), _ENTAILMENT),
        GlueTask(
            "qqp",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
            file_label="is_duplicate",
            positive="duplicate",
        ),
        GlueTask("rte", _SENTENCES, _ENTAILMENT),
        GlueTask("sst2", ("sentence",), ("negative", "positive")),
        GlueTask("stsb", _SENTENCES, (), ("pearson", "spearmanr"), file_label="score"),
        GlueTask("wnli", _SENTENCES, ("not_entailment", "entailment")),
    )
}

# What people write for them.
_SPELLINGS: Final = {"sst": "sst2", "sts": "stsb", "mnlimm": "mnli", "mnlimismatched": "mnli", "mnlimatched": "mnli"}
# CoLA's files for training and evaluation have no line of names; these are their columns.
_COLA_COLUMNS: Final = ("source", "label", "original_label", "sentence")


def glue_task(name: str) -> GlueTask:
    """The task of that name, however it is spelt (`SST-2`). Raises OptionError with the nearest names."""
    key = name.strip().lower().replace("-", "").replace("_", "").replace(" ", "")
    key = _SPELLINGS.get(key, key)
    if key not in GLUE:
        raise OptionError(
            f"--task_name should be one of GLUE's tasks, it is {name!r}{suggestion(key, GLUE)} (other data sets are named by "
            "--dataset_name or by files)"
        )
    return GLUE[key]


def read_glue_file(path: str | Path, task: GlueTask) -> list[Row] | None:
    """The rows of one of the task's own files, as the benchmark's archive has them; None for a file of another layout.

    Their cells are separated by tabs and never quoted: a quotation mark is one. Raises DataError for a file without rows.
    """
    path = Path(path)
    if path.suffix.lower() not in (".tsv", ".txt") or not path.is_file():
        return None
    # Only "\n" ends a line: texts hold other characters that str.splitlines would split at.
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    header, first = lines[0].split("\t"), 1
    if task.name == "cola" and len(header) == len(_COLA_COLUMNS) and header[1] in ("0", "1"):
        header, first = list(_COLA_COLUMNS), 0
    if not set(task.columns_in_files) <= set(header):
        return None
    rows = []
    for number, line in enumerate(lines[first:], start=first + 1):
        if not line.strip():
            continue
        cells = line.split("\t")
        where = f"{path}:{number}"
        if len(cells) == len(header):
            rows.append(Row(where, dict(zip(header, cells, strict=True))))
        else:
            rows.append(Row(where, {}, f"has {len(cells)} cells, and the file has {len(header)} columns"))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def mismatched_file(path: str | Path) -> Path | None:
    """The file of MNLI's mismatched part that lies beside the one of the matched part; None where there is none."""
    path = Path(path)
    if "matched" not in path.name or "mismatched" in path.name:
        return None
    sibling = path.with_name(path.name.replace("matched", "mismatched"))
    return sibling if sibling.is_file() else None
