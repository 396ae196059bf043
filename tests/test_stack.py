"""Stacks: one block is traced, every block has its own weights, and the graph is what tracing all of them gives.

pytest tests/test_stack.py
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tubelet.export.components import Component, Port
from tubelet.export.stack import Stack, called
from tubelet.export.storage import StoredTensor
from tubelet.export.trace import trace

PORT = Port(("B", "N", 6))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor, absent: Tensor | None, pair: tuple[Tensor, Tensor]) -> Tensor:
        assert absent is None
        a, b = self.first(x * pair[0]).chunk(2, dim=-1)
        return x + self.second(a.tanh() * b) + pair[1]


class Model(nn.Module):
    """Two stacks, of which one is given another tensor at each place."""

    def __init__(self, kind: type[nn.ModuleList]):
        super().__init__()
        self.blocks, self.more = kind(Block() for _ in range(3)), kind(Block() for _ in range(2))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        for place, block in enumerate(self.blocks):
            x = block(x, None, (scale[place], x))
        for block in self.more:
            x = block(x, None, (x, x))
        return x


def traced(model: nn.Module) -> ir.Model:
    ports = {"x": PORT, "scale": Port((3, "B", "N", 6))}
    state = model.state_dict()
    tensors = {name: StoredTensor("weights", "F32", tuple(t.shape), 0, 4 * t.numel()) for name, t in state.items()}
    with torch.device("meta"):
        empty = Model(type(model.blocks))
    made = trace(Component("model", "", empty, ports, {"y": PORT}, ()), tensors)
    for name, value in state.items():
        made.graph.initializers[name].const_value = ir.tensor(value.numpy())
    return made


def test_every_block_has_its_own_weights(tmp_path: Path) -> None:
    """On extents other than the traced ones, within float32 rounding."""
    torch.manual_seed(0)
    model = Model(Stack)
    ir.save(traced(model), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch, length in ((1, 7), (3, 1)):
        x, scale = torch.randn(batch, length, 6), torch.randn(3, batch, length, 6)
        (y,) = session.run(None, {"x": x.numpy(), "scale": scale.numpy()})
        np.testing.assert_allclose(y, model(x, scale).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_the_nodes_are_those_of_tracing_every_block() -> None:
    torch.manual_seed(0)
    once, all_of_them = (traced(Model(kind)) for kind in (Stack, nn.ModuleList))
    assert Counter(node.op_type for node in once.graph) == Counter(node.op_type for node in all_of_them.graph)
    assert set(once.graph.initializers) >= {name for name, _ in Model(Stack).named_parameters()}
    assert not once.functions and {node.domain for node in once.graph} == {""}


def test_modules_are_themselves_again() -> None:
    model, x = Model(Stack), torch.randn(1, 2, 6)
    wanted = model(x, torch.ones(3, 1, 2, 6))
    with pytest.raises(KeyboardInterrupt), called(model):
        assert all("forward" in vars(block) for block in (*model.blocks, *model.more))
        raise KeyboardInterrupt
    assert torch.equal(model(x, torch.ones(3, 1, 2, 6)), wanted)
