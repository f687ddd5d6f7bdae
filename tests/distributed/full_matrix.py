"""Every way of training against one process, written to full_matrix.json and docs/distributed.md:
`python tests/distributed/full_matrix.py [--only fsdp2,zero3]`.

A tiny model with SGD and without dropout, so that runs can be compared number by number. An epoch's last step has one
feature, so that the second process has none. Each run checks after every step that zeros, masks and ranges are what they
were and the same on both processes, and ends with another exit code than 0 otherwise, which ends this script.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from tests import running  # noqa: E402
from tests.distributed.launching import launch  # noqa: E402

JSON = Path(__file__).with_suffix(".json")
DOCUMENT = ROOT / "docs/distributed.md"
COMMAND = "python tests/distributed/full_matrix.py"
BLOCK = re.compile(rf"(?<=<!-- matrix: {re.escape(COMMAND)} -->\n).*?(?=<!-- /matrix -->\n)", re.DOTALL)

BACKENDS = {"ddp": "DDP", "fsdp2": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
_QUANTIZED = {"recipe": "question_answering/pruned_quant", "recipe_args": running.QUANT_ARGS.replace("1e-3", "0.1")}
RECIPES: dict[str, dict[str, Any]] = {
    "mask": {
        "recipe": "question_answering/pruned",
        "recipe_args": '{"num_epochs": 3, "init_lr": 0.1}',
        "distill_teacher": "disable",
    },
    "mask, QAT": {**_QUANTIZED, "distill_teacher": "disable"},
    "mask, QAT, distillation": _QUANTIZED,
}
# Clipping scales with a norm, and a norm over the kept weights alone is summed in another order: off where bits count.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"max_grad_norm": 0},
    "bf16": {"max_grad_norm": 1.0, "bf16": True},
}
STORAGES = ("masked", "compact")
PACKAGES = ("torch", "accelerate", "deepspeed")


@dataclass(frozen=True)
class Row:
    """One backend with one precision and recipe. Differences are the largest in absolute value: of weights, of scales (0
    where nothing is quantized) and of the loss at any step to one process, by storage; of all tensors between the storages.
    `moved` is how far training took any weight from the student's."""

    backend: str
    precision: str
    recipe: str
    moved: float
    weights: dict[str, float]
    scales: dict[str, float]
    loss: dict[str, float]
    compact_to_masked: float
    revived: int


def measure(backend: str, precision: str, world: dict[str, Any], alone: Path, folder: Path) -> list[Row]:
    """All recipes and storages in one launch."""
    folder.mkdir()
    commands = [
        running.command(
            world | RECIPES[recipe] | PRECISIONS[precision],
            _folder(folder, recipe, storage),
            sparse_storage=storage,
            gradient_accumulation_steps=1,
            check_sparsity_every=1,
        )
        for recipe in RECIPES
        for storage in STORAGES
    ]
    launch(backend, commands, folder, timeout=1200)
    student = load_file(Path(world["model_name_or_path"]) / "model.safetensors")
    rows = []
    for recipe in RECIPES:
        one = _folder(alone, f"{recipe}, {precision}", "masked")
        two = {storage: _folder(folder, recipe, storage) for storage in STORAGES}
        rows.append(
            Row(
                backend,
                precision,
                recipe,
                moved=difference(student, weights(one)),
                weights={storage: difference(weights(one), weights(ours)) for storage, ours in two.items()},
                scales={storage: difference(scales(one), scales(ours)) for storage, ours in two.items()},
                loss={storage: difference(losses(one), losses(ours)) for storage, ours in two.items()},
                compact_to_masked=running.largest_difference(two["masked"], two["compact"]),
                revived=sum(num_revived(student, ours) for ours in two.values()),
            )
        )
    return rows


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest in absolute value."""
    assert one.keys() == other.keys()
    return max((float((one[name] - other[name]).abs().max()) for name in one), default=0.0)


def weights(folder: Path) -> dict[str, Tensor]:
    """All that a run trained."""
    return load_file(folder / "model.safetensors")


def scales(folder: Path) -> dict[str, Tensor]:
    """Of all quantizers."""
    return {name: tensor for name, tensor in running.tensors(folder).items() if name.endswith("scale")}


def losses(folder: Path) -> dict[str, Tensor]:
    """By step."""
    return {str(line["step"]): torch.tensor(line["loss"], dtype=torch.float64) for line in running.log(folder)}


def num_revived(student: dict[str, Tensor], folder: Path) -> int:
    """Weights of the encoder that were zero in the student and are not in what a run saved."""
    trained = weights(folder)
    pruned = [name for name, tensor in student.items() if ".layer." in name and tensor.dim() == 2]
    return sum(int(((student[name] == 0) & (trained[name] != 0)).sum()) for name in pruned)


def _folder(parent: Path, recipe: str, storage: str) -> Path:
    return parent / f"{recipe}, {storage}".replace(", ", "_")


def measure_all(backends: list[str]) -> None:
    """One process first, in this one, then each backend with each precision; all with one thread. Writes after each
    backend."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = running.tiny_world(folder / "world", rows=49, dropout=0.0) | {"optim": "sgd", "do_eval": None}
        for precision, flags in PRECISIONS.items():
            for recipe, options in RECIPES.items():
                output = _folder(folder / "alone", f"{recipe}, {precision}", "masked")
                running.run(world | options | flags, output, sparse_storage="masked", use_cpu=True)
        for backend in backends:
            rows = []
            for precision in PRECISIONS:
                rows += measure(backend, precision, world, folder / "alone", folder / f"{backend}_{precision}")
            print(*rows, sep="\n", flush=True)
            write(backend, rows)


def versions() -> dict[str, str]:
    """Of what did the work."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def table(document: dict[str, Any]) -> str:
    """The text between the markers."""
    installed = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines = [
        f"Two processes joined by gloo against one; {installed}.",
        "",
        "| backend | precision | recipe | moved | weights | scales | loss | compact to masked | revived |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in (Row(**row) for row in document["rows"]):
        by_storage = [_both(row.weights), _both(row.scales) if "QAT" in row.recipe else "", _both(row.loss)]
        numbers = [_number(row.moved), *by_storage, _number(row.compact_to_masked), str(row.revived)]
        lines.append(f"| {' | '.join([BACKENDS[row.backend], row.precision, row.recipe, *numbers])} |")
    return "\n".join(lines) + "\n"


def _both(by_storage: dict[str, float]) -> str:
    return " / ".join(dict.fromkeys(_number(by_storage[storage]) for storage in STORAGES))


def _number(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def write(backend: str, rows: list[Row]) -> None:
    """Put a backend's rows into the committed result and the table into the document. Rows of other versions go."""
    before = json.loads(JSON.read_text("utf-8")) if JSON.is_file() else {}
    kept = before["rows"] if before.get("versions") == versions() else []
    kept = [row for row in kept if row["backend"] != backend]
    order = list(BACKENDS)
    everything = sorted([*kept, *map(asdict, rows)], key=lambda row: order.index(row["backend"]))
    document = {"command": COMMAND, "versions": versions(), "rows": everything}
    JSON.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    DOCUMENT.write_text(BLOCK.sub(lambda _: table(document), DOCUMENT.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(BACKENDS), help="backends, with commas between them")
    chosen = parser.parse_args().only.split(",")
    if unknown := sorted({*chosen} - {*BACKENDS}):
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(BACKENDS)}")
    measure_all(chosen)
