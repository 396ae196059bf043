"""Graph passes, as one visible list.

Flows in: a freshly traced graph whose weights have no values yet, so that no pass can fold a weight into a copy. Flows
out: the same graph, smaller. Each pass is a library's; a failure names the pass (onnx_ir's PassError).
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer import fold_constants

FOLD_LIMIT = 1024  # values: shape arithmetic folds, tables do not


class FoldConstants(ir.passes.InPlacePass):
    """Folds the exporter's shape arithmetic and propagates shapes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        result = fold_constants(model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
        return ir.passes.PassResult(model, modified=result.modified)


def optimize(model: ir.Model) -> ir.Model:
    """Runs every pass in order and returns the model."""
    return PASSES(model).model


PASSES = ir.passes.Sequential(
    common.ClearMetadataAndDocStringPass(),  # the exporter's stack traces name the build machine's paths
    FoldConstants(),
    common.IdentityEliminationPass(),
    common.CommonSubexpressionEliminationPass(),
    common.RemoveUnusedNodesPass(),
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.NameFixPass(),
    common.TopologicalSortPass(),
)
