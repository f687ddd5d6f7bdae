"""The predictor for whatever a folder is for: `sparse_accel.Predictor`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final

from sparse_accel.errors import OptionError
from sparse_accel.serving.deployment import task_of

# Task -> the module and the class of its predictor; each class has a page of its own on how it is called.
PREDICTORS: Final[dict[str, tuple[str, str]]] = {
    "question_answering": ("sparse_accel.serving.predicting", "Predictor"),
    "text_classification": ("sparse_accel.serving.text_predicting", "TextPredictor"),
    "token_classification": ("sparse_accel.serving.token_predicting", "TokenPredictor"),
    "masked_language_modeling": ("sparse_accel.serving.mlm_predicting", "MaskFiller"),
}


def Predictor(
    folder: str | Path,
    engine: str | None = None,
    *,
    threads: int | None = None,
    batch_size: int = 8,
    max_seq_length: int | None = None,
    doc_stride: int | None = None,
    max_answer_length: int | None = None,
) -> Any:
    """Open a deployment folder, or a plain model folder, to predict with as its task is: called with a question and a context
    it answers, with a text (and the second of a pair) it classifies, labels words or fills gaps.

    `engine` is onnxruntime, openvino or torch (left out: by what the folder holds); the last two are for questions alone.
    Raises ModelError, OptionError and DataError, all of them before the first prediction.
    """
    task = task_of(folder)
    of_questions = {"doc_stride": doc_stride, "max_answer_length": max_answer_length}
    given = {name: value for name, value in of_questions.items() if value is not None}
    if given and task != "question_answering":
        raise OptionError(f"{next(iter(given))}: is for question_answering; {folder} is a model for {task}")
    module, name = PREDICTORS[task]
    opens = getattr(importlib.import_module(module), name)
    return opens(folder, engine, threads=threads, batch_size=batch_size, max_seq_length=max_seq_length, **given)
