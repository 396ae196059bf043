"""The process that traces: `python -m tubelet.export.trace_process FD`.

Flows in: what to trace from, then names of components, from the pipe whose file descriptor is FD. Flows out: each
graph in the folder, and a Traced to the same pipe.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

import onnx_ir as ir
import torch

from .components import build_modules, components
from .content import graph_digest
from .processes import serve
from .trace import trace
from .tracing import Source, Traced


def answer(pipe: Connection) -> None:
    source: Source = pipe.recv()
    with torch.device("meta"):
        known = {component.name: component for component in components(source.spec, build_modules(source.spec))}
    while True:
        component = known[pipe.recv()]
        model = trace(component, source.tensors)
        ir.save(model, source.folder / f"{component.name}.onnx")
        constants = [value.const_value for value in model.graph.initializers.values()]
        weights = {str(c.name): int(c.size) for c in constants if isinstance(c, ir.ExternalTensor)}
        pipe.send(Traced(component.name, graph_digest(model), weights))


if __name__ == "__main__":
    serve(answer)
