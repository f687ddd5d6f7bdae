"""Latency of float and int8, dense and sparse graphs of one model, for models of the shapes of MiniLM and of BERT-base.

    python benchmarks/inference_latency.py --out runs/inference_latency

Speed depends on shapes and zeros, not on what a model has learnt: weights are random, 90% of each encoder matrix is zero, and
the ranges are those of random text. Each model becomes a folder as training leaves one; `sparse_accel benchmark inference
--variants` does the rest and writes results.json, results.md and latency.png into <out>/<shape>.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from sparse_accel.cli.demo import encoder_folder
from sparse_accel.compress.masks import magnitude_mask
from sparse_accel.compress.plan import CompressionPlan, fold, install, quantization_state, set_phase
from sparse_accel.compress.ranges import Phase, begin_step, calibrating, end_step
from sparse_accel.folders.trained import PLAN_FILE, RANGES_FILE, use_own_attention
from sparse_accel.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
    "bert_base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
}


def main() -> None:
    """Make the models that are missing and measure each shape in one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/inference_latency"))
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--sparsity", type=float, default=0.9, help="of each matrix of the encoder")
    parser.add_argument("--seconds", type=float, default=5, help="of calls per row")
    arguments = parser.parse_args()
    for shape in SHAPES if arguments.shape == "all" else [arguments.shape]:
        folder = arguments.out / f"{shape}_model"
        if not (folder / PLAN_FILE).is_file():
            write_model(folder, shape, arguments.sparsity)
        command = [
            str(Path(sysconfig.get_path("scripts")) / "sparse_accel"), "benchmark", "inference", "--variants", str(folder),
            "--engine", "onnxruntime,openvino", "--sequence_length", "128,384", "--seconds", str(arguments.seconds),
            "--output_dir", str(arguments.out / shape), "--overwrite",
        ]  # fmt: skip
        print(f"$ {shlex.join(command)}", flush=True)
        finished = subprocess.run(command, cwd=ROOT)
        if finished.returncode:
            sys.exit(finished.returncode)


@torch.no_grad()
def write_model(folder: Path, shape: str, sparsity: float) -> None:
    """A random question-answering model with zeros, the shipped recipe's quantizers, and calibrated ranges."""
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(num_attention_heads=12, **SHAPES[shape])).eval()
    for name, weight in model.named_parameters():
        if ".layer." in name and weight.dim() == 2:
            weight[~magnitude_mask(weight, sparsity)] = 0.0
    plan = CompressionPlan()
    Recipe.load("question_answering/pruned_quant").plan(plan, model)
    plan = CompressionPlan({name: entry for name, entry in plan.modules.items() if entry.is_quantized})
    use_own_attention(model)
    install(model, plan)
    set_phase(model, Phase.FROZEN)
    with calibrating(model):
        begin_step(model, 0)
        ids = torch.randint(1000, model.config.vocab_size, (2, 128))
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        end_step(model, lambda vector: vector)
    ranges = quantization_state(model)
    fold(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder_folder(), model_max_length=512).save_pretrained(folder)
    save_file(ranges, folder / RANGES_FILE)
    plan.save(folder / PLAN_FILE)


if __name__ == "__main__":
    main()
