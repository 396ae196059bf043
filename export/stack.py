"""Equal modules one after another, which the exporter traces once.

Flows in: a component's module, and its graph in which each module of a Stack is a call. Flows out: the same graph with
every call replaced by the nodes of the stack's first module. So tracing takes the time of one block, however many
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DOMAIN = "tubelet.stack"
Export = Callable[[nn.Module, tuple[Tensor, ...]], ir.Model]  # a module and examples, whose extents may be symbolic


class Stack(nn.ModuleList):
    """Modules of one class and size. Each takes tensors, or nothing for one, and returns a tensor like its first."""


class Flat(nn.Module):
    """A module as a function of the tensors among its arguments."""

    def __init__(self, module: nn.Module, arguments: Sequence[Any]):
        super().__init__()
        self.module, self.arguments = module, arguments

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        fill = lambda leaf: next(given) if isinstance(leaf, Tensor) else leaf  # noqa: E731
        return self.module(*pytree.tree_map(fill, self.arguments))


@contextmanager
def called(module: nn.Module) -> Iterator[dict[str, Flat]]:
    """While it lasts, each module of a Stack is a call; what the first of a stack was called with is yielded."""
    firsts: dict[str, Flat] = {}
    stacks = {name: stack for name, stack in module.named_modules() if isinstance(stack, Stack)}

    def stand_in(name: str, place: int, *arguments: Any) -> Tensor:
        flat = Flat(stacks[name][place], arguments)
        firsts.setdefault(name, flat)
        x = flat.tensors[0]
        node = f"{DOMAIN}::{name}"
        y = torch.onnx.ops.symbolic(node, flat.tensors, {"place": place}, dtype=x.dtype, shape=x.shape, version=1)
        return y.to(x.device)

    for name, stack in stacks.items():
        for place, each in enumerate(stack):
            each.forward = partial(stand_in, name, place)
    try:
        yield firsts
    finally:
        for stack in stacks.values():
            for each in stack:
                del each.forward  # that of its class again


def inlined(model: ir.Model, firsts: Mapping[str, Flat], export: Export) -> ir.Model:
    """Replaces every call by the nodes of its stack's first module, which `export` makes, with weights of its own."""
    for stack, first in firsts.items():
        graph = export(first, tuple(first.tensors)).graph
        weights = list(graph.initializers.values())
        graph.initializers.clear()
        graph.inputs.extend(weights)
        body = ir.Function(DOMAIN, stack, graph=graph, attributes=())
        model.functions[body.identifier()] = body
        for node in [node for node in model.graph if node.op_identifier() == body.identifier()]:
            prefix = f"{stack}.{node.attributes.pop('place').as_int()}."
            given = len(node.inputs)
            node.resize_inputs(given + len(weights))
            for index, like in enumerate(weights, start=given):
                name = prefix + str(like.name).removeprefix("module.")
                node.replace_input_with(index, _weight(model.graph, name, like))
    model = common.InlinePass()(model).model
    model.opset_imports.pop(DOMAIN, None)
    return model


def _weight(graph: ir.Graph, name: str, like: ir.Value) -> ir.Value:
    """The graph's initializer of that name."""
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(name=name, type=like.type, shape=like.shape)
    return graph.initializers[name]
