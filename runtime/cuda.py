"""NVIDIA GPUs behind the protocols of `memory.py`, through cuda-python: no CUDA library is linked.

Flows in: bytes, addresses and kernels by name. Flows out: device memory, and work done in the order of its stream. The
kernels are in `kernels.fatbin`, which lies beside the compiled extension. Knows nothing of arrays. What the driver
refuses is a DeviceError; a machine that cannot run CUDA at all is a UserError.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .memory import DeviceError, Extent, Graph, MemoryInfo, Resource, Stream

_NO_DRIVER = "there is no NVIDIA driver on this machine; install one, or use target cpu"


class CudaDevice(Resource):
    """One GPU: its primary context, which TensorRT and ONNX Runtime use too."""

    def __init__(self, ordinal: int = 0):
        """Loads the kernels. Raises UserError where they, cuda-python, the driver or the GPU are missing."""
        self.driver = driver = _initialised_driver()
        self._context: Any = None
        try:
            self._device = self.call(driver.cuDeviceGet, ordinal)
        except DeviceError as error:
            raise UserError(f"there is no GPU {ordinal}: {error}") from error
        code = fatbin().read_bytes()
        self._context = self.call(driver.cuDevicePrimaryCtxRetain, self._device)
        self._library = self.call(driver.cuLibraryLoadData, code, [], [], 0, [], [], 0)
        self._functions: dict[str, Any] = {}
        super().__init__(_release, driver, self._library, self._device)

    @property
    def name(self) -> str:
        name: bytes = self.call(self.driver.cuDeviceGetName, 256, self._device)
        return name.rstrip(b"\0").decode()

    @property
    def architecture(self) -> str:
        kind = self.driver.CUdevice_attribute
        major, minor = (
            self.call(self.driver.cuDeviceGetAttribute, attribute, self._device)
            for attribute in (
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return f"sm{major}{minor}"

    def memory(self) -> MemoryInfo:
        return MemoryInfo(*self.call(self.driver.cuMemGetInfo))

    def allocate(self, size: int) -> CudaBuffer:
        """At least one byte, as the driver wants, on a boundary of at least 256."""
        return CudaBuffer(self, int(self.call(self.driver.cuMemAlloc, max(1, size))))

    def stream(self) -> CudaStream:
        flags = self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return CudaStream(self, int(self.call(self.driver.cuStreamCreate, flags)))

    def function(self, symbol: str) -> Any:
        """A kernel of the fatbin."""
        if symbol not in self._functions:
            kernel = self.call(self.driver.cuLibraryGetKernel, self._library, symbol.encode())
            self._functions[symbol] = self.call(self.driver.cuKernelGetFunction, kernel)
        return self._functions[symbol]

    def call(self, function: Callable[..., tuple[Any, ...]], *arguments: object) -> Any:
        """What a driver function answers, in this device's context on whatever thread."""
        if self._context is not None:
            _results(self.driver, self.driver.cuCtxSetCurrent, self._context)
        return _results(self.driver, function, *arguments)

    def release(self, function: Callable[..., tuple[Any, ...]], handle: object) -> None:
        """Frees what belongs to this device, unless it went with the device."""
        if self._finalizer.alive:
            self.call(function, handle)


class CudaBuffer(Resource):
    def __init__(self, device: CudaDevice, pointer: int):
        super().__init__(device.release, device.driver.cuMemFree, pointer)
        self.pointer = pointer


class CudaGraph(Resource):
    def __init__(self, device: CudaDevice, handle: Any, copied: list[NDArray[Any]]):
        super().__init__(device.release, device.driver.cuGraphExecDestroy, handle)
        self._device, self._handle, self._copied = device, handle, copied

    def launch(self, stream: Stream) -> None:
        self._device.call(self._device.driver.cuGraphLaunch, self._handle, stream.handle)


class CudaStream(Resource):
    def __init__(self, device: CudaDevice, handle: int):
        super().__init__(device.release, device.driver.cuStreamDestroy, handle)
        self.device, self.handle = device, handle
        self._driver = device.driver
        self._copied: list[NDArray[Any]] = []  # host arrays that queued work needs

    def upload(self, pointer: int, host: NDArray[Any]) -> None:
        self._copied.append(host)
        self.device.call(self._driver.cuMemcpyHtoDAsync, pointer, host.ctypes.data, host.nbytes, self.handle)

    def download(self, host: NDArray[Any], pointer: int) -> None:
        self._copied.append(host)
        self.device.call(self._driver.cuMemcpyDtoHAsync, host.ctypes.data, pointer, host.nbytes, self.handle)

    def copy(self, to: int, source: int, size: int) -> None:
        self.device.call(self._driver.cuMemcpyDtoDAsync, to, source, size, self.handle)

    def launch(self, symbol: str, grid: Extent, block: Extent, arguments: bytes) -> None:
        parameter = np.frombuffer(arguments, np.uint8)  # the driver copies it before it returns
        parameters = ctypes.c_void_p(parameter.ctypes.data)
        function = self.device.function(symbol)
        launch = (*grid, *block, 0, self.handle, ctypes.addressof(parameters), 0)
        self.device.call(self._driver.cuLaunchKernel, function, *launch)

    def capture(self, work: Callable[[], object]) -> Graph:
        call, driver = self.device.call, self._driver
        # relaxed: memory may be freed meanwhile, since a garbage collection can happen anywhere
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        call(driver.cuStreamBeginCapture, self.handle, mode)
        queued, self._copied = self._copied, []
        try:
            work()
        except BaseException:
            with contextlib.suppress(DeviceError):  # the capture may be broken already
                call(driver.cuGraphDestroy, call(driver.cuStreamEndCapture, self.handle))
            raise
        finally:
            captured, self._copied = self._copied, queued
        graph = call(driver.cuStreamEndCapture, self.handle)
        try:
            return CudaGraph(self.device, call(driver.cuGraphInstantiate, graph, 0), captured)
        finally:
            call(driver.cuGraphDestroy, graph)

    def synchronize(self) -> None:
        self.device.call(self._driver.cuStreamSynchronize, self.handle)
        self._copied.clear()


def _initialised_driver() -> Any:
    try:
        driver = import_module("cuda.bindings.driver")
    except ImportError as error:
        raise UserError(f"{error}: install tubelet with its extra gpu or rtx, or use target cpu") from error
    try:
        _results(driver, driver.cuInit, 0)
    except DeviceError as error:
        raise UserError(f"the NVIDIA driver finds no GPU ({error}); use target cpu") from error
    except RuntimeError as error:  # cuda-python's, when there is no libcuda to load
        raise UserError(_NO_DRIVER) from error
    return driver


def _release(driver: Any, library: Any, device: Any) -> None:
    driver.cuLibraryUnload(library)
    driver.cuDevicePrimaryCtxRelease(device)


def _results(driver: Any, function: Callable[..., tuple[Any, ...]], *arguments: object) -> Any:
    status, *results = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(function.__name__, status.name)
    return results[0] if len(results) == 1 else tuple(results)


def fatbin() -> Path:
    """The compiled kernels. Raises UserError where tubelet was built without them."""
    extension = find_spec("tubelet.runtime._kernels")
    if extension is None or extension.origin is None:
        raise UserError("the compiled extension is missing: install tubelet where there is a C++ compiler")
    path = Path(extension.origin).with_name("kernels.fatbin")
    if not path.exists():
        raise UserError(f"{path} is missing: tubelet was built without nvcc; install CUDA's and build again")
    return path
