"""Which linear layers of a denoiser's graph may be rounded, and which of them read the same value.

Flows in: a graph. Flows out: its sites, in order. Layers of the blocks are found by their weights' names; patch
embedding, time features, modulation and last layer lie outside the blocks, and norms are no linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from tubelet.runtime.errors import UserError
from tubelet.runtime.precision import COMPONENT

from .formats import Float32
from .weights import values

BLOCKS = "blocks.*"


@dataclass(frozen=True)
class Linear:
    """A matrix product of inputs [...,I] with a weight [O,I], which the graph turns."""

    name: str  # such as "blocks.0.ffn.2"
    product: ir.Node
    weight: ir.Value  # as it is stored

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        assert self.weight.shape is not None
        outputs, inputs = self.weight.shape.numpy()
        return outputs, inputs

    def values(self) -> Float32:
        assert self.weight.const_value is not None
        return values(self.weight.const_value).astype(np.float32)


@dataclass(frozen=True)
class Site:
    """A value and the linear layers that read it: one rounding of it serves them all."""

    source: ir.Value
    layers: tuple[Linear, ...]

    @property
    def name(self) -> str:
        """The value's, in the graph as it was."""
        return str(self.source.name)

    @property
    def parameters(self) -> int:
        return sum(math.prod(layer.shape) for layer in self.layers)


def sites(model: ir.Model, keep: Sequence[str] = ()) -> list[Site]:
    """The sites of all layers in the blocks but those whose names match a pattern of `keep`.

    Raises UserError for a pattern that matches no layer, or when all layers match.
    """
    found = [layer for node in model.graph if (layer := _linear(node)) is not None]
    names = [layer.name for layer in found]
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"--keep {pattern!r} matches no linear layer; layers are named as {', '.join(names[:8])}")
    by_source: dict[ir.Value, list[Linear]] = {}
    for layer in found:
        if not any(fnmatchcase(layer.name, pattern) for pattern in keep):
            source = layer.product.inputs[0]
            assert source is not None
            by_source.setdefault(source, []).append(layer)
    if not by_source:
        raise UserError("--keep leaves no linear layer to quantize; give narrower patterns")
    return [Site(source, tuple(layers)) for source, layers in by_source.items()]


def _linear(node: ir.Node) -> Linear | None:
    """The layer that a node computes, if it is one of the blocks'."""
    if node.op_type != "MatMul":
        return None
    weight = node.inputs[1]
    while weight is not None and (producer := weight.producer()) is not None:
        if producer.op_type not in ("Cast", "Transpose"):
            return None
        weight = producer.inputs[0]
    if weight is None or not weight.is_initializer():
        return None
    name = str(weight.name).removeprefix(f"{COMPONENT}.").removesuffix(".weight")
    return Linear(name, node, weight) if fnmatchcase(name, BLOCKS) else None
