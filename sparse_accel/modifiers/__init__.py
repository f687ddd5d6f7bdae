"""The table of modifiers: what a `!Tag` in a recipe stands for."""

from __future__ import annotations

from sparse_accel.modifiers.base import Modifier
from sparse_accel.modifiers.constant_pruning import ConstantPruningModifier
from sparse_accel.modifiers.distillation import DistillationModifier
from sparse_accel.modifiers.epoch_range import EpochRangeModifier
from sparse_accel.modifiers.gradual_pruning import (
    GlobalMagnitudePruningModifier,
    GMPruningModifier,
    MagnitudePruningModifier,
)
from sparse_accel.modifiers.learning_rate import LearningRateFunctionModifier, SetLearningRateModifier
from sparse_accel.modifiers.quantization import QuantizationModifier
from sparse_accel.modifiers.trainable_params import TrainableParamsModifier
from sparse_accel.modifiers.weight_decay import SetWeightDecayModifier

MODIFIERS: dict[str, type[Modifier]] = {
    "ConstantPruningModifier": ConstantPruningModifier,
    "DistillationModifier": DistillationModifier,
    "EpochRangeModifier": EpochRangeModifier,
    "GMPruningModifier": GMPruningModifier,
    "GlobalMagnitudePruningModifier": GlobalMagnitudePruningModifier,
    "LearningRateFunctionModifier": LearningRateFunctionModifier,
    "MagnitudePruningModifier": MagnitudePruningModifier,
    "QuantizationModifier": QuantizationModifier,
    "SetLearningRateModifier": SetLearningRateModifier,
    "SetWeightDecayModifier": SetWeightDecayModifier,
    "TrainableParamsModifier": TrainableParamsModifier,
}

_BY_MAGNITUDE = (
    "use MagnitudePruningModifier, or prune the model beforehand with 'sparse_accel prune MODEL --sparsity S' and hold its zeros "
    "with ConstantPruningModifier"
)
_STRUCTURE = "removing structure is not offered: start from a model of the shape that you want"
_SESSION_API = "it belongs to SparseML's session API: "

# SparseML's modifiers that are known and not offered: name -> what to use instead.
REFUSED: dict[str, str] = {
    "ACDCPruningModifier": _BY_MAGNITUDE,
    "MFACPruningModifier": _BY_MAGNITUDE,
    "MovementPruningModifier": _BY_MAGNITUDE,
    "OBSPruningModifier": _BY_MAGNITUDE,
    "PowerpropagationModifier": _BY_MAGNITUDE,
    "RigLPruningModifier": _BY_MAGNITUDE,
    "TopKASTPruningModifier": _BY_MAGNITUDE,
    "ASReg": "regularizing activations is not offered: leave it out",
    "LayerPruningModifier": _STRUCTURE,
    "LayerThinningModifier": _STRUCTURE,
    "StructuredPruningModifier": _STRUCTURE,
    "PerLayerDistillationModifier": "use DistillationModifier, which compares the outputs of student and teacher",
    "LearningRateModifier": "use LearningRateFunctionModifier, or one SetLearningRateModifier for each level",
    "SetParamModifier": "setting parameters is not offered: change the model's weights before training",
    "GradualParamModifier": "setting parameters is not offered: change the model's weights before training",
    "SparsificationLoggingModifier": "leave it out: sparsity is checked in training and reported at the end without it",
    "ConstantPruning": _SESSION_API + "use ConstantPruningModifier",
    "GPTQModifier": _SESSION_API + "use QuantizationModifier",
    "LegacyQuantizationModifier": _SESSION_API + "use QuantizationModifier",
    "LogarithmicEqualizationModifier": _SESSION_API + "use QuantizationModifier",
    "OutputDistillationModifier": _SESSION_API + "use DistillationModifier",
    "SmoothQuantModifier": _SESSION_API + "use QuantizationModifier",
    "SparseGPTModifier": _SESSION_API + _BY_MAGNITUDE,
    "WandaPruningModifier": _SESSION_API + _BY_MAGNITUDE,
}
