"""Sparse transfer in ten lines, on what `make demo` made: `python examples/ten_lines.py`, or `accelerate launch` in place of `python`"""

import sys

from sparse_accel import train

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/demo"
result = train(
    "question_answering",
    model_name_or_path=f"{folder}/pruned",
    distill_teacher=f"{folder}/teacher",
    recipe="question_answering/pruned_quant",
    recipe_args={"num_epochs": 3, "qat_start_epoch": 1.0, "observer_epoch": 2.0, "init_lr": 4e-4},
    train_file=f"{folder}/data/train.json",
    validation_file=f"{folder}/data/validation.json",
    output_dir=f"{folder}/ten_lines",
    do_train=True,
    do_eval=True,
)
print(f"F1 {result.metrics['eval_f1']:.1f} after {result.steps} steps; the model is in {result.output_dir}")
