"""Compressed weights: what the file holds by its documented layout, that nothing is lost, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, BertConfig, BertForMaskedLM
from typer.testing import CliRunner

from sparse_accel.cli.decompress_command import register
from sparse_accel.compress.fakequant import QuantSpec, fake_quantize
from sparse_accel.compress.plan import CompressionPlan, install, needs_quantized_attention, quantization_state
from sparse_accel.compress.ranges import calibrating, end_step
from sparse_accel.errors import ModelError, OutputError
from sparse_accel.folders.bitmask import pack, packed_bytes, unpack
from sparse_accel.folders.storage import (
    COMPRESSED_FILE,
    Kind,
    StorageReport,
    compress_folder,
    decompress_folder,
    is_compressed,
    load,
    read_compressed,
    write_compressed,
)
from sparse_accel.folders.trained import PLAN_FILE, RANGES_FILE, open_trained, use_own_attention
from sparse_accel.runtime.prune import prune
from sparse_accel.tasks import resolve_task
from tests.tiny import tiny_bert
from tests.unit.qat_bert import alone, batch, tutorial_plan

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
INT8 = QuantSpec(symmetric=True, signed=True)
METADATA = "sparse_accel_compressed"


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal dtype, shape and bits: for torch.equal -0.0 is 0.0 and NaN is nothing."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    integers = INTEGERS[one.itemsize]
    return torch.equal(one.contiguous().view(-1).view(integers), other.contiguous().view(-1).view(integers))


def sparse(*shape: int, sparsity: float = 0.9, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of which the share `sparsity`, rounded, is +0.0 at random places."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).flatten()
    tensor[torch.randperm(tensor.numel(), generator=generator)[: round(sparsity * tensor.numel())]] = 0.0
    return tensor.reshape(shape).to(dtype)


def numbers(module: str, weight: Tensor, scale: Tensor, zero_point: Tensor) -> dict[str, Tensor]:
    """The range of a weight as a quantization file has it."""
    values = {"min_val": weight.min(), "max_val": weight.max(), "scale": scale, "zero_point": zero_point.int()}
    return {f"{module}.weight_quantizer.{key}": value.expand(scale.shape).clone() for key, value in values.items()}


def planned(spec: QuantSpec, *modules: str) -> CompressionPlan:
    plan = CompressionPlan()
    for module in modules:
        plan.add_quantization(module, spec)
    return plan


def write(folder: Path, state: dict[str, Tensor], *arguments: Any, **options: Any) -> dict[str, Tensor]:
    """Write the state to the folder's compressed file and read it back."""
    folder.mkdir(exist_ok=True)
    write_compressed(state, folder / COMPRESSED_FILE, *arguments, **options)
    return read_compressed(folder)


def entries(folder: Path) -> dict[str, Any]:
    """The metadata's entry of each tensor."""
    with safe_open(folder / COMPRESSED_FILE, framework="pt") as file:
        document = json.loads(file.metadata()[METADATA])
    assert document["version"] == 1
    return dict(document["tensors"])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(
    numbers=st.lists(st.sampled_from([0, 0, 0, 0x8000, 1, 0x7FC1, 0xFFC1, 0x3F80, 0xBF80]), max_size=70),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    signs=st.booleans(),
)
def test_packing_keeps_every_bit_pattern(numbers: list[int], dtype: torch.dtype, signs: bool) -> None:
    tensor = torch.tensor(numbers, dtype=torch.int32).to(torch.int16).view(dtype)
    parts = pack(tensor, signs=signs)
    assert same_bits(unpack(tensor.shape, *parts), tensor)
    assert packed_bytes(tensor, signs=signs) == sum(part.nbytes for part in parts)
    dropped = numbers.count(0) + (numbers.count(0x8000) if signs else 0)
    assert packed_bytes(tensor, signs=signs) == (
        math.ceil(len(numbers) / 8) + 2 * (len(numbers) - dropped) + (math.ceil(dropped / 8) if signs else 0)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_floats_of_every_width_come_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"a.weight": sparse(7, 11, dtype=dtype), "b.weight": sparse(7, 11, sparsity=0.0, dtype=dtype)}
    read = write(tmp_path, state)
    assert read.keys() == state.keys()
    assert all(same_bits(read[name], state[name]) for name in state)
    kinds = [entry["kind"] for entry in entries(tmp_path).values()]
    assert kinds == ["bitmask", "dense"]


def test_negative_zeros_and_payloads_of_nans_survive(tmp_path: Path) -> None:
    weight = sparse(16, 16)
    weight[0, :4] = torch.tensor([0x7FC12345, 0x7F800001, -0x80000000, 1], dtype=torch.int32).view(torch.float32)
    assert same_bits(write(tmp_path, {"weight": weight})["weight"], weight)
    assert entries(tmp_path)["weight"]["kind"] == "bitmask"


def test_a_weight_that_was_multiplied_by_its_mask_costs_a_bit_for_each_negative_zero(tmp_path: Path) -> None:
    weight = sparse(40, 40, sparsity=0.0) * (sparse(40, 40, seed=1) != 0)
    assert torch.signbit(weight[weight == 0]).any()
    totals = write_compressed({"weight": weight}, tmp_path / COMPRESSED_FILE)
    assert totals[Kind.BITMASK_SIGNS].stored_bytes == 1600 // 8 + 4 * 160 + 1440 // 8
    assert same_bits(read_compressed(tmp_path)["weight"], weight)


def test_a_tensor_that_a_bitmask_would_not_shrink_is_stored_as_it_is(tmp_path: Path) -> None:
    """A bitmask costs one bit in 32: with fp32 it pays from one zero in 32 on."""
    even, gain = torch.ones(320), torch.ones(320)
    even[:10], gain[:11] = 0.0, 0.0
    integers = torch.zeros(320, dtype=torch.int64)
    read = write(tmp_path, {"even": even, "gain": gain, "integers": integers, "none": torch.empty(0, 3)})
    assert [entry["kind"] for entry in entries(tmp_path).values()] == ["dense", "bitmask", "dense", "dense"]
    assert torch.equal(read["integers"], integers) and read["none"].shape == (0, 3)


def test_the_file_can_be_read_by_its_description_alone(tmp_path: Path) -> None:
    """An independent reader, entry by entry, of bitmask and integers."""
    weight, table = sparse(5, 7), sparse(6, 3, seed=1)
    scale = (table.abs().amax(1) / 127.5).clamp(min=2**-23)
    plan = planned(QuantSpec(symmetric=True, signed=True, channel_axis=0), "table")
    ranges = numbers("table", table, scale, torch.zeros(6))
    write_compressed({"layer.weight": weight, "table.weight": table}, tmp_path / COMPRESSED_FILE, plan, ranges)

    raw = load_file(tmp_path / COMPRESSED_FILE)
    mask, values = raw["layer.weight/bitmask"].tolist(), iter(raw["layer.weight/values"].tolist())
    read = [next(values) if mask[i // 8] >> (i % 8) & 1 else 0.0 for i in range(35)]
    assert torch.equal(torch.tensor(read).view(5, 7), weight)

    entry = entries(tmp_path)["table.weight"]
    assert entry == {"kind": "int8_bitmask", "shape": [6, 3], "dtype": "float32", "channel_axis": 0}
    mask, values = raw["table.weight/bitmask"].tolist(), iter(raw["table.weight/values"].tolist())
    integers = [next(values) if mask[i // 8] >> (i % 8) & 1 else 0 for i in range(18)]
    for i, integer in enumerate(integers):
        steps = table.flatten()[i].double() / scale[i // 3].double()
        assert integer == max(-128, min(127, round(steps.item())))
    assert raw["table.weight/zero_point"].tolist() == [0] * 6 and torch.equal(raw["table.weight/scale"], scale)


SPECS = {
    "symmetric": (INT8, torch.tensor(0.021), torch.tensor(0)),
    "per channel": (QuantSpec(symmetric=True, signed=True, channel_axis=0), torch.linspace(0.01, 0.03, 24), None),
    "per column": (QuantSpec(symmetric=True, signed=True, channel_axis=1), torch.linspace(0.01, 0.03, 36), None),
    "affine": (QuantSpec(signed=True), torch.tensor(0.0217), torch.tensor(-37)),
    "four bits": (QuantSpec(bits=4, symmetric=True, signed=True), torch.tensor(0.4), torch.tensor(0)),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_leave_the_quantized_weight_as_it_was(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    spec, scale, zero_point = SPECS[name]
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    weight = sparse(24, 36, dtype=dtype)
    # Halves, the grid's ends, and what lies beyond them.
    step = scale if scale.dim() == 0 else scale[0]
    weight[0, :6] = (step * torch.tensor([0.5, 1.5, -2.5, 127.5, -128.5, 1e6])).to(dtype)
    read = write(tmp_path, {"m.weight": weight}, planned(spec, "m"), numbers("m", weight.float(), scale, zero_point))
    before = fake_quantize(weight.float(), scale, zero_point.int(), spec)
    assert torch.equal(read["m.weight"], before)
    assert torch.equal(fake_quantize(read["m.weight"], scale, zero_point.int(), spec), before)
    # With a zero point a zero is no integer 0: a bitmask gains nothing.
    assert entries(tmp_path)["m.weight"]["kind"] == ("int8" if name == "affine" else "int8_bitmask")


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(symmetric=True), QuantSpec(bits=10, symmetric=True, signed=True)],
    ids=["unsigned", "ten bits"],
)
def test_a_grid_that_int8_does_not_hold_leaves_the_float_weight(tmp_path: Path, spec: QuantSpec) -> None:
    weight = sparse(8, 8)
    ranges = numbers("m", weight, torch.tensor(0.02), torch.tensor(0))
    assert same_bits(write(tmp_path, {"m.weight": weight}, planned(spec, "m"), ranges)["m.weight"], weight)


def test_a_weight_that_is_not_finite_or_was_never_observed_stays_float(tmp_path: Path) -> None:
    broken, unseen = sparse(8, 8), sparse(8, 8, seed=1)
    broken[0, 0] = torch.nan
    ranges = numbers("a", torch.ones(1), torch.tensor(0.02), torch.tensor(0))
    ranges |= numbers("b", unseen, torch.tensor(1.0), torch.tensor(0))
    ranges |= {"b.weight_quantizer.min_val": torch.tensor(torch.inf)}
    state = {"a.weight": broken, "b.weight": unseen}
    read = write(tmp_path, state, planned(INT8, "a", "b"), ranges)
    assert all(same_bits(read[name], state[name]) for name in state)


def test_shared_tensors_are_stored_once_and_come_back_shared(tmp_path: Path) -> None:
    weight = sparse(40, 40)
    totals = write_compressed(
        {"table.weight": weight, "decoder.weight": weight, "view": weight.view(-1), "other": weight.clone()},
        tmp_path / COMPRESSED_FILE,
    )
    assert totals[Kind.SHARED].num_tensors == 1 and totals[Kind.SHARED].stored_bytes == 0
    read = read_compressed(tmp_path)
    assert read["decoder.weight"] is read["table.weight"]
    assert same_bits(read["view"], weight.view(-1)) and same_bits(read["other"], weight)


@pytest.mark.parametrize("quantized", [("table", "decoder"), ("table",)])
def test_a_shared_weight_becomes_integers_only_if_all_its_layers_quantize_it(
    tmp_path: Path, quantized: tuple[str, ...]
) -> None:
    weight, scale = sparse(12, 10), torch.tensor(0.03)
    ranges = {k: v for m in quantized for k, v in numbers(m, weight, scale, torch.tensor(0)).items()}
    wanted = fake_quantize(weight, scale, torch.tensor(0), INT8) if len(quantized) == 2 else weight
    read = write(tmp_path, {"table.weight": weight}, planned(INT8, *quantized), ranges, tied=[TIED])
    assert torch.equal(read["table.weight"], wanted)
    both = {"table.weight": weight, "decoder.weight": weight}
    assert torch.equal(write(tmp_path, both, planned(INT8, *quantized), ranges)["decoder.weight"], wanted)


TIED = ("table.weight", "decoder.weight")


def test_a_plan_or_ranges_of_another_model_are_refused(tmp_path: Path) -> None:
    weight = sparse(8, 8)
    ranges = numbers("layer", weight, torch.tensor(0.02), torch.tensor(0))
    with pytest.raises(ModelError, match=r"quantizes lager\.weight, which.*did you mean 'layer\.weight'"):
        write(tmp_path, {"layer.weight": weight}, planned(INT8, "lager"), ranges)
    with pytest.raises(ModelError, match=r"has no 'layer\.weight_quantizer\.min_val'"):
        write(tmp_path, {"layer.weight": weight}, planned(INT8, "layer"), {"x": weight})
    per_channel = QuantSpec(symmetric=True, signed=True, channel_axis=0)
    with pytest.raises(ModelError, match=r"has shape \[\]; layer\.weight needs \[8\]"):
        write(tmp_path, {"layer.weight": weight}, planned(per_channel, "layer"), ranges)


# Folders.


@pytest.fixture(scope="module")
def pruned(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose encoder is 80% zeros."""
    folder = tmp_path_factory.mktemp("pruned") / "model"
    prune(str(tiny_student), folder, 0.8)
    (folder / "recipe.yaml").write_text("modifiers: []\n")
    (folder / "README.md").write_text("A card.\n")
    return folder


@pytest.fixture(scope="module")
def trained(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder with the tutorial's quantizers, whose ranges a few batches moved."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shutil.copytree(pruned, folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    plan = tutorial_plan(model, masks=True)
    assert needs_quantized_attention(plan) and use_own_attention(model)
    plan.save(folder / PLAN_FILE)
    install(model, plan)
    with calibrating(model), torch.no_grad():
        for seed in range(2):
            model(**{k: v for k, v in batch(seed=seed).items() if "positions" not in k})
            end_step(model, alone)
    save_file(quantization_state(model), folder / RANGES_FILE)
    return folder


def test_a_float_folder_comes_back_as_the_same_files(pruned: Path, tmp_path: Path) -> None:
    report = compress_folder(pruned, tmp_path / "small")
    assert is_compressed(tmp_path / "small") and not is_compressed(pruned)
    assert {p.name for p in (tmp_path / "small").iterdir()} == {
        *(p.name for p in pruned.iterdir() if p.name != "model.safetensors"),
        COMPRESSED_FILE,
    }
    back = decompress_folder(tmp_path / "small", tmp_path / "back")
    assert files(tmp_path / "back") == files(pruned)
    assert report.bytes_before == back.bytes_after == (pruned / "model.safetensors").stat().st_size
    assert report.bytes_after == back.bytes_before == (tmp_path / "small" / COMPRESSED_FILE).stat().st_size
    assert (tmp_path / "small" / COMPRESSED_FILE).stat().st_mode == (pruned / "config.json").stat().st_mode


def test_the_bytes_are_those_of_the_formula(pruned: Path, tmp_path: Path) -> None:
    report = compress_folder(pruned, tmp_path / "small")
    expected = 0
    for tensor in load_file(pruned / "model.safetensors").values():
        size, count = tensor.numel(), int(torch.count_nonzero(tensor))
        expected += min(4 * size, math.ceil(size / 8) + 4 * count)
    assert sum(total.stored_bytes for total in report.kinds.values()) == expected
    header = int.from_bytes((tmp_path / "small" / COMPRESSED_FILE).read_bytes()[:8], "little")
    assert report.bytes_after == expected + 8 + header
    assert sum(total.plain_bytes for total in report.kinds.values()) == sum(
        tensor.nbytes for tensor in load_file(pruned / "model.safetensors").values()
    )


def test_integers_of_a_trained_folder_take_a_byte_for_each_weight_that_is_left(trained: Path, tmp_path: Path) -> None:
    report = compress_folder(trained, tmp_path / "small")
    plan = CompressionPlan.load(trained / PLAN_FILE)
    quantized = [name for name, c in plan.modules.items() if c.weight is not None]
    assert "bert.embeddings.word_embeddings" in quantized
    stored = sum(report.kinds[kind].stored_bytes for kind in (Kind.INT8, Kind.INT8_BITMASK))
    ranges, state = load_file(trained / RANGES_FILE), load_file(trained / "model.safetensors")
    expected = 0
    for name in quantized:
        weight, scale = state[f"{name}.weight"].double(), ranges[f"{name}.weight_quantizer.scale"].double()
        left = int(torch.count_nonzero(torch.round(weight / scale)))
        expected += min(weight.numel(), math.ceil(weight.numel() / 8) + left) + 8
    assert stored == expected


def test_a_decompressed_folder_opens_as_it_was_trained(trained: Path, tmp_path: Path) -> None:
    compress_folder(trained, tmp_path / "small")
    decompress_folder(tmp_path / "small", tmp_path / "back")
    task = resolve_task("question_answering")
    features = {k: v for k, v in batch(seed=9).items() if "positions" not in k}
    with torch.no_grad():
        before = open_trained(trained, task).model(**features)
        after = open_trained(tmp_path / "back", task).model(**features)
    assert torch.equal(before.start_logits, after.start_logits)
    assert torch.equal(before.end_logits, after.end_logits)
    # Not only since the quantizers hide it: the stored weights did change.
    plain, back = load_file(trained / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert any(not torch.equal(plain[name], back[name]) for name in plain)


def test_compressing_what_was_decompressed_gives_the_same_file(trained: Path, tmp_path: Path) -> None:
    compress_folder(trained, tmp_path / "small")
    decompress_folder(tmp_path / "small", tmp_path / "back")
    compress_folder(tmp_path / "back", tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "small")


def test_a_plan_whose_quantization_had_not_begun_compresses_floats(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "early", ignore=shutil.ignore_patterns(RANGES_FILE))
    assert not compress_folder(tmp_path / "early", tmp_path / "small").kinds.keys() & {Kind.INT8, Kind.INT8_BITMASK}


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra", "albert"])
def test_load_opens_compressed_and_plain_folders_alike(tmp_path: Path, kind: str) -> None:
    plain = tiny_bert(tmp_path / "plain", kind=kind)
    compress_folder(plain, tmp_path / "small")
    before, after = load(plain), load(tmp_path / "small")
    assert type(before) is type(after) and type(after).__name__.endswith("ForQuestionAnswering")
    assert not after.training
    for (name, one), (other_name, other) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert name == other_name and same_bits(one, other)
    assert not (tmp_path / "small" / "model.safetensors").exists()


def test_load_hands_options_to_transformers(pruned: Path, tmp_path: Path) -> None:
    compress_folder(pruned, tmp_path / "small")
    model = load(tmp_path / "small", dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"


def test_load_says_which_weights_a_folder_lacks(pruned: Path, tmp_path: Path) -> None:
    compress_folder(pruned, tmp_path / "small")
    state = read_compressed(tmp_path / "small")
    del state["qa_outputs.weight"]
    write_compressed(state, tmp_path / "small" / COMPRESSED_FILE)
    with pytest.raises(ModelError, match=r"missing keys of BertForQuestionAnswering: \['qa_outputs.weight'\]"):
        load(tmp_path / "small")


def masked_lm(folder: Path) -> BertForMaskedLM:
    """A language model whose decoder is its embedding table, saved in the folder."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
    )
    model = BertForMaskedLM(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_tied_decoder_that_is_not_quantized_keeps_its_table_float(tmp_path: Path) -> None:
    model = masked_lm(tmp_path / "plain")
    table = model.bert.embeddings.word_embeddings.weight.detach()
    module = "bert.embeddings.word_embeddings"
    planned(INT8, module).save(tmp_path / "plain" / PLAN_FILE)
    save_file(numbers(module, table, table.abs().max() / 127.5, torch.tensor(0)), tmp_path / "plain" / RANGES_FILE)
    compress_folder(tmp_path / "plain", tmp_path / "small")
    loaded = load(tmp_path / "small")
    assert same_bits(loaded.get_output_embeddings().weight, table)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_pickled_weights_are_read_and_their_sharing_is_kept(tmp_path: Path) -> None:
    model = masked_lm(tmp_path / "plain")
    (tmp_path / "plain" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "plain" / "pytorch_model.bin")
    report = compress_folder(tmp_path / "plain", tmp_path / "small")
    assert report.kinds[Kind.SHARED].num_tensors == 2  # the table and the decoder's bias
    assert not (tmp_path / "small" / "pytorch_model.bin").exists()
    decompress_folder(tmp_path / "small", tmp_path / "back")
    for name, tensor in load(tmp_path / "back").state_dict().items():
        assert same_bits(tensor, model.state_dict()[name]), name


def test_shards_are_read(pruned: Path, tmp_path: Path) -> None:
    load(pruned).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    report = compress_folder(tmp_path / "shards", tmp_path / "small")
    state = read_compressed(tmp_path / "small")
    for name, tensor in load_file(pruned / "model.safetensors").items():
        assert same_bits(state[name], tensor)
    assert report.bytes_before == sum(p.stat().st_size for p in (tmp_path / "shards").glob("*.safetensors"))
    assert {p.name for p in (tmp_path / "small").iterdir()} == {"config.json", COMPRESSED_FILE}


# What is refused.


def rewritten(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """The compressed folder with its parts and its metadata changed."""
    path = folder / COMPRESSED_FILE
    parts = load_file(path)
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()[METADATA])
    change(parts, document)
    save_file({name: part.clone() for name, part in parts.items()}, path, metadata={METADATA: json.dumps(document)})
    return folder


def _flip(parts: dict[str, Tensor], document: dict[str, Any]) -> None:
    parts["w/bitmask"][3] ^= 16


def _shorten(parts: dict[str, Tensor], document: dict[str, Any]) -> None:
    parts["w/bitmask"] = parts["w/bitmask"][:-1]


def _run_over(parts: dict[str, Tensor], document: dict[str, Any]) -> None:
    parts["w/bitmask"][-1] |= 128


def _drop(parts: dict[str, Tensor], document: dict[str, Any]) -> None:
    del parts["w/values"]


def _widen(parts: dict[str, Tensor], document: dict[str, Any]) -> None:
    parts["w/values"] = parts["w/values"].double()


def _spoil(**fields: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(parts: dict[str, Tensor], document: dict[str, Any]) -> None:
        document["tensors"]["w"] |= fields

    return change


def _scale(parts: dict[str, Tensor], document: dict[str, Any]) -> None:
    parts["q.weight/scale"] = parts["q.weight/scale"].expand(2)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], None], str]] = {
    "wrong popcount": (_flip, "tensor w: its bitmask marks .* entries, but 10 values are stored"),
    "short bitmask": (_shorten, r"tensor w: its bitmask is torch.uint8 \[12\], where 99 bits are uint8 \[13\]"),
    "marks beyond the end": (_run_over, "tensor w: its bitmask has marks beyond the end"),
    "a part is gone": (_drop, "tensor w: the file lacks 'w/values'"),
    "another dtype": (_widen, "tensor w: it is torch.float64 .*, where the metadata say torch.float32"),
    "another shape": (_spoil(shape=[9, 12]), "tensor w: its bitmask"),
    "a shape that is none": (_spoil(shape=[9, -11]), r"tensor w: its shape is \[9, -11\]"),
    "an unknown kind": (_spoil(kind="zip"), "tensor w: its kind is 'zip'; known: dense, bitmask"),
    "an unknown dtype": (_spoil(dtype="nn"), "tensor w: its dtype is 'nn'"),
    "shared with nothing": (_spoil(kind="shared", shared_with="v"), "tensor w: it is shared with 'v'"),
    "an axis that is none": (_spoil(channel_axis=2), "tensor w: its channel_axis is 2"),
    "a scale too many": (_scale, r"tensor q.weight: .*its scale \[2\]"),
    "a newer version": (lambda parts, document: document.update(version=2), "version 2 .*use a newer one"),
    "no known version": (lambda parts, document: document.update(version="x"), "unknown version of the format: 'x'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_the_tensors_name(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    weight = sparse(9, 11)
    ranges = numbers("q", weight, torch.tensor(0.02), torch.tensor(0))
    write(tmp_path / "small", {"w": weight, "q.weight": weight.clone()}, planned(INT8, "q"), ranges)
    rewritten(tmp_path / "small", change)
    with pytest.raises(ModelError, match=message):
        read_compressed(tmp_path / "small")


def test_a_file_that_was_cut_off_or_is_another_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "small", {"w": sparse(9, 11)})
    path = tmp_path / "small" / COMPRESSED_FILE
    whole = path.read_bytes()
    for length in (len(whole) - 1, 100, 4, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="is damaged or cut off"):
            read_compressed(tmp_path / "small")
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ModelError, match="not one of compressed weights"):
        read_compressed(tmp_path / "small")


def test_a_bad_command_leaves_everything_as_it_was(pruned: Path, tmp_path: Path) -> None:
    compress_folder(pruned, tmp_path / "small")
    before = files(tmp_path / "small")
    (tmp_path / "file").write_text("")
    refused: list[tuple[Callable[..., StorageReport], Path, Path, type[Exception], str]] = [
        (compress_folder, tmp_path / "smalll", tmp_path / "out", ModelError, "no such folder.*did you mean 'small'"),
        (compress_folder, tmp_path / "small", tmp_path / "out", ModelError, "is compressed already"),
        (decompress_folder, pruned, tmp_path / "out", ModelError, r"plain already \(model.safetensors\)"),
        (decompress_folder, pruned.parent, tmp_path / "out", ModelError, "holds no model.compressed.safetensors"),
        (decompress_folder, tmp_path / "file", tmp_path / "out", ModelError, "is a file; expected a model folder"),
        (decompress_folder, tmp_path / "small", tmp_path / "file", OutputError, "is a file, not a folder"),
        (decompress_folder, tmp_path / "small", tmp_path / "small", OutputError, "the model's own folder"),
        (decompress_folder, tmp_path / "small", tmp_path / "file" / "out", OutputError, "cannot be written"),
        (compress_folder, pruned, tmp_path / "small", OutputError, "is not empty.*--overwrite"),
    ]
    for act, source, output, error, message in refused:
        with pytest.raises(error, match=message):
            act(source, output)
    assert files(tmp_path / "small") == before
    assert {path.name for path in tmp_path.iterdir()} == {"small", "file"}


def test_a_damaged_source_leaves_no_folder_behind(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "plain")
    path = tmp_path / "plain" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        compress_folder(tmp_path / "plain", tmp_path / "small")
    assert {p.name for p in tmp_path.iterdir()} == {"plain"}


def test_overwriting_takes_an_earlier_models_weights_and_ranges_away(
    pruned: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    compress_folder(pruned, tmp_path / "out", overwrite=True)
    assert is_compressed(tmp_path / "out")
    assert not (tmp_path / "out" / RANGES_FILE).exists() and not (tmp_path / "out" / PLAN_FILE).exists()
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_the_command_unpacks_a_folder_and_says_what_it_takes(pruned: Path, tmp_path: Path) -> None:
    compress_folder(pruned, tmp_path / "small")
    app = typer.Typer()
    register(app)
    words = [str(tmp_path / "small"), "--output_dir", str(tmp_path / "back")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "back") == files(pruned)
    before, after = (tmp_path / "small" / COMPRESSED_FILE), (tmp_path / "back" / "model.safetensors")
    assert f"{before.stat().st_size / 1e6:.1f} MB -> {after.stat().st_size / 1e6:.1f} MB" in result.output
    assert "bitmask" in result.output and "dense" in result.output
    assert isinstance(CliRunner().invoke(app, words).exception, OutputError)
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0
