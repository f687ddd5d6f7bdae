"""Deployment folders of the tiny world: graphs that point at two words or label some, and an exported model."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.tiny import tiny_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")


def pointing_deployment(folder: Path, first: str = "red", last: str = "lamp", **facts: Any) -> Path:
    """A deployment whose start logits are 10 on the word `first` and 0 elsewhere, and its end logits on `last`; what it
    answers can be told without running it. `facts` go to deployment.json."""
    from onnx import TensorProto, helper, save_model

    tokenizer = tiny_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    nodes, constants = [], [helper.make_tensor("ten", TensorProto.FLOAT, [], [10.0])]
    for name, word in (("start", first), ("end", last)):
        constants.append(helper.make_tensor(f"{name}_word", TensorProto.INT64, [], [vocabulary[word]]))
        nodes += [
            helper.make_node("Equal", ["input_ids", f"{name}_word"], [f"is_{name}"]),
            helper.make_node("Cast", [f"is_{name}"], [f"{name}_ones"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}_ones", "ten"], [f"{name}_logits"]),
        ]
    shape = ["batch", "sequence"]
    graph = helper.make_graph(
        nodes,
        "points",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape)],
        [helper.make_tensor_value_info(f"{name}_logits", TensorProto.FLOAT, shape) for name in ("start", "end")],
        constants,
    )
    save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )
    config = {"architectures": ["BertForQuestionAnswering"], "model_type": "bert", "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "deployment.json").write_text(
        json.dumps({"sparse_accel_deployment": 1, "task": "question_answering", **facts})
    )
    return folder


def tagging_deployment(folder: Path, words: Mapping[str, str], labels: Sequence[str], **facts: Any) -> Path:
    """A deployment that gives the label `words` says to the token of each word (10 for it, 0 for the others), and the last
    of `labels` to all other tokens. `facts` go to deployment.json."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save_model

    tokenizer = tiny_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    table = np.zeros((len(vocabulary), len(labels)), np.float32)
    for word, place in vocabulary.items():
        table[place, labels.index(words.get(word, labels[-1]))] = 10.0
    shape = ["batch", "sequence"]
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["logits"])],
        "tags",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, len(labels)])],
        [numpy_helper.from_array(table, "table")],
    )
    save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )
    config: dict[str, Any] = {
        "architectures": ["BertForTokenClassification"],
        "model_type": "bert",
        "max_position_embeddings": 512,
    }
    config["id2label"] = {str(index): label for index, label in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "deployment.json").write_text(
        json.dumps({"sparse_accel_deployment": 1, "task": "token_classification", **facts})
    )
    return folder


def exported_deployment(folder: Path, model_folder: Path) -> Path:
    """torch's own export of a float model, beside its tokenizer; made once, since it takes seconds."""
    import torch
    from transformers import AutoModelForQuestionAnswering

    if (folder / "model.onnx").is_file():
        return folder

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            outputs = self.model(input_ids=ids, attention_mask=mask, token_type_ids=types)
            return outputs.start_logits, outputs.end_logits

    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(model_folder / name, folder / name)
    model = AutoModelForQuestionAnswering.from_pretrained(model_folder).eval()
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            Logits(model).eval(),
            (torch.full((3, 13), 5), torch.ones(3, 13, dtype=torch.long), torch.zeros(3, 13, dtype=torch.long)),
            folder / "model.onnx",
            dynamo=True,
            opset_version=21,
            input_names=["input_ids", "attention_mask", "token_type_ids"],
            output_names=["start_logits", "end_logits"],
            dynamic_shapes=(free, free, free),
            external_data=False,
            verbose=False,
        )
    return folder
