"""What is trained in a benchmark: named workloads, and the settings of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from sparse_accel.benchmarking.heads import MASKED_LANGUAGE_MODELING, QUESTION_ANSWERING, TEXT_CLASSIFICATION
from sparse_accel.errors import OptionError, suggestion

BATCHINGS: Final = ("packed", "grouped", "padded")
PRECISIONS: Final = ("fp32", "bf16")


@dataclass(frozen=True)
class Workload:
    """A model shape, the task of its head, a histogram of lengths (None: all features have `max_length`), and how many features
    make a micro-batch, a step and a turn.

    `processes` over 1 means that as many are started, and that what they send is counted.
    """

    name: str
    purpose: str
    shape: str
    lengths: str | None = "squad_v1"
    max_length: int = 384
    micro_batch_size: int = 8
    micro_batches: int = 1
    features: int = 64
    sparsity: float = 0.9
    arms: tuple[str, ...] = ()
    precision: str = "fp32"
    processes: int = 1
    task: str = QUESTION_ANSWERING


_OURS = (
    "dense",
    "dense_again",
    "dense_padded",
    "dense_grouped",
    "mask",
    "kd_live",
    "kd_cached",
    "qat_observing",
    "qat_frozen",
)
_RECIPE = ("sparse_kd", "recipe", "recipe_frozen", "recipe_fused")
_TOOLS = ("nncf", "modelopt")
_BASELINES = ("b1", "b2", *_TOOLS)
_OURS_ON_GPU = (*_OURS, "dense_compiled", "mask_compiled", *_RECIPE)
_ON_GPU = (*_OURS_ON_GPU, "b1", "b1_teacher", "b2", "b2_bf16", "b3", *_TOOLS)
# No teacher's answers are kept where features are masked anew in every epoch; all features are as long, so there is no grouping.
_MASKED = (
    "dense",
    "dense_again",
    "dense_padded",
    "mask",
    "kd_live",
    "qat_observing",
    "qat_frozen",
    "recipe_live",
    "b1",
)

_ALL = (
    Workload(
        "tiny-ci",
        "every arm on a model of 2 layers, in seconds: counts, not speed",
        "tiny",
        max_length=128,
        micro_batch_size=4,
        micro_batches=2,
        features=16,
        arms=(*_OURS, *_RECIPE, *_BASELINES),
    ),
    Workload(
        "mini-cpu",
        "ratios on a processor: MiniLM's shape (6 layers, 384 wide), SQuAD's lengths",
        "minilm",
        micro_batch_size=4,
        micro_batches=2,
        features=32,
        arms=(*_OURS, *_RECIPE, *_BASELINES),
    ),
    Workload(
        "squad-base",
        "the headline: BERT-base on SQuAD's lengths, teacher of the same size",
        "bert_base",
        micro_batch_size=32,
        features=1024,
        precision="bf16",
        arms=_ON_GPU,
    ),
    Workload(
        "squad-large",
        "BERT-large on SQuAD's lengths, teacher of the same size",
        "bert_large",
        micro_batch_size=32,
        features=512,
        precision="bf16",
        arms=_ON_GPU,
    ),
    Workload(
        "mnli-base",
        "short sequences, bound by launches: BERT-base classifies texts of MultiNLI's lengths at 128",
        "bert_base",
        lengths="mnli",
        max_length=128,
        micro_batch_size=32,
        features=2048,
        precision="bf16",
        arms=(*_OURS_ON_GPU, "b1", "b1_teacher"),
        task=TEXT_CLASSIFICATION,
    ),
    Workload(
        "tiny-mlm",
        "masked language modelling on a model of 2 layers, in seconds: counts, not speed",
        "tiny",
        lengths=None,
        max_length=128,
        micro_batch_size=4,
        micro_batches=2,
        features=16,
        arms=_MASKED,
        task=MASKED_LANGUAGE_MODELING,
    ),
    Workload(
        "mlm-base",
        "the upstream stage: BERT-base guesses masked words of running text in chunks of 512, distilled over the teacher's 32 largest"
        " logits",
        "bert_base",
        lengths=None,
        max_length=512,
        micro_batch_size=32,
        features=512,
        precision="bf16",
        arms=(*_MASKED[:-1], "dense_compiled", "mask_compiled", "b1", "b1_teacher"),
        task=MASKED_LANGUAGE_MODELING,
    ),
)
WORKLOADS: Final[Mapping[str, Workload]] = {workload.name: workload for workload in _ALL}

# scale-N: each of N processes does the work that one does alone.
_SCALING: Final = re.compile(r"scale-([1-9]\d*)")
_SCALE = Workload(
    "scale-N",
    "N processes, each with the work that one has alone: efficiency, and the bytes that they exchange",
    "minilm",
    micro_batch_size=4,
    micro_batches=2,
    features=32,
    arms=("dense", "dense_alone", "mask", "mask_alone"),
)

# What is measured without training a model: benchmarking.eval_qa.
EVALUATION: Final = "eval-qa"
_EVALUATION_PURPOSE: Final = "no training: windows and answers of question answering against Hugging Face's, and scores"


@dataclass(frozen=True)
class Settings:
    """A run: a workload with what the person changed of it."""

    workload: Workload
    arms: tuple[str, ...]
    rounds: int
    precision: str
    batching: str
    threads: int
    seed: int = 0

    @property
    def features_per_step(self) -> int:
        """Features of one optimizer step in one process."""
        return self.workload.micro_batch_size * self.workload.micro_batches

    @property
    def steps(self) -> int:
        """Optimizer steps in a turn."""
        return self.workload.features // self.features_per_step


def find_workload(name: str) -> Workload:
    """The training workload called `name`; raises OptionError for one that is unknown."""
    scaled = _SCALING.fullmatch(name)
    if scaled:
        return replace(_SCALE, name=name, processes=int(scaled[1]))
    if name not in WORKLOADS:
        raise OptionError(f"{name!r}: no such workload{suggestion(name, [*WORKLOADS, 'scale-2', EVALUATION])}")
    return WORKLOADS[name]


def listed() -> dict[str, str]:
    """Every workload, and what it is for."""
    trained = {**WORKLOADS, _SCALE.name: _SCALE}
    return {**{name: workload.purpose for name, workload in trained.items()}, EVALUATION: _EVALUATION_PURPOSE}
