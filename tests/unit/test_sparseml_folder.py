"""Folders with SparseML's quantization-aware state dict: the opened model computes what torch.ao's modules compute."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_bert
from torch import Tensor, nn
from torch.ao.nn.qat import Linear as QatLinear
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    disable_observer,
)
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForQuestionAnswering
from transformers.masking_utils import eager_mask

from sparse_accel.compress.ranges import Phase, quantizers
from sparse_accel.errors import ModelError
from sparse_accel.folders.inspecting import inspect_folder
from sparse_accel.folders.sparseml import FakeQuantized, grid_of, is_sparseml_state, open_sparseml, split_state
from sparse_accel.folders.trained import TrainedModel
from sparse_accel.tasks import resolve_task

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*")

AFFINE, SYMMETRIC = torch.per_tensor_affine, torch.per_tensor_symmetric
UINT8: dict[str, Any] = {"dtype": torch.quint8, "quant_min": 0, "quant_max": 255, "qscheme": AFFINE}
INT8: dict[str, Any] = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127, "qscheme": AFFINE}
# Without quant_min and quant_max torch.ao centres the grid at 128, as SparseML wants it.
UINT8_SYMMETRIC: dict[str, Any] = {"dtype": torch.quint8, "qscheme": SYMMETRIC}
INT8_SYMMETRIC: dict[str, Any] = {**INT8, "qscheme": SYMMETRIC}
PER_CHANNEL: dict[str, Any] = {
    **INT8,
    "observer": MovingAveragePerChannelMinMaxObserver,
    "qscheme": torch.per_channel_symmetric,
    "ch_axis": 0,
}


@dataclass(frozen=True)
class Recipe:
    """What a recipe of SparseML quantizes; None leaves a tensor float."""

    linear_weight: dict[str, Any] | None = None
    table: dict[str, Any] | None = None
    activation: dict[str, Any] | None = None
    right_operand: dict[str, Any] | None = None
    linear_outputs: bool = False
    norm_outputs: bool = False
    product_outputs: bool = True


TUTORIAL = Recipe(INT8_SYMMETRIC, INT8_SYMMETRIC, UINT8, UINT8_SYMMETRIC)
RECIPES = {
    "tutorial": TUTORIAL,
    "every output": Recipe(INT8_SYMMETRIC, INT8_SYMMETRIC, UINT8, UINT8_SYMMETRIC, True, True),
    "per channel, float embeddings and products": Recipe(linear_weight=PER_CHANNEL, activation=UINT8),
    "tables outside the submodules": Recipe(INT8_SYMMETRIC, INT8, UINT8, UINT8_SYMMETRIC, product_outputs=False),
    "tensorrt": Recipe(INT8_SYMMETRIC, INT8_SYMMETRIC, INT8_SYMMETRIC, INT8_SYMMETRIC),
    "scheme": Recipe(INT8_SYMMETRIC, INT8_SYMMETRIC, INT8, INT8_SYMMETRIC),
    "weights alone": Recipe(linear_weight=INT8_SYMMETRIC),
    "4 bits": Recipe(
        {**INT8_SYMMETRIC, "quant_min": -8, "quant_max": 7},
        {**INT8_SYMMETRIC, "quant_min": -8, "quant_max": 7},
        {**UINT8, "quant_max": 15},
        {**UINT8, "quant_max": 15, "qscheme": SYMMETRIC},
    ),
}


def fake_quantizer(settings: dict[str, Any]) -> FakeQuantize:
    return FakeQuantize(**{"observer": MovingAverageMinMaxObserver, **settings})


class Stub(nn.Module):
    """A QuantStub after preparation."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.activation_post_process = fake_quantizer(settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation_post_process(x)


class Wrapped(nn.Module):
    """A QuantWrapper around a layer."""

    def __init__(self, settings: dict[str, Any], module: nn.Module) -> None:
        super().__init__()
        self.quant = Stub(settings)
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(self.quant(x))


class Product(nn.Module):
    """SparseML's QATMatMul."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.input_quant_stubs = nn.ModuleList([Stub(recipe.activation), Stub(recipe.right_operand)])
        self.output_quant_stubs = nn.ModuleList([Stub(recipe.activation)] if recipe.product_outputs else [])

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        product = torch.matmul(self.input_quant_stubs[0](left), self.input_quant_stubs[1](right))
        return self.output_quant_stubs[0](product) if self.output_quant_stubs else product


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention as SparseML's models of transformers' version 4 computed it."""
    if module.scales_the_query:
        scores = module.attention_scores_matmul(query * scaling, key.transpose(2, 3))
    else:
        scores = module.attention_scores_matmul(query, key.transpose(2, 3)) * scaling
    scores = scores if mask is None else scores + mask
    context = module.context_layer_matmul(torch.softmax(scores, dim=-1), value)
    return context.transpose(1, 2).contiguous(), None


AttentionInterface.register("sparseml_reference", attention)
AttentionMaskInterface.register("sparseml_reference", eager_mask)


def add_output_observer(layer: nn.Module, settings: dict[str, Any]) -> None:
    layer.add_module("activation_post_process", fake_quantizer(settings))
    layer.register_forward_hook(lambda module, _, output: module.activation_post_process(output))


def make_quantization_aware(model: nn.Module, recipe: Recipe) -> None:
    """Put torch.ao's modules where SparseML puts them, under its names."""
    for name, layer in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(layer, nn.Linear) and recipe.linear_weight:
            settings = {"observer": MovingAverageMinMaxObserver, **recipe.linear_weight}
            layer.qconfig = QConfig(activation=nn.Identity, weight=FakeQuantize.with_args(**settings))
            layer = QatLinear.from_float(layer)
            if recipe.linear_outputs:
                add_output_observer(layer, recipe.activation)
            setattr(
                model.get_submodule(parent), child, Wrapped(recipe.activation, layer) if recipe.activation else layer
            )
        elif isinstance(layer, nn.LayerNorm) and recipe.norm_outputs:
            add_output_observer(layer, recipe.activation)
        elif isinstance(layer, nn.Embedding) and recipe.table:
            layer.weight_fake_quant = fake_quantizer(recipe.table)
            layer.forward = lambda ids, layer=layer: nn.functional.embedding(
                ids, layer.weight_fake_quant(layer.weight), layer.padding_idx
            )
            add_output_observer(layer, recipe.activation)
    if recipe.right_operand:
        model.set_attn_implementation("sparseml_reference")
        for name, module in list(model.named_modules()):
            if name.endswith(("attention.self", "layer.0.attention", "layer.1.attention")) and hasattr(
                module, "scaling"
            ):
                module.scales_the_query = "distilbert" in name
                module.attention_scores_matmul = Product(recipe)
                module.context_layer_matmul = Product(recipe)


def batch(seed: int) -> dict[str, Tensor]:
    """Two rows of token ids, the second padded."""
    ids = torch.randint(5, 80, (2, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def reference(folder: Path, recipe: Recipe, kind: str = "bert") -> nn.Module:
    """A pruned tiny model whose observers saw data, in eval mode; `folder` becomes its model folder."""
    tiny_bert(folder, kind=kind)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight[layer.weight.abs() < 0.05] = 0.0
    make_quantization_aware(model, recipe)
    with torch.no_grad():
        for seed in range(3):
            model(**batch(seed))
    model.apply(disable_observer)
    save(folder, model.state_dict())
    return model


def save(folder: Path, state: dict[str, Tensor]) -> None:
    """The state dict in place of the folder's weights, in one .safetensors file."""
    for file in (*folder.glob("*.safetensors*"), *folder.glob("*.bin*")):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def in_one_bin(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(OrderedDict(state), folder / "pytorch_model.bin")


def in_shards(folder: Path, state: dict[str, Tensor], stem: str, suffix: str, write: Callable[..., Any]) -> None:
    weight_map = {}
    for part in range(2):
        name = f"{stem}-0000{part + 1}-of-00002{suffix}"
        shard = dict(list(state.items())[part::2])
        write(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LAYOUTS: dict[str, Callable[[Path, dict[str, Tensor]], None]] = {
    "one .bin": in_one_bin,
    "shards of .bin": lambda folder, state: in_shards(folder, state, "pytorch_model", ".bin", torch.save),
    "shards of .safetensors": lambda folder, state: in_shards(folder, state, "model", ".safetensors", save_file),
}


def opened(folder: Path) -> TrainedModel:
    return open_sparseml(folder, resolve_task("qa"))


def num_fake_quantize(model: nn.Module) -> int:
    return sum(isinstance(module, FakeQuantize) for module in model.modules())


@torch.no_grad()
def assert_same_logits(model: nn.Module, expected: nn.Module) -> None:
    """Equal to the last bit, on data that no observer saw."""
    ours, theirs = model(**batch(99)), expected(**batch(99))
    assert torch.equal(ours.start_logits, theirs.start_logits)
    assert torch.equal(ours.end_logits, theirs.end_logits)


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("tutorial") / "model"
    return folder, reference(folder, TUTORIAL)


@pytest.fixture
def copy_of(tutorial: tuple[Path, nn.Module], tmp_path: Path) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """A folder of the tutorial's model without weights, and its state dict to be changed."""
    folder, model = tutorial
    copied = tmp_path / "model"
    copied.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            (copied / file.name).write_bytes(file.read_bytes())
    yield copied, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_opened_model_computes_what_torch_ao_computes(recipe: Recipe, tmp_path: Path) -> None:
    expected = reference(tmp_path / "model", recipe)
    trained = opened(tmp_path / "model")
    assert trained.plan.num_quantizers == num_fake_quantize(expected)
    assert_same_logits(trained.model, expected)


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "electra"])
def test_other_architectures_follow_the_same_grammar(kind: str, tmp_path: Path) -> None:
    expected = reference(tmp_path / "model", TUTORIAL, kind)
    trained = opened(tmp_path / "model")
    assert trained.plan.num_quantizers == num_fake_quantize(expected)
    assert sum(name.endswith("matmul") for name in trained.plan.modules) == 4
    assert_same_logits(trained.model, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_weights_is_read(
    tutorial: tuple[Path, nn.Module], copy_of: tuple[Path, dict[str, Tensor]], layout: str
) -> None:
    folder, state = copy_of
    # The models of SparseML's own transformers saved this buffer too.
    state["bert.embeddings.position_ids"] = torch.arange(512).unsqueeze(0)
    LAYOUTS[layout](folder, state)
    assert is_sparseml_state(folder)
    trained = opened(folder)
    assert_same_logits(trained.model, tutorial[1])
    assert sum("weights_only" in note for note in trained.notes) == layout.count(".bin")


def test_scales_and_ranges_are_taken_over_and_stay(tutorial: tuple[Path, nn.Module]) -> None:
    folder, expected = tutorial
    state = expected.state_dict()
    model = opened(folder).model
    model(**batch(7))
    held = quantizers(model)
    prefix = "bert.encoder.layer.1.attention.self"
    pairs = {
        f"{prefix}.query.weight_quantizer": f"{prefix}.query.module.weight_fake_quant",
        f"{prefix}.query.input_quantizer": f"{prefix}.query.quant.activation_post_process",
        f"{prefix}.context_layer_matmul.right_quantizer": (
            f"{prefix}.context_layer_matmul.input_quant_stubs.1.activation_post_process"
        ),
    }
    for ours, theirs in pairs.items():
        assert held[ours].phase is Phase.FROZEN
        assert held[ours].scale == state[f"{theirs}.scale"]
        assert held[ours].zero_point == state[f"{theirs}.zero_point"]
        assert held[ours].min_val == state[f"{theirs}.activation_post_process.min_val"]
        assert held[ours].max_val == state[f"{theirs}.activation_post_process.max_val"]
    assert held[f"{prefix}.context_layer_matmul.right_quantizer"].zero_point == 128
    assert not model.training


def test_an_inspection_shows_the_same_quantizers(tutorial: tuple[Path, nn.Module]) -> None:
    folder, _ = tutorial
    found, trained = inspect_folder(folder), opened(folder)
    assert found.form == "folder with SparseML's state dict"
    assert {(one.module, one.role): one.scale for one in found.quantizers} == {
        tuple(name.removesuffix("_quantizer").rsplit(".", 1)): (
            quantizer.scale.min().item(),
            quantizer.scale.max().item(),
        )
        for name, quantizer in quantizers(trained.model).items()
    }
    assert {matrix.name for matrix in found.matrices} == {
        name for name, parameter in trained.model.named_parameters() if parameter.dim() > 1
    }


def test_zeros_stay_and_no_mask_is_planned(tutorial: tuple[Path, nn.Module]) -> None:
    folder, expected = tutorial
    trained = opened(folder)
    weight = trained.model.bert.encoder.layer[0].intermediate.dense.weight
    assert torch.equal(weight, expected.bert.encoder.layer[0].intermediate.dense.module.weight)
    assert (weight == 0).float().mean() > 0.3
    assert not any(compression.mask for compression in trained.plan.modules.values())


def test_a_plain_folder_and_an_unreadable_one_are_not_sparseml_states(tmp_path: Path) -> None:
    plain = tiny_bert(tmp_path / "plain")
    empty = tmp_path / "empty"
    empty.mkdir()
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    for folder in (plain, empty, garbage, tmp_path / "missing", "organisation/model"):
        assert not is_sparseml_state(folder)


def test_a_state_in_half_precision_is_opened_with_a_note(
    tutorial: tuple[Path, nn.Module], copy_of: tuple[Path, dict[str, Tensor]]
) -> None:
    folder, state = copy_of
    save(folder, {name: value.half() if value.is_floating_point() else value for name, value in state.items()})
    trained = opened(folder)
    assert trained.plan == opened(tutorial[0]).plan
    assert any("do not follow from the ranges" in note for note in trained.notes)
    assert trained.model.dtype == torch.float32


def test_a_quantizer_that_is_switched_off_is_left_out_with_a_note(copy_of: tuple[Path, dict[str, Tensor]]) -> None:
    folder, state = copy_of
    for place in ("quant.activation_post_process", "module.weight_fake_quant"):
        state[f"qa_outputs.{place}.fake_quant_enabled"].zero_()
    save(folder, state)
    trained = opened(folder)
    assert "qa_outputs" not in trained.plan.modules
    assert any("qa_outputs.module.weight_fake_quant" in note for note in trained.notes)


LAYER = "bert.encoder.layer.0"
DENSE = f"{LAYER}.output.dense"


def never_saw_data(state: dict[str, Tensor]) -> None:
    state[f"{DENSE}.quant.activation_post_process.activation_post_process.min_val"].fill_(torch.inf)
    state[f"{DENSE}.quant.activation_post_process.activation_post_process.max_val"].fill_(-torch.inf)


def move(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    """The tensors whose names begin with `old` renamed; none is left behind."""

    def change(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith(old)]:
            state[new + name.removeprefix(old)] = state.pop(name)

    return change


def scales_per_channel(state: dict[str, Tensor]) -> None:
    place = f"{DENSE}.module.weight_fake_quant"
    for number in ("scale", "zero_point", "activation_post_process.min_val", "activation_post_process.max_val"):
        state[f"{place}.{number}"] = state[f"{place}.{number}"].reshape(1).repeat(3)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "never saw data": (never_saw_data, rf"1 of its quantizers never saw data.*{DENSE}.quant.activation_post_process"),
    "a weight too many": (
        lambda state: state.update({f"{LAYER}.output.extra.weight": torch.ones(2)}),
        rf"BertForQuestionAnswering.*has no {LAYER}.output.extra.weight",
    ),
    "an unknown buffer": (
        lambda state: state.update({f"{DENSE}.module.weight_fake_quant.histogram": torch.ones(2)}),
        rf"has no {DENSE}.module.weight_fake_quant.histogram",
    ),
    "a weight is missing": (
        lambda state: state.pop(f"{DENSE}.module.weight"),
        rf"there is no {DENSE}.weight, which BertForQuestionAnswering.*needs",
    ),
    "a weight is misspelled": (
        move(f"{LAYER}.output.dense.module.weight", f"{LAYER}.output.dens.module.weight"),
        r"did you mean .*output.dense.weight",
    ),
    "a head of another task": (
        move("qa_outputs.", "classifier."),
        r"the model for question answering, has no classifier.bias, classifier.weight",
    ),
    "a scale is missing": (
        lambda state: state.pop(f"{DENSE}.module.weight_fake_quant.scale"),
        rf"no {DENSE}.module.weight_fake_quant.scale",
    ),
    "a scale without a grid": (
        lambda state: state[f"{DENSE}.module.weight_fake_quant.scale"].mul_(1.3),
        rf"{DENSE}.module.weight_fake_quant has scale .* which no grid of 2 to 8 bits gives",
    ),
    "a scale that is no number": (
        lambda state: state[f"{DENSE}.module.weight_fake_quant.scale"].fill_(torch.nan),
        "which no grid of 2 to 8 bits gives",
    ),
    "too few scales": (scales_per_channel, rf"{DENSE}.module.weight_fake_quant has 3 scales for 32 rows"),
    "numbers of different counts": (
        lambda state: state.update({f"{DENSE}.module.weight_fake_quant.scale": torch.ones(3)}),
        "has 3 scales, 1 zero points and 1 ranges",
    ),
    "an unknown place": (
        move(f"{DENSE}.quant.activation_post_process", f"{DENSE}.stub"),
        rf"quantizer {DENSE}.stub, and none of SparseML's places",
    ),
    "a module that cannot be quantized": (
        move(f"{DENSE}.quant.", f"{LAYER}.intermediate.intermediate_act_fn."),
        rf"{LAYER}.intermediate.intermediate_act_fn \(GELUActivation\) cannot be masked or quantized",
    ),
    "an operand is missing": (
        move(f"{LAYER}.attention.self.context_layer_matmul.input_quant_stubs.1.", f"{LAYER}.output.LayerNorm."),
        f"{LAYER}.attention.self.context_layer_matmul is a product of two activations",
    ),
    "two quantizers in one place": (
        lambda state: state.update(
            {
                name.replace(".module.", "."): value.clone()
                for name, value in state.items()
                if "module.weight_fake" in name
            }
        ),
        "both quantize the weight of",
    ),
    "a weight twice": (
        lambda state: state.update({f"{DENSE}.weight": torch.ones(32, 64)}),
        f"two of its weights are {DENSE}.weight",
    ),
    "a weight of another shape": (
        lambda state: state.update({f"{DENSE}.module.weight": torch.ones(32, 65)}),
        rf"{DENSE}.weight has the shape \[32, 65\], but config.json says \[32, 64\]",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_state_that_cannot_be_taken_over_whole_is_refused(
    damage: Callable[[dict[str, Tensor]], Any], message: str, copy_of: tuple[Path, dict[str, Tensor]]
) -> None:
    folder, state = copy_of
    damage(state)
    save(folder, state)
    assert is_sparseml_state(folder)
    with pytest.raises(ModelError, match=message) as caught:
        opened(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_a_pickle_with_more_than_tensors_is_not_run(copy_of: tuple[Path, dict[str, Tensor]]) -> None:
    folder, state = copy_of
    torch.save({**state, "hook": print}, folder / "pytorch_model.bin")
    assert not is_sparseml_state(folder)
    with pytest.raises(ModelError, match="cannot be read as a state dict of tensors"):
        opened(folder)


def test_an_index_cannot_point_out_of_the_folder(copy_of: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = copy_of
    index = {"weight_map": {"qa_outputs.module.weight_fake_quant.fake_quant_enabled": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no index of shards"):
        opened(folder)


def test_a_missing_shard_is_named(copy_of: tuple[Path, dict[str, Tensor]]) -> None:
    folder, state = copy_of
    LAYOUTS["shards of .safetensors"](folder, state)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors"):
        opened(folder)


GRIDS = [(bits, symmetric, signed) for bits in range(2, 9) for symmetric in (True, False) for signed in (True, False)]


@pytest.mark.parametrize("role", ["weight", "input", "right"])
@pytest.mark.parametrize(("bits", "symmetric", "signed"), GRIDS)
def test_bits_and_sign_follow_from_scale_and_range(bits: int, symmetric: bool, signed: bool, role: str) -> None:
    """Grids of torch.ao's observer, over ranges that lie on both sides of zero, on one, or nearly symmetric."""
    low = -(2 ** (bits - 1)) if signed else 0
    settings: dict[str, Any] = {"dtype": torch.qint8 if signed else torch.quint8}
    if bits < 8:
        settings |= {"quant_min": low, "quant_max": low + 2**bits - 1}
    settings["qscheme"] = SYMMETRIC if symmetric else AFFINE
    for first, last in ((-0.3, 2.0), (-2.0, 0.3), (0.0, 1.0), (-1.0, 1.004), (-5.0, -1.0)):
        quantizer = fake_quantizer(settings)
        quantizer(torch.tensor([first, last]))
        observer = quantizer.activation_post_process
        numbers = (quantizer.scale, quantizer.zero_point, observer.min_val, observer.max_val)
        one = FakeQuantized("x", "x", role, *(number.reshape(()) for number in numbers))
        spec, deviation = grid_of(one)
        assert (spec.bits, spec.signed) == (bits, signed), (first, last)
        assert deviation == 0.0


def test_a_wrapped_layer_and_a_bare_one_have_the_same_plain_name(tutorial: tuple[Path, nn.Module]) -> None:
    state = tutorial[1].state_dict()
    bare = {name.replace("qa_outputs.module.", "qa_outputs."): value for name, value in state.items()}
    plain, quantized, _ = split_state(state)
    plain_of_bare, quantized_of_bare, _ = split_state(bare)
    assert set(plain) == set(plain_of_bare)
    assert {(one.module, one.role) for one in quantized} == {(one.module, one.role) for one in quantized_of_bare}
