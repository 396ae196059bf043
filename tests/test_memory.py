"""Device memory: views, copies in the order of the stream, release, and what is said when a device refuses.

Proves: on a device of host memory, and for NVIDIA's driver on one that answers as told.

Run: pytest tests/test_memory.py
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from fake_device import FakeDevice, Faults

from tubelet.runtime import cuda, kernels
from tubelet.runtime.errors import UserError
from tubelet.runtime.memory import DeviceArray, DeviceError, MemoryInfo


@pytest.fixture
def device(cuda_host: ctypes.CDLL) -> FakeDevice:
    return FakeDevice(cuda_host)


def counting(*shape: int) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# ---- arrays ----


@pytest.mark.parametrize(
    "index", [1, -1, slice(1, 3), (0, slice(1, None)), (slice(None), slice(2)), (slice(3, 1), 2), (2, 1, slice(0, 9))]
)
def test_views_are_numpys(device: FakeDevice, index: Any) -> None:
    host = counting(4, 3, 5)
    with device.stream() as stream:
        view = DeviceArray.from_host(host, stream)[index]

    expected = host[index]
    assert view.shape == expected.shape
    assert not expected.size or view.strides == expected.strides
    assert not expected.size or view.pointer - view.buffer.pointer == expected.ctypes.data - host.ctypes.data
    assert view.contiguous == expected.flags.c_contiguous


def test_a_view_is_written_through(device: FakeDevice) -> None:
    with device.stream() as stream:
        whole = DeviceArray.from_host(np.zeros((4, 6), np.float32), stream)
        whole[1:3].upload(counting(2, 6), stream)
        whole.reshape(2, 2, 6)[1, 1].copy_from(whole[2], stream)

        np.testing.assert_array_equal(whole.to_host(stream), np.r_[np.zeros((1, 6)), counting(2, 6), [range(6, 12)]])


def test_wrong_views_and_copies_are_refused(device: FakeDevice) -> None:
    with device.stream() as stream:
        array = DeviceArray.empty(device, (4, 6), np.float32)
        with pytest.raises(IndexError, match="step 1, not 2"):
            array[::2]
        with pytest.raises(ValueError, match="cannot be seen as"):
            array[:, 1:].reshape(20)
        with pytest.raises(ValueError, match="only contiguous arrays are copied"):
            array[:, 1:].upload(counting(4, 5), stream)
        with pytest.raises(ValueError, match=r"float32 cannot be copied from or to one \[4, 6\] of float64"):
            array.upload(np.zeros((4, 6)), stream)


def test_memory_is_free_when_its_last_view_is(device: FakeDevice) -> None:
    view = DeviceArray.empty(device, (1024,), np.uint8)[10:]
    assert device.memory() == MemoryInfo(device.total - 1024, device.total)

    del view

    assert device.memory().free == device.total


# ---- streams ----


def test_nothing_happens_before_the_stream_is_waited_for(device: FakeDevice) -> None:
    with device.stream() as stream:
        array, host = DeviceArray.from_host(counting(3), stream), np.zeros(3, np.float32)
        array.download(host, stream)
        np.testing.assert_array_equal(host, 0)

        stream.synchronize()

        np.testing.assert_array_equal(host, counting(3))


def test_a_graph_replays_what_was_captured(device: FakeDevice) -> None:
    with device.stream() as stream:
        x = DeviceArray.from_host(np.zeros((2, 4), np.float32), stream)
        velocity = DeviceArray.from_host(np.ones((1, 2, 4), np.float32), stream)
        tokens = DeviceArray.empty(device, (1, 2, 4), np.float32)
        graph = stream.capture(lambda: kernels.guided_step([x], velocity, tokens, [[1, 1]], stream=stream))
        np.testing.assert_array_equal(x.to_host(stream), 0)

        for _ in range(3):
            graph.launch(stream)

        np.testing.assert_array_equal(x.to_host(stream), 3)


def test_allocating_and_waiting_break_a_capture(device: FakeDevice) -> None:
    with device.stream() as stream:
        for work in (stream.synchronize, lambda: device.allocate(1)):
            with pytest.raises(DeviceError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
                stream.capture(work)
        stream.synchronize()  # and the stream is usable again


# ---- faults ----


def test_running_out_of_memory_says_what_to_do(cuda_host: ctypes.CDLL) -> None:
    device = FakeDevice(cuda_host, faults=Faults(allocation=1))
    DeviceArray.empty(device, (8,), np.float32)
    with pytest.raises(
        DeviceError, match="cuMemAlloc failed with CUDA_ERROR_OUT_OF_MEMORY: free device memory"
    ) as error:
        DeviceArray.empty(device, (8,), np.float32)
    assert error.value.code == "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
        device.allocate(device.total + 1)


def test_a_refused_launch_and_a_cancelled_capture_leave_the_stream_usable(cuda_host: ctypes.CDLL) -> None:
    device = FakeDevice(cuda_host, faults=Faults(launch=0, capture=0))
    with device.stream() as stream:
        latent = DeviceArray.from_host(counting(1, 1, 2, 2), stream)
        with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED"):
            kernels.pack(latent, (1, 1, 1), stream=stream)
        with pytest.raises(DeviceError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
            stream.capture(lambda: None)

        tokens = kernels.pack(latent, (1, 1, 1), stream=stream)

        np.testing.assert_array_equal(tokens.to_host(stream), counting(4, 1))


# ---- NVIDIA's driver ----


class Driver:
    """Answers every function with success and some handle, unless told otherwise, and notes what was called."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"))
    CUstream_flags = CUstreamCaptureMode = MagicMock()

    def __init__(self, **answers: Any):
        self.calls: list[str] = []
        self.answers = answers

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            answer = self.answers.get(name, 7)
            if isinstance(answer, Exception):
                raise answer
            return (SimpleNamespace(name=answer),) if isinstance(answer, str) else (self.CUresult.CUDA_SUCCESS, answer)

        function.__name__ = name
        return function


def cuda_device(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> cuda.CudaDevice:
    monkeypatch.setattr(cuda, "import_module", lambda name: driver)
    monkeypatch.setattr(cuda, "fatbin", lambda: Path(__file__))
    return cuda.CudaDevice()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"cuInit": RuntimeError("no libcuda")}, "there is no NVIDIA driver on this machine.*use target cpu"),
        ({"cuInit": "CUDA_ERROR_NO_DEVICE"}, "the NVIDIA driver finds no GPU.*CUDA_ERROR_NO_DEVICE.*use target cpu"),
        ({"cuDeviceGet": "CUDA_ERROR_INVALID_DEVICE"}, "there is no GPU 0: cuDeviceGet failed"),
    ],
)
def test_a_machine_without_a_gpu_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        cuda_device(monkeypatch, Driver(**answers))


def test_without_cuda_python_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'cuda'")

    monkeypatch.setattr(cuda, "import_module", absent)
    with pytest.raises(UserError, match="install tubelet with its extra gpu or rtx"):
        cuda.CudaDevice()


def test_a_failed_capture_is_ended_and_its_graph_destroyed(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    device = cuda_device(monkeypatch, driver)
    with device, device.stream() as stream:
        with pytest.raises(ZeroDivisionError):
            stream.capture(lambda: 1 // 0)

        assert [call for call in driver.calls if call != "cuCtxSetCurrent"][-3:] == [
            "cuStreamBeginCapture",
            "cuStreamEndCapture",
            "cuGraphDestroy",
        ]


def test_everything_is_released_once_and_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    device = cuda_device(monkeypatch, driver)
    early, late = device.allocate(1), device.allocate(1)
    early.close()
    early.close()
    device.close()
    late.close()

    assert driver.calls.count("cuMemFree") == 1
    assert driver.calls.count("cuLibraryUnload") == driver.calls.count("cuDevicePrimaryCtxRelease") == 1


def test_a_build_without_nvcc_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    extension = SimpleNamespace(origin=str(tmp_path / "_kernels.so"))
    monkeypatch.setattr(cuda, "find_spec", lambda name: extension)
    with pytest.raises(UserError, match=r"kernels.fatbin is missing: tubelet was built without nvcc"):
        cuda.fatbin()
