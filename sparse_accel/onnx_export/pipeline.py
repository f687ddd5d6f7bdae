"""The passes of each graph format, in their order, as data."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from sparse_accel.onnx_export.passes.fold_scaling import FoldScaling
from sparse_accel.onnx_export.passes.fold_weights import FoldWeights
from sparse_accel.onnx_export.passes.gemm_to_matmul import GemmToMatMul
from sparse_accel.onnx_export.passes.integer_products import IntegerProducts
from sparse_accel.onnx_export.passes.quantize_gemm_bias import QuantizeGemmBias
from sparse_accel.onnx_export.passes.share_quantize import ShareQuantize
from sparse_accel.onnx_export.passes.simplify import Simplify
from sparse_accel.onnx_export.passes.sum_residuals import SumResiduals
from sparse_accel.onnx_export.passes.transpose_weights import TransposeWeights

# qdq: integers between QuantizeLinear and DequantizeLinear, which ONNX Runtime and OpenVINO turn into integer kernels.
# integer: the products spelled out as MatMulInteger. float: no quantizers, and nothing that is for the sake of CPUs: WebGPU,
# where float graphs run too, has no kernel for Sum.
PIPELINES: Final[dict[str, tuple[type[ir.passes.InPlacePass], ...]]] = {
    "qdq": (
        FoldWeights,
        Simplify,
        TransposeWeights,
        ShareQuantize,
        FoldScaling,
        QuantizeGemmBias,
        SumResiduals,
        Simplify,
    ),
    "integer": (
        FoldWeights,
        Simplify,
        GemmToMatMul,
        TransposeWeights,
        ShareQuantize,
        FoldScaling,
        IntegerProducts,
        SumResiduals,
        Simplify,
    ),
    "float": (Simplify, TransposeWeights, Simplify),
}


def run_passes(model: ir.Model, graph_format: str) -> None:
    """Change `model` in place into one of PIPELINES' formats. Raises onnx_ir's PassError naming the pass whose condition
    does not hold."""
    for step in PIPELINES[graph_format]:
        step()(model)
