"""The CUDA kernels on a GPU, through the driver: the checks that `tests/test_kernels_cuda.py` runs on the host.

Proves, where there is a GPU: parity with NumPy, bit for bit but for the rotary table's last unit; more than 2^31
elements; a captured graph replays, also where memory was freed during the capture. Skipped elsewhere.

Run: pytest -m gpu tests/gpu
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import device_checks as checks
import numpy as np
import pytest
from hypothesis import given, settings

from tubelet.runtime import kernels
from tubelet.runtime.cuda import CudaDevice
from tubelet.runtime.errors import UserError
from tubelet.runtime.memory import DeviceArray

pytestmark = pytest.mark.gpu
F32, F16, BF16 = checks.DTYPES


@pytest.fixture(scope="module")
def device() -> Iterator[CudaDevice]:
    try:
        device = CudaDevice()
    except UserError as error:
        pytest.skip(str(error))
    with device:
        yield device


@given(case=checks.packings())
@settings(max_examples=200, deadline=None)
def test_pack_and_unpack_are_numpys(device: CudaDevice, case: dict[str, Any]) -> None:
    checks.check_packing(device, **case)


@given(case=checks.steps())
@settings(max_examples=200, deadline=None)
def test_guided_step_is_numpys(device: CudaDevice, case: dict[str, Any]) -> None:
    checks.check_guided_step(device, **case)


@given(case=checks.tables)
@settings(deadline=None)
def test_rope3d_is_its_definition(device: CudaDevice, case: dict[str, Any]) -> None:
    checks.check_rope3d(device, **case)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_16_bit_values_are_read_and_rounded_exactly(device: CudaDevice, dtype: Any) -> None:
    checks.check_16_bit_values(device, dtype)


def test_more_than_32_bits_of_elements(device: CudaDevice) -> None:
    """A gigantic latent there and back, 16-bit as it would be."""
    channels, grid, patch = 16, (1025, 256, 128), (1, 2, 2)
    size = channels * grid[0] * 512 * 256
    assert size > 1 << 31
    if device.memory().free < 3 * 2 * size:
        pytest.skip("too little device memory")
    values = np.arange(size, dtype=np.uint16).reshape(channels, grid[0], 512, 256)
    with device.stream() as stream:
        latent = DeviceArray.from_host(values, stream)
        tokens = kernels.pack(latent, patch, stream=stream)
        back = kernels.unpack(tokens, channels, grid, patch, stream=stream)
        np.testing.assert_array_equal(back.to_host(stream), values)
        last = tokens[-1:].to_host(stream)
        np.testing.assert_array_equal(last[0], values[:, -1, -2:, -2:].ravel())
        for array in (latent, tokens, back):
            array.close()


def test_a_captured_step_replays(device: CudaDevice) -> None:
    with device.stream() as stream:
        x = DeviceArray.from_host(np.zeros((6, 8), F32), stream)
        velocity = DeviceArray.from_host(np.ones((1, 6, 8), F16), stream)
        tokens = DeviceArray.empty(device, (1, 6, 8), F16)

        def step() -> None:
            kernels.guided_step([x], velocity, tokens, [[1, 1]], stream=stream)

        step()
        with stream.capture(step) as graph:
            for _ in range(3):
                graph.launch(stream)
            np.testing.assert_array_equal(x.to_host(stream), np.full((6, 8), 4))


def test_memory_may_be_freed_during_a_capture(device: CudaDevice) -> None:
    """As a garbage collection does, whenever it likes."""
    with device.stream() as stream:
        x = DeviceArray.from_host(np.zeros(8, F32), stream)
        source, garbage = DeviceArray.from_host(np.ones(8, F32), stream), DeviceArray.empty(device, (1 << 20,), F32)
        free = device.memory().free

        def work() -> None:
            garbage.close()
            x.copy_from(source, stream)

        with stream.capture(work) as graph:
            np.testing.assert_array_equal(x.to_host(stream), 0)
            assert device.memory().free >= free + garbage.nbytes
            graph.launch(stream)
            np.testing.assert_array_equal(x.to_host(stream), 1)
