"""What runs a compiled graph: the Engine protocol, and the engine on ONNX Runtime.

Flows in: a bundle's graph and arrays by name. Flows out: arrays by name: NumPy's, or such as an engine leaves on its
device for another engine. A loop that runs one graph many times binds its arrays once and replays; nothing is allocated
in between. Knows nothing of what the graphs mean.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .bundle import Shape, extents, sizes
from .errors import UserError

MAX_THREADS = 1024
EXACT = {
    "session.x64quantprecision": "1",  # CPUs without VNNI add pairs of int8 products in 16 bits, which overflows
    "session.qdq_matmulnbits_accuracy_level": "1",  # inputs of 8-bit weights stay float32
}
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
M_MMAP_THRESHOLD = -3  # glibc's malloc.h
Arrays = Mapping[str, Any]
Ports = Mapping[str, Shape]


class Binding(Protocol):
    """A graph with its input and output arrays; `run` reads the former in place and writes the latter."""

    def run(self) -> None: ...


class Engine(Protocol):
    def bind(self, inputs: Arrays, outputs: Arrays) -> Binding:
        """Fixes the arrays of many runs; they must be contiguous and stay alive."""
        ...

    def __call__(self, inputs: Arrays) -> dict[str, Any]:
        """One run with fresh outputs."""
        ...

    def advance(self, inputs: Arrays) -> dict[str, Any]:
        """One run of several in a row: an output `next_x` is good only as the input `x` of the next run.

        It may be on the engine's device, and it may have taken the memory of the input `x`, which is then lost.
        """
        ...


class Components(Protocol):
    """A bundle's engines by component."""

    def __getitem__(self, name: str) -> Engine: ...


def require_provider(provider: str) -> str:
    """Which ONNX Runtime is installed. Raises UserError where none is, or one without this execution provider."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UserError(f"{error}: install tubelet with its extra cpu") from error
    if provider not in ort.get_available_providers():
        raise UserError(f"onnxruntime {ort.__version__} has no {provider}; install onnxruntime-gpu")
    return f"onnxruntime {ort.__version__}"


class OnnxRuntimeEngine:
    """An engine on one of ONNX Runtime's execution providers."""

    def __init__(
        self, graph: Path, threads: int | None = None, provider: str = CPU, frugal: bool = False, fold: bool = True
    ):
        """Loads a graph and its weights. Raises UserError when ONNX Runtime is absent or refuses the graph.

        `frugal`: no memory is kept for values that are no more needed, which pays where they are few and large. Without
        `fold` weights are cast and transposed in every run, not once: slower, and without the copies that this takes.
        """
        require_provider(provider)
        import onnxruntime as ort

        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise UserError(f"threads must be from 1 to {MAX_THREADS}, is {threads}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        for name, value in EXACT.items():
            options.add_session_config_entry(name, value)
        # As the graph lists them: what shortens a value runs before another value is made.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        if frugal:
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
            _give_blocks_back()
        try:
            self._session = ort.InferenceSession(
                str(graph), options, providers=[provider], disabled_optimizers=None if fold else ["ConstantFolding"]
            )
        except Exception as error:  # ONNX Runtime's classes derive from Exception alone
            raise UserError(f"ONNX Runtime cannot load {graph}: {error}; export the bundle again") from error
        if provider not in self._session.get_providers():  # it falls back to the CPU with a warning
            raise UserError(f"ONNX Runtime cannot use {provider}; install CUDA and cuDNN as onnxruntime-gpu needs them")
        self._inputs: Ports = {port.name: tuple(port.shape) for port in self._session.get_inputs()}
        self._outputs: Ports = {port.name: tuple(port.shape) for port in self._session.get_outputs()}

    def bind(self, inputs: Arrays, outputs: Arrays) -> Binding:
        io = self._session.io_binding()
        _bind(io.bind_input, inputs)
        _bind(io.bind_output, outputs)
        return _OnnxRuntimeBinding(self._session, io, (inputs, outputs))

    def __call__(self, inputs: Arrays) -> dict[str, Any]:
        return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))

    def advance(self, inputs: Arrays) -> dict[str, Any]:
        """Writes over inputs: a graph reads `x` where it is prepended, and makes `next_x` of the result alone.

        What is new is NumPy's, so that it outlives the engine without keeping the engine's weights.
        """
        found = extents(self._inputs, {name: array.shape for name, array in inputs.items()})
        outputs = {}
        for name, shape in self._outputs.items():
            past = inputs.get(name.removeprefix("next_"))
            outputs[name] = np.empty(sizes(shape, found), np.float32) if past is None else past
        self.bind(inputs, outputs).run()
        return outputs


def _give_blocks_back() -> None:
    """Lets freed blocks of 1 MiB and more go back to the system at once, where the C library is glibc.

    By itself it learns to keep blocks of up to 32 MiB, and larger ones do not fit between them.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _bind(bind: Callable[..., None], arrays: Arrays) -> None:
    for name, array in arrays.items():
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class _OnnxRuntimeBinding:
    def __init__(self, session: Any, io: Any, alive: tuple[Arrays, Arrays]):
        self._session, self._io, self._alive = session, io, alive

    def run(self) -> None:
        self._session.run_with_iobinding(self._io)
