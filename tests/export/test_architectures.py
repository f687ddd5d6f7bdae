"""Every architecture and every kind of compression: the exported graph computes what torch computes, in integers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import sparse_accel
from sparse_accel.compress.plan import prunable_parameters
from sparse_accel.compress.ranges import Phase, quantizers
from sparse_accel.errors import OptionError
from sparse_accel.folders.trained import TrainedModel, open_trained
from sparse_accel.onnx_export.exporting import OPSETS, export_graph
from sparse_accel.onnx_export.graph_census import (
    census_of,
    check_census,
    check_kernels,
    expected_matmuls,
    integer_kernels,
    matmuls_of,
)
from sparse_accel.serving.engines import OrtEngine, TorchEngine
from sparse_accel.tasks import resolve_task
from tests.conftest import ROOT
from tests.export.trained import KINDS, trained_folder

TASK = resolve_task("question_answering")
# Up to the last position that the tiny models have.
SHAPES = ((1, 1), (1, 7), (3, 13), (5, 30), (2, 64), (1, 512))


@dataclass(frozen=True)
class Case:
    """One model of the matrix."""

    kind: str
    quantized: bool
    masked: bool
    per_channel: bool = False
    embeddings: bool = False
    attention: bool = False

    @property
    def name(self) -> str:
        words = [self.kind, "qat" if self.quantized else "float", "masked" if self.masked else "dense"]
        words += ["channel"] * self.per_channel + ["embeddings"] * self.embeddings + ["attention"] * self.attention
        return "-".join(words)

    def write(self, folder: Path, layers: int = 1) -> TrainedModel:
        trained_folder(
            folder,
            self.kind,
            sparsity=0.8 if self.masked else 0.0,
            quantized=self.quantized,
            per_channel=self.per_channel,
            embeddings=self.embeddings,
            attention=self.attention,
            layers=layers,
        )
        _train_vectors(folder / "model.safetensors")
        return open_trained(folder, TASK)


def _train_vectors(file: Path) -> None:
    """Biases away from 0 and norms away from 1, where random models have them: a graph that lost one would look right."""
    weights = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for tensor in weights.values():
        if tensor.dim() == 1:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    save_file(weights, file, metadata={"format": "pt"})


FULL = Case("bert", True, True, embeddings=True, attention=True)


def _cases_of(kind: str) -> Iterator[Case]:
    for masked in (False, True):
        yield Case(kind, False, masked)
    for switches in product((False, True), repeat=4):
        yield Case(kind, True, *switches)


def _is_chosen(case: Case) -> bool:
    """What the default run takes: of BERT the float models and those others that have no switch or three, in which every two
    switches meet in all four ways; of each other architecture what is float, what is least, and what has most."""
    if case.kind == "bert":
        return not case.quantized or sum((case.masked, case.per_channel, case.embeddings, case.attention)) in (0, 3)
    return case in (
        Case(case.kind, False, True),
        Case(case.kind, True, False, False, False, False),
        Case(case.kind, True, True, False, True, True),
        Case(case.kind, True, True, True, False, True),
    )


CASES = [case for kind in KINDS for case in _cases_of(kind)]


def batch_of(trained: TrainedModel, rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens; every row but the first ends in padding, the last one of a longer batch begins with it."""
    rng = np.random.default_rng(seed)
    vocabulary = trained.model.config.vocab_size
    ids = rng.integers(5, vocabulary, (rows, length))
    mask = np.ones((rows, length), np.int64)
    for row in range(1, rows):
        mask[row, length - length * row // (2 * rows) :] = 0
    if rows > 2:
        mask[-1] = mask[-1, ::-1]
    ids[mask == 0] = trained.tokenizer.pad_token_id
    types = (np.arange(length)[None] >= length // 2) & (mask == 1)
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types.astype(np.int64)}
    return {name: batch[name] for name in trained.tokenizer.model_input_names}


def differences(trained: TrainedModel, graph: Path, shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[float]:
    """Of each shape: the mean difference between ONNX Runtime and torch, as a share of torch's mean logit."""
    reference, exported = TorchEngine(trained.model, TASK.output_keys), OrtEngine(graph, 1)
    found = []
    for rows, length in shapes:
        batch = batch_of(trained, rows, length)
        wanted, given = reference(batch), exported(batch)
        assert given.keys() == wanted.keys() == {"start_logits", "end_logits"}
        assert all(given[name].shape == (rows, length) for name in given)
        size = np.mean([np.abs(wanted[name]).mean() for name in wanted])
        found.append(float(np.mean([np.abs(given[name] - wanted[name]).mean() for name in wanted]) / size))
    return found


def assert_same(found: list[float], limit: float) -> None:
    """At most shapes: a value that lies halfway between two steps of a quantizer may take the other one where sums are
    made in another order, and what comes behind it changes. One in a hundred thousand does, so that long batches have
    some."""
    assert sorted(found)[len(found) // 2] < limit, found
    assert max(found) < 0.02, found


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[] if _is_chosen(case) else [pytest.mark.exhaustive]) for case in CASES],
)
def test_graph_computes_what_torch_computes(case: Case, tmp_path: Path) -> None:
    trained = case.write(tmp_path)
    assert (trained.plan.num_quantizers > 0) == case.quantized
    graph = tmp_path / "model.onnx"
    export_graph(trained, TASK, graph, graph_format="qdq" if case.quantized else "float")
    segments = ("token_type_ids",) if case.kind not in ("distilbert", "roberta") else ()
    assert OrtEngine(graph, 1).input_names == ("input_ids", "attention_mask", *segments)
    found = differences(trained, graph)
    if case.quantized:
        assert_same(found, 1e-5)
    else:
        assert max(found) < 1e-5, found
    census, kernels = census_of(graph), integer_kernels(graph)
    assert check_census(census, trained, integer=case.quantized) == []
    assert check_kernels(kernels, trained) == []
    assert (matmuls_of(kernels).integer > 0) == case.quantized
    sparse = [
        entry
        for entry in census.initializers
        if len(entry.shape) == 2 and min(entry.shape) > 1 and entry.sparsity > 0.75
    ]
    assert len(sparse) == (len(prunable_parameters(trained.model)) if case.masked else 0)


def test_two_layers_take_any_shape_up_to_the_last_position(tmp_path: Path) -> None:
    trained = FULL.write(tmp_path, layers=2)
    graph = tmp_path / "model.onnx"
    export_graph(trained, TASK, graph)
    assert_same(differences(trained, graph, ((1, 1), (2, 17), (7, 5), (4, 128), (2, 512))), 1e-5)
    model = onnx.load(graph)
    for value in (*model.graph.input, *model.graph.output):
        assert [dim.dim_param for dim in value.type.tensor_type.shape.dim] == ["batch", "sequence"], value.name
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [value.name for value in model.graph.output] == ["start_logits", "end_logits"]
    onnx.checker.check_model(model, full_check=True)


def test_a_fixed_length_is_fixed_in_inputs_and_outputs_while_the_batch_stays_free(tmp_path: Path) -> None:
    trained = FULL.write(tmp_path)
    graph = tmp_path / "model.onnx"
    export_graph(trained, TASK, graph, sequence_length=24)
    assert_same(differences(trained, graph, ((1, 24), (3, 24), (8, 24))), 1e-5)
    model = onnx.load(graph)
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        assert dims[0].dim_param == "batch" and dims[1].dim_value == 24, value.name
    with pytest.raises(Exception, match=r"(?i)invalid.*dimensions"):
        OrtEngine(graph, 1)(batch_of(trained, 1, 25))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A masked BERT with all that can be quantized."""
    return FULL.write(tmp_path_factory.mktemp("full"))


# What lies between the first and the last, and is not the default, which all others have, is left to the full run.
@pytest.mark.parametrize(
    "opset",
    [
        pytest.param(opset, marks=[] if opset in (OPSETS[0], OPSETS[-1]) else [pytest.mark.exhaustive])
        for opset in OPSETS
    ],
)
def test_every_opset_that_is_offered_runs(full: TrainedModel, opset: int, tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    export_graph(full, TASK, graph, opset=opset)
    assert {entry.domain: entry.version for entry in onnx.load(graph).opset_import}[""] == opset
    assert_same(differences(full, graph, ((1, 9), (3, 13), (2, 30))), 1e-5)
    assert check_kernels(integer_kernels(graph), full) == []


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_the_integer_format_spells_every_quantized_product_out(kind: str, tmp_path: Path) -> None:
    """Biases are rounded to the grid of the products: a difference that training did not have, of half a step of some
    thousand."""
    trained = Case(kind, True, True, per_channel=kind == "albert", embeddings=True, attention=True).write(tmp_path)
    graph = tmp_path / "model.onnx"
    export_graph(trained, TASK, graph, graph_format="integer")
    assert max(differences(trained, graph)) < 0.01
    nodes = onnx.load(graph).graph.node
    kinds = Counter(node.op_type for node in nodes)
    expected = expected_matmuls(trained)
    assert kinds["MatMulInteger"] == expected.integer > 0
    assert kinds["MatMul"] + kinds["Gemm"] == expected.floating
    assert check_kernels(integer_kernels(graph), trained) == []
    assert check_census(census_of(graph), trained) == []
    # DeepSparse, whom this format is for, wants both operands of a product unsigned.
    dtypes = {entry.name: entry.data_type for entry in onnx.load(graph).graph.initializer}
    read = [name for node in nodes if node.op_type == "MatMulInteger" for name in node.input if name in dtypes]
    assert read and {dtypes[name] for name in read} == {onnx.TensorProto.UINT8}


def test_no_trace_of_this_machine_is_in_the_file_and_two_exports_are_equal(full: TrainedModel, tmp_path: Path) -> None:
    for name in ("one.onnx", "other.onnx"):
        export_graph(full, TASK, tmp_path / name)
    content = (tmp_path / "one.onnx").read_bytes()
    assert content == (tmp_path / "other.onnx").read_bytes()
    traces = (str(ROOT), str(full.folder), str(Path.home()), sys.prefix, "site-packages", ".py", "torch.nn", "aten.")
    assert [trace for trace in traces if trace.encode() in content] == []
    model = onnx.load(tmp_path / "one.onnx")
    assert (model.producer_name, model.producer_version) == ("sparse_accel", sparse_accel.__version__)
    assert not model.metadata_props and not model.functions


@pytest.mark.parametrize("graph_format", ["qdq", "float"])
def test_the_model_is_left_as_it_was(full: TrainedModel, graph_format: str, tmp_path: Path) -> None:
    batch = batch_of(full, 3, 13)
    engine = TorchEngine(full.model, TASK.output_keys)

    def facts() -> dict[str, Any]:
        model = full.model
        return {
            "attention": model.config._attn_implementation,
            "modes": [module.training for module in model.modules()],
            "phases": [quantizer.phase for quantizer in quantizers(model).values()],
            "own": [sorted(quantizer.__dict__) for quantizer in quantizers(model).values()],
            "hooks": sum(len(module._forward_hooks) for module in model.modules()),
        }

    before, logits = facts(), engine(batch)
    state = {name: tensor.clone() for name, tensor in full.model.state_dict().items()}
    export_graph(full, TASK, tmp_path / "model.onnx", graph_format=graph_format)
    assert facts() == before
    assert set(before["phases"]) == {Phase.FROZEN}
    assert state.keys() == full.model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in full.model.state_dict().items())
    after = engine(batch)
    assert all(np.array_equal(logits[name], after[name]) for name in logits)


def test_an_unknown_format_is_refused_with_the_known_ones(full: TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'qqd' is not offered; did you mean 'qdq'"):
        export_graph(full, TASK, tmp_path / "model.onnx", graph_format="qqd")
    assert list(tmp_path.iterdir()) == []
