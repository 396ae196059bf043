"""What the kernels must do on any device: the bits of the NumPy implementation, and no byte touched beyond the arrays.

Every argument is a twin: the same memory on the host and on the device, where an array starts anywhere and rows lie any
distance apart. Both sides run, then the whole memory is compared.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import reference_kernels as reference
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_kernels import ROPE_TOLERANCE, assert_close, bits, make_step

from tubelet.runtime import kernels, kernels_numpy
from tubelet.runtime.kernels_cuda import StreamKernels
from tubelet.runtime.memory import Device, DeviceArray, Stream

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


@dataclass
class Twin:
    memory: NDArray[Any]  # all there is, around the array too
    host: NDArray[Any]
    device: DeviceArray

    def check(self, stream: Stream) -> None:
        whole = DeviceArray(self.device.buffer, self.device.buffer.pointer, self.memory.shape, self.memory.dtype, (1,))
        np.testing.assert_array_equal(whole.to_host(stream), self.memory)
        self.device.close()


def twin(values: NDArray[Any], stream: Stream, shift: int = 0, extra: int = 0) -> Twin:
    """An array `shift` elements into its memory, whose rows lie `extra` elements further apart than they are long."""
    *leading, width = values.shape
    strides = [values.itemsize]
    for extent in (width + extra, *reversed(leading[1:]))[: len(leading)]:
        strides.insert(0, strides[0] * extent)
    last = sum((extent - 1) * stride for extent, stride in zip(values.shape, strides, strict=True))
    size = last + values.itemsize if values.size else 0
    memory = np.random.default_rng(0).integers(0, 256, shift * values.itemsize + size, np.uint8)
    host = np.ndarray(values.shape, values.dtype, memory, shift * values.itemsize, tuple(strides))
    host[...] = values
    whole = DeviceArray.from_host(memory, stream)
    stream.synchronize()
    start = whole.pointer + shift * values.itemsize
    return Twin(memory, host, DeviceArray(whole.buffer, start, values.shape, values.dtype, tuple(strides)))


def as_bits(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(np.uint16) if array.dtype == DTYPES[2] else array


@st.composite
def packings(draw: st.DrawFn) -> dict[str, Any]:
    """Half of them may be moved 16 bytes at a time, unless the row or the shift spoils it."""
    unit = draw(st.sampled_from([1, 8]))
    grid = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4).map(lambda w: unit * w)))
    return {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "channels": unit * draw(st.integers(1, 3)),
        "grid": grid,
        "patch": draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 2, 4, 3]))),
        "shifts": draw(st.tuples(*[st.sampled_from([0, 0, unit, 1])] * 2)),
        "extra": draw(st.sampled_from([0, unit, 5])),
    }


def check_packing(
    device: Device, seed: int, dtype: Any, channels: int, grid: Any, patch: Any, shifts: Any, extra: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (channels, *(g * p for g, p in zip(grid, patch, strict=True)))
    values = rng.standard_normal(shape).astype(dtype)
    rows = np.zeros((math.prod(grid), channels * math.prod(patch)), dtype)
    with device.stream() as stream:
        latent, tokens = twin(values, stream, shifts[0]), twin(rows, stream, shifts[1], extra)
        back = twin(np.zeros_like(values), stream, shifts[0])

        kernels.pack(latent.device, patch, out=tokens.device, stream=stream)
        kernels.unpack(tokens.device, channels, grid, patch, out=back.device, stream=stream)

        kernels_numpy.pack(as_bits(tokens.host), as_bits(latent.host), patch)
        back.host[...] = values
        for each in (latent, tokens, back):
            each.check(stream)


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    unit = draw(st.sampled_from([1, 8]))
    return {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "count": draw(st.integers(0, 9)),
        "width": unit * draw(st.one_of(st.integers(1, 9), st.sampled_from([24, 190]))),
        "history": draw(st.integers(0, 4)),
        "batch": draw(st.integers(1, 2)),
        "mode": draw(st.integers(0, 2)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "shift": draw(st.sampled_from([0, 0, unit, 1])),
        "extra": draw(st.sampled_from([0, unit, 5])),
        "stored": draw(st.booleans()),
    }


def check_guided_step(
    device: Device,
    seed: int,
    count: int,
    width: int,
    history: int,
    batch: int,
    mode: int,
    dtype: Any,
    shift: int,
    extra: int,
    stored: bool = False,
) -> None:
    """With `stored` the kernel reads its arguments from device memory."""
    step = make_step(seed, count, width, history, batch, dtype, mode)
    matrix, guidance = step["matrix"].astype(np.float32), step["guidance"]
    scales = step.get("clean_scale", 1.0), step.get("noise_scale", 0.0)
    with device.stream() as stream:
        state = [twin(buffer, stream) for buffer in step["state"]]
        velocity = twin(step["velocity"], stream, shift)
        tokens = twin(np.zeros((batch, count, width), dtype), stream, shift, extra)
        pins = [twin(step[name], stream) if name in step else None for name in ("known", "clean", "noise")]

        arrays = [buffer.device for buffer in state], velocity.device, tokens.device, matrix
        told = {
            "guidance": guidance,
            **dict(zip(("known", "clean", "noise"), [pin and pin.device for pin in pins], strict=True)),
            **dict(zip(("clean_scale", "noise_scale"), scales, strict=True)),
        }
        if stored:
            symbol, grid, block, arguments = StreamKernels(stream).guided_step_launch(*arrays, **told)
            place = DeviceArray.from_host(np.frombuffer(arguments, np.uint8), stream)
            stream.launch(f"{symbol}_at", grid, block, struct.pack("P", place.pointer))
        else:
            kernels.guided_step(*arrays, **told, stream=stream)

        hosts = [pin and pin.host for pin in pins]
        buffers = [buffer.host for buffer in state]
        kernels_numpy.guided_step(
            buffers, as_bits(velocity.host), as_bits(tokens.host), matrix, guidance, *hosts, *scales
        )
        for each in (*state, velocity, tokens, *(pin for pin in pins if pin)):
            each.check(stream)


tables = st.fixed_dictionaries(
    {
        "grid": st.tuples(*[st.integers(1, 5)] * 3),
        "head_dim": st.integers(6, 64).map(lambda half: 2 * half),
        "theta": st.floats(10.0, 1e6),
        "offset": st.tuples(*[st.floats(-1000, 1000)] * 3),
        "ntk": st.tuples(*[st.floats(0.5, 8.0)] * 3),
    }
)


def check_rope3d(device: Device, grid: Any, head_dim: int, theta: float, offset: Any, ntk: Any) -> None:
    with device.stream() as stream:
        tables = kernels.rope3d(grid, head_dim, theta=theta, offset=offset, ntk=ntk, stream=stream)
        for table, expected in zip(tables, reference.rope3d(grid, head_dim, theta, offset, ntk), strict=True):
            assert_close(table.to_host(stream), expected, ROPE_TOLERANCE)
            table.close()


def check_16_bit_values(device: Device, dtype: Any) -> None:
    """Every value is read exactly, and written back as it was; float32 values round half to even."""
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(1, 256, 256)
    rng = np.random.default_rng(5)
    with np.errstate(all="ignore"):
        ties = (every.astype(np.float32) + np.roll(every.astype(np.float32), -1)) / 2
        patterns = rng.integers(0, 1 << 32, ties.shape, dtype=np.uint32).view(np.float32)
        for values in (ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf), patterns):
            with device.stream() as stream:
                read, x = DeviceArray.from_host(every, stream), DeviceArray.from_host(values[0], stream)
                written = DeviceArray.empty(device, every.shape, dtype)

                kernels.guided_step([x], read, written, [[1, 0]], stream=stream)  # rounds x
                rounded = written.to_host(stream)
                kernels.guided_step([x], read, written, [[0, 1]], stream=stream)  # takes the velocity
                taken, back = x.to_host(stream), written.to_host(stream)

            np.testing.assert_array_equal(rounded.astype(np.float32), values.astype(dtype).astype(np.float32))
            np.testing.assert_array_equal(taken, every[0].astype(np.float32))
            number = ~np.isnan(taken)
            np.testing.assert_array_equal(bits(back[0])[number], bits(every[0])[number])
