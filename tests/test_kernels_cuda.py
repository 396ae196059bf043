"""The CUDA kernels, compiled as host code, give the bits of the NumPy implementation.

Proves: parity on random shapes, dtypes, misalignments and row strides, with grids of the usual size and of one block;
16 bytes at a time wherever alignment allows; distances past 2^31 elements; checks before every launch; and that the
tests for GPUs pass through cuda-python on a driver of host memory. Under sanitizers:
  cmake -B build -DTUBELET_TESTS=ON -DTUBELET_SANITIZE=ON && cmake --build build
  LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
    TUBELET_CUDA_HOST=$PWD/build/cuda_host pytest tests/test_kernels_cuda.py

Run: pytest tests/test_kernels_cuda.py
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import device_checks as checks
import numpy as np
import pytest
from fake_device import FakeDevice, FakeStream
from hypothesis import given, settings

from tubelet.runtime import cuda, kernels
from tubelet.runtime.errors import UserError
from tubelet.runtime.memory import DeviceArray

F32, F16, BF16 = checks.DTYPES


@pytest.fixture(scope="module", params=["usual grids", "one block"])
def device(request: pytest.FixtureRequest, cuda_host: ctypes.CDLL) -> Iterator[FakeDevice]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "one block":
            launch = FakeStream.launch
            patch.setattr(FakeStream, "launch", lambda self, name, _, *rest: launch(self, name, (1, 1, 1), *rest))
        yield FakeDevice(cuda_host)


@given(case=checks.packings())
@settings(max_examples=200, deadline=None)
def test_pack_and_unpack_are_numpys(device: FakeDevice, case: dict[str, Any]) -> None:
    checks.check_packing(device, **case)


@given(case=checks.steps())
@settings(max_examples=200, deadline=None)
def test_guided_step_is_numpys(device: FakeDevice, case: dict[str, Any]) -> None:
    checks.check_guided_step(device, **case)


@given(case=checks.tables)
@settings(deadline=None)
def test_rope3d_is_its_definition(device: FakeDevice, case: dict[str, Any]) -> None:
    checks.check_rope3d(device, **case)


@pytest.mark.parametrize("head_dim", [6, 64, 128])
def test_rope3d_gives_the_extensions_bits(device: FakeDevice, head_dim: int) -> None:
    """The host has no other cosine; a GPU's is within the tolerance of `check_rope3d`."""
    options: dict[str, Any] = {"theta": 1e4, "offset": (0.5, 0, -3)}
    with device.stream() as stream:
        ours = kernels.rope3d((3, 5, 7), head_dim, stream=stream, **options)
        for one, other in zip(ours, kernels.rope3d((3, 5, 7), head_dim, **options), strict=True):
            np.testing.assert_array_equal(one.to_host(stream), other)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_16_bit_values_are_read_and_rounded_exactly(device: FakeDevice, dtype: Any) -> None:
    checks.check_16_bit_values(device, dtype)


# ---- which kernel runs ----


@pytest.mark.parametrize(
    ("dtype", "width", "shift", "kernel"),
    [
        (F32, 1, 0, "32x4"),
        (F32, 2, 0, "64x2"),  # Wan's patches
        (F32, 4, 0, "128x1"),
        (F16, 1, 0, "16x8"),
        (BF16, 2, 0, "32x4"),
        (F16, 4, 0, "64x2"),
        (F16, 8, 0, "128x1"),
        (F32, 3, 0, "32x1"),  # no power of two
        (F32, 2, 1, "32x1"),  # starts between two accesses
        (BF16, 2, 1, "16x1"),
    ],
)
def test_packing_takes_16_bytes_where_it_can(
    cuda_host: ctypes.CDLL, dtype: Any, width: int, shift: int, kernel: str
) -> None:
    device, grid, patch = FakeDevice(cuda_host), (1, 2, 8), (1, 2, width)

    checks.check_packing(device, 0, dtype, 8, grid, patch, shifts=(shift, 0), extra=0)

    assert device.launched == [f"tubelet_pack_{kernel}", f"tubelet_unpack_{kernel}"]


@pytest.mark.parametrize(
    ("dtype", "width", "shift", "extra", "kernel"),
    [
        (F32, 64, 0, 0, "f32x4"),
        (F16, 64, 0, 0, "f16x8"),
        (BF16, 64, 0, 16, "bf16x8"),
        (F32, 62, 0, 0, "f32x1"),  # tokens end between two accesses
        (F16, 64, 1, 0, "f16x1"),
        (BF16, 64, 0, 17, "bf16x1"),
    ],
)
def test_guided_step_takes_16_bytes_where_it_can(
    cuda_host: ctypes.CDLL, dtype: Any, width: int, shift: int, extra: int, kernel: str
) -> None:
    device = FakeDevice(cuda_host)

    checks.check_guided_step(device, 0, 5, width, 2, 2, 2, dtype, shift, extra)

    assert device.launched == [f"tubelet_guided_step_{kernel}"]


@pytest.mark.parametrize(("head_dim", "kernel"), [(128, "f32x4"), (64, "f32x4"), (62, "f32x1")])
def test_rope3d_takes_16_bytes_where_it_can(cuda_host: ctypes.CDLL, head_dim: int, kernel: str) -> None:
    device = FakeDevice(cuda_host)
    with device.stream() as stream:
        kernels.rope3d((2, 3, 4), head_dim, stream=stream)
        stream.synchronize()

    assert device.launched == [f"tubelet_rope3d_{kernel}"]


# ---- sizes ----


@pytest.mark.parametrize("channels", [4, 3])
def test_rows_may_lie_past_32_bits(cuda_host: ctypes.CDLL, channels: int) -> None:
    """Four rows 2^30 elements apart: pages that nobody touches take no memory."""
    apart, device = 1 << 30, FakeDevice(cuda_host)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = np.frombuffer(mmap.mmap(-1, 3 * 4 * apart + 4096, flags=flags), F32)
    address = memory.ctypes.data
    values = np.arange(channels * 4, dtype=F32).reshape(channels, 1, 1, 4)
    with device.stream() as stream:
        latent = DeviceArray.from_host(values, stream)
        rows = DeviceArray(latent.buffer, address, (4, channels), F32, (4 * apart, 4))

        kernels.pack(latent, (1, 1, 1), out=rows, stream=stream)
        back = kernels.unpack(rows, channels, (1, 1, 4), (1, 1, 1), stream=stream).to_host(stream)

    np.testing.assert_array_equal(back, values)
    np.testing.assert_array_equal(memory[3 * apart :][:channels], values[:, 0, 0, 3])


# ---- through the driver ----


def test_the_tests_for_gpus_pass_on_a_driver_of_host_memory(cuda_host: ctypes.CDLL) -> None:
    pytest.importorskip("cuda.bindings.driver")
    try:
        cuda.fatbin()
    except UserError as error:
        pytest.skip(str(error))
    environment = os.environ | {"LD_LIBRARY_PATH": str(Path(cuda_host._name).parent)}
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent / "gpu" / "test_kernels_gpu.py")]

    result = subprocess.run(command, env=environment, text=True, capture_output=True)

    assert result.returncode == 0 and "7 passed, 1 skipped" in result.stdout, result.stdout + result.stderr


# ---- errors ----


def test_arguments_are_checked_before_anything_is_queued(cuda_host: ctypes.CDLL) -> None:
    device = FakeDevice(cuda_host)
    with device.stream() as stream:
        latent = DeviceArray.empty(device, (4, 1, 6, 6), F32)
        rows = DeviceArray.empty(device, (9, 15), F32)
        x, tokens = DeviceArray.empty(device, (4, 6), F32), DeviceArray.empty(device, (1, 4, 6), F16)
        with pytest.raises(ValueError, match="tokens must have at least 16 values a token, has 15"):
            kernels.pack(latent, (1, 2, 2), out=rows, stream=stream)
        with pytest.raises(ValueError, match="latent must be float32, float16 or bfloat16"):
            kernels.pack(DeviceArray.empty(device, (4, 1, 6, 6), np.int8), (1, 2, 2), stream=stream)
        with pytest.raises(ValueError, match="latent must not overlap tokens"):
            kernels.unpack(latent.reshape(9, 16), 4, (1, 3, 3), (1, 2, 2), out=latent, stream=stream)
        with pytest.raises(ValueError, match="tokens must be float32, is float16"):
            kernels.guided_step([x], DeviceArray.empty(device, (1, 4, 6), F32), tokens, [[1, 0]], stream=stream)
        with pytest.raises(ValueError, match="state must be x and at most 4 history buffers, has 6 arrays"):
            kernels.guided_step([x] * 6, tokens, tokens, [[1, 0]], stream=stream)
        with pytest.raises(ValueError, match="latent must have at most 4 axes, has 5"):
            kernels.pack(latent.reshape(1, 4, 1, 6, 6), (1, 2, 2), out=rows, stream=stream)
        stream.synchronize()

    assert device.launched == []


def test_memory_and_stream_must_match(cuda_host: ctypes.CDLL) -> None:
    device = FakeDevice(cuda_host)
    with device.stream() as stream:
        latent = np.zeros((4, 1, 6, 6), F32)
        with pytest.raises(ValueError, match="stream must be given for arrays in device memory, and only for them"):
            kernels.pack(latent, (1, 2, 2), stream=stream)
        with pytest.raises(ValueError, match="stream must be given for arrays in device memory, and only for them"):
            kernels.unpack(DeviceArray.empty(device, (9, 16), F32), 4, (1, 3, 3), (1, 2, 2))
