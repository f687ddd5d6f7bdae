"""The graph library's own clean-up: constants folded, duplicates and identities gone, what nothing reads removed."""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)


class Simplify(ir.passes.InPlacePass):
    """onnxscript's optimizer, which leaves QuantizeLinear and DequantizeLinear alone, then onnx_ir's clean-up.

    Before: any graph. After: no node is unused, and every initializer is read.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        onnxscript.optimizer.optimize(model)
        clean = ir.passes.Sequential(
            IdentityEliminationPass(),
            CommonSubexpressionEliminationPass(),
            LiftConstantsToInitializersPass(lift_all_constants=False),
            RemoveUnusedNodesPass(),
            RemoveUnusedOpsetsPass(),
            # The exporter notes which line of which file on this machine each node is from.
            ClearMetadataAndDocStringPass(),
        )
        clean(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        unread = [
            name for name, value in model.graph.initializers.items() if not value.uses() and not value.is_graph_output()
        ]
        if unread:
            raise ir.passes.PostconditionError(f"initializers that nothing reads: {unread[:3]}")
