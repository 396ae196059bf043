"""Engines on TensorRT and TensorRT-RTX: one code for both, which takes the Python module as a parameter.

Flows in: a plan and its record, and arrays by name, on the host or on the device. Flows out: arrays by name, `resident`
ones on the device. The profile nearest to the shapes runs; contexts share the session's scratch memory and its stream.
Knows nothing of what the graphs mean. The caller holds the session's lock.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Component, Extents, extents, sizes
from .compiler_log import make_logger
from .dtypes import DTYPES, from_plan, to_float, to_plan
from .errors import UserError
from .kernel_cache import KernelCache
from .memory import DeviceArray, DeviceError
from .plans import Compiler, Plan, verify_file
from .profiles import select
from .session import Session

Value = NDArray[Any] | DeviceArray
MODULES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
EXTRAS = {"rtx": "rtx", "tensorrt": "gpu"}  # which bring cuda-python too


def load_module(kind: str) -> ModuleType:
    """The Python module of a compiler. Raises UserError where it is not installed."""
    name = MODULES[kind]
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed ({error}); install tubelet with its extra {EXTRAS[kind]}") from error


def compiler_of(module: ModuleType) -> Compiler:
    return Compiler(module.__name__, module.__version__)


class TensorRt:
    """One of the two compilers' runtimes on a session's device."""

    def __init__(self, module: ModuleType, session: Session):
        self.module, self.session = module, session
        self._logger = make_logger(module)
        self._native = module.Runtime(self._logger)

    def load(self, plan: Plan, component: Component, resident: frozenset[str]) -> TensorRtEngine:
        """Verifies a plan's file and loads it. Raises UserError when it is damaged or refused."""
        verify_file(plan.path, plan.record.file)
        with plan.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = self._native.deserialize_cuda_engine(data)
        if engine is None:
            raise UserError(f"{plan.path} cannot be loaded: {self.problems()}; build the target again")
        return TensorRtEngine(self, engine, plan, component, resident)

    def accept(self, done: object, what: str) -> None:
        """Raises DeviceError, with what was logged, unless the runtime did what it was asked for."""
        if not done:
            raise DeviceError(what, self.problems())

    def problems(self) -> str:
        """What was logged as wrong since the last time."""
        return str(self._logger.problems())


class TensorRtEngine:
    """A loaded plan."""

    def __init__(self, runtime: TensorRt, engine: Any, plan: Plan, component: Component, resident: frozenset[str]):
        self.dtypes = plan.record.dtypes
        self._runtime, self._engine, self._component, self._resident = runtime, engine, component, resident
        self._session, self._profiles, self._name = runtime.session, plan.record.profiles, plan.record.component
        self._buffers: dict[str, DeviceArray] = {}  # static: kept as long as shapes stay
        self._executions: dict[int, Execution] = {}  # by profile
        trt = runtime.module
        self._settings: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._cache: KernelCache | None = None
        if hasattr(trt, "IRuntimeCache"):  # TensorRT-RTX compiles kernels when a context meets a shape
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(self._settings)
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            architecture = self._session.device.architecture
            self._cache = KernelCache(config, plan.path, plan.record.key, architecture)
            self._settings = config

    def __call__(self, inputs: Mapping[str, Value]) -> dict[str, Any]:
        """One run; waits for it. Raises UserError for shapes that no profile takes, DeviceError when the GPU fails."""
        index, found = self._select(inputs)
        return self._run(index, found, inputs)

    def execution(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Execution:
        """A context of its own for these tensors, to be run and captured many times."""
        index, _ = self._select(inputs)
        execution = self._execution(index)
        execution.place(inputs, outputs)
        return execution

    def warm_up(self) -> None:
        """Runs every profile at its optimal size, on zeros, and keeps the kernels that were compiled for it."""
        for index, profile in enumerate(self._profiles):
            optimal = {name: extent.opt for name, extent in profile.items()}
            ports = self._component.inputs.items()
            zeros = {name: np.zeros(sizes(port, optimal), DTYPES[self.dtypes[name]]) for name, port in ports}
            self._run(index, optimal, zeros)
        if self._cache is not None:
            self._cache.write()

    def close(self) -> None:
        """Frees the weights, unless an execution is still alive."""
        if self._cache is not None:
            self._cache.close()
        self._executions.clear()
        self._buffers.clear()
        self._engine = self._settings = None

    def _select(self, inputs: Mapping[str, Value]) -> tuple[int, Extents]:
        """The profile for these inputs, and their varying extents."""
        found = extents(self._component.inputs, {name: tuple(value.shape) for name, value in inputs.items()})
        index = select(self._profiles, found)
        if index is None:
            given = ", ".join(f"{name} {extent}" for name, extent in found.items())
            raise UserError(f"no profile of the {self._name}'s plan takes {given}; build it for this shape")
        return index, found

    def _run(self, index: int, found: Extents, inputs: Mapping[str, Value]) -> dict[str, Any]:
        stream = self._session.stream
        placed = {name: self._placed(name, value) for name, value in inputs.items()}
        outputs = {name: self._output(name, sizes(port, found)) for name, port in self._component.outputs.items()}
        if index not in self._executions:
            self._executions[index] = self._execution(index)
        execution = self._executions[index]
        execution.place(placed, outputs)
        execution.enqueue()
        hosts = {name: np.empty(array.shape, array.dtype) for name, array in outputs.items()}
        for name in hosts.keys() - self._resident:
            outputs[name].download(hosts[name], stream)
        stream.synchronize()
        return {
            name: array if name in self._resident else from_plan(hosts[name], self.dtypes[name])
            for name, array in outputs.items()
        }

    def _placed(self, name: str, value: Value) -> DeviceArray:
        """An input on the device in the plan's type: itself where it is that already."""
        if isinstance(value, DeviceArray):
            if value.dtype == DTYPES[self.dtypes[name]]:
                return value
            value = to_float(value.to_host(self._session.stream))
        buffer = self._buffer(name, tuple(value.shape))
        buffer.upload(to_plan(value, self.dtypes[name]), self._session.stream)
        return buffer

    def _output(self, name: str, shape: tuple[int, ...]) -> DeviceArray:
        if name in self._resident:
            return DeviceArray.empty(self._session.device, shape, DTYPES[self.dtypes[name]])
        return self._buffer(name, shape)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> DeviceArray:
        if name in self._buffers and self._buffers[name].shape != shape:
            self._buffers.pop(name).close()
        if name not in self._buffers:
            self._buffers[name] = DeviceArray.empty(self._session.device, shape, DTYPES[self.dtypes[name]])
        return self._buffers[name]

    def _execution(self, index: int) -> Execution:
        context = self._engine.create_execution_context(self._settings)
        self._runtime.accept(context, f"making a context of the {self._name}")
        stream = self._session.stream
        selected = context.set_optimization_profile_async(index, stream.handle)
        self._runtime.accept(selected, f"selecting profile {index} of the {self._name}")
        return Execution(self._runtime, context, self._name)


class Execution:
    """A context with its tensors; each run of it is queued on the session's stream."""

    def __init__(self, runtime: TensorRt, context: Any, name: str):
        self._runtime, self._context, self._name = runtime, context, name
        self._size = 0  # bytes of scratch memory that these shapes need
        self._scratch: int | None = None  # its address that the context knows

    def place(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Sets the shapes, and the addresses, which must stay what they are while runs are queued."""
        accept, context = self._runtime.accept, self._context
        for name, array in inputs.items():
            accept(context.set_input_shape(name, array.shape), f"setting the shape of {name} of the {self._name}")
        for name, array in {**inputs, **outputs}.items():
            accept(context.set_tensor_address(name, array.pointer), f"placing {name} of the {self._name}")
        self._size, self._scratch = context.update_device_memory_size_for_shapes(), None

    def reserve(self) -> int:
        """The address of the scratch memory that the next run uses: a graph that was captured on another is stale."""
        scratch = self._runtime.session.scratch.reserve(self._size)
        if scratch != self._scratch:
            self._context.set_device_memory(scratch, self._size)
            self._scratch = scratch
        return scratch

    def enqueue(self) -> None:
        self.reserve()
        queued = self._context.execute_async_v3(self._runtime.session.stream.handle)
        self._runtime.accept(queued, f"running the {self._name}")
