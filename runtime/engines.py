"""What runs a compiled graph: the Engine protocol, and the engine on ONNX Runtime.

Flows in: a bundle's graph and NumPy arrays by name. Flows out: NumPy arrays by name. A loop that runs one graph many
times binds its arrays once and replays; nothing is allocated in between. Knows nothing of what the graphs mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import UserError

MAX_THREADS = 1024
Arrays = Mapping[str, np.ndarray[Any, Any]]


class Binding(Protocol):
    """A graph with its input and output arrays; `run` reads the former in place and writes the latter."""

    def run(self) -> None: ...


class Engine(Protocol):
    def bind(self, inputs: Arrays, outputs: Arrays) -> Binding:
        """Fixes the arrays of many runs; they must be contiguous and stay alive."""
        ...

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """One run with fresh outputs."""
        ...


class OnnxRuntimeEngine:
    """An engine on ONNX Runtime's CPU provider."""

    def __init__(self, graph: Path, threads: int | None = None):
        """Loads a graph and its weights. Raises UserError when ONNX Runtime is absent or refuses the graph."""
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise UserError("ONNX Runtime is not installed; run pip install onnxruntime") from error
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise UserError(f"threads must be from 1 to {MAX_THREADS}, is {threads}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's classes derive from Exception alone
            raise UserError(f"ONNX Runtime cannot load {graph}: {error}; export the bundle again") from error
        self._outputs = tuple(port.name for port in self._session.get_outputs())

    def bind(self, inputs: Arrays, outputs: Arrays) -> Binding:
        io = self._session.io_binding()
        for bind, arrays in ((io.bind_input, inputs), (io.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return _OnnxRuntimeBinding(self._session, io, (inputs, outputs))

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))


class _OnnxRuntimeBinding:
    def __init__(self, session: Any, io: Any, alive: tuple[Arrays, Arrays]):
        self._session, self._io, self._alive = session, io, alive

    def run(self) -> None:
        self._session.run_with_iobinding(self._io)
