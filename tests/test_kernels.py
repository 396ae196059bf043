"""The kernels do what their definitions say, compiled and in NumPy, on random shapes, dtypes and strides.

Proves: parity with plain references, diffusers' rotary tables and torch's Conv3d; rounding to 16 bits exactly as NumPy
and ml_dtypes; both implementations give the same bits; wrong arguments are named.

Run: pytest tests/test_kernels.py
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference_kernels as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tubelet.runtime import _kernels as compiled
from tubelet.runtime import kernels, kernels_numpy

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
# Both sides compute the table in float64 and round once, to within half a unit of float32 at 1: 2^-25 each.
ROPE_TOLERANCE = 2.0**-24
# A sum of at most 6 products of guided values: at most 10 roundings of 2^-24 of the terms' sizes each.
STEP_TOLERANCE = 10 * 2.0**-24

triples = st.tuples(*[st.integers(1, 4)] * 3)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", params=[compiled, kernels_numpy], ids=["extension", "numpy"])
def implementation(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_implementation", request.param)
        yield request.param


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
    return rng.standard_normal(shape).astype(dtype)


def bits(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def wide_rows(rows: tuple[int, ...], width: int, extra: int, dtype: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """A buffer filled with 7 and its view [*rows, width]: rows lie `extra` apart, and start off any alignment."""
    buffer = np.full((*rows, width + extra), 7, dtype)
    return buffer, buffer[..., extra // 2 : extra // 2 + width]


def assert_close(actual: NDArray[Any], expected: NDArray[Any], tolerance: Any) -> None:
    difference = np.abs(actual.astype(np.float64) - expected)
    assert np.all(difference <= tolerance), f"difference: max {difference.max()}, mean {difference.mean()}"


# ---- rope3d ----


@given(
    grid=triples,
    head_dim=st.integers(1, 64).map(lambda half: 2 * half),
    theta=st.floats(10.0, 1e6),
    offset=st.tuples(*[st.floats(-1000, 1000)] * 3),
    ntk=st.tuples(*[st.floats(0.5, 8.0)] * 3),
)
def test_rope3d_is_its_definition(
    implementation: ModuleType, grid: Any, head_dim: int, theta: float, offset: Any, ntk: Any
) -> None:
    ntk = ntk if head_dim >= 12 else (1.0, 1.0, 1.0)

    cos, sin = kernels.rope3d(grid, head_dim, theta=theta, offset=offset, ntk=ntk)

    expected_cos, expected_sin = reference.rope3d(grid, head_dim, theta, offset, ntk)
    assert cos.dtype == sin.dtype == np.float32
    assert_close(cos, expected_cos, ROPE_TOLERANCE)
    assert_close(sin, expected_sin, ROPE_TOLERANCE)


def test_rope3d_equals_wan(implementation: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan").WanRotaryPosEmbed(128, (1, 2, 2), 1024)
    video = torch.empty(1, 16, 21, 60, 104)

    cos, sin = kernels.rope3d((21, 30, 52), 128)

    for ours, theirs in zip((cos, sin), wan(video), strict=True):  # theirs repeats each column for both values it turns
        assert_close(ours, theirs[0, :, 0, ::2].double().numpy(), ROPE_TOLERANCE)


def test_rope3d_stretches_like_cosmos(implementation: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")
    stretch = (2.0, 1.5, 3.0)
    cosmos = module.CosmosRotaryPosEmbed(128, rope_scale=stretch)

    cos, sin = kernels.rope3d((9, 30, 52), 128, ntk=stretch)

    for ours, theirs in zip((cos, sin), cosmos(torch.empty(1, 16, 9, 60, 104)), strict=True):
        # Cosmos has angles in float32: up to 52, where one unit is 2^-18, from a frequency that is a few units off.
        assert_close(ours, theirs[:, :64].double().numpy(), 2.0**-16)


def test_rope3d_writes_into_out(implementation: ModuleType) -> None:
    out = np.empty((24, 8), np.float32), np.empty((24, 8), np.float32)

    cos, sin = kernels.rope3d((2, 3, 4), 16, out=out)

    assert cos is out[0] and sin is out[1]
    assert_close(cos**2 + sin**2, np.ones((24, 8)), 1e-6)


# ---- pack and unpack ----


@given(
    seed=seeds,
    channels=st.integers(1, 5),
    grid=triples,
    patch=triples,
    extra=st.integers(0, 5),
    index=st.integers(0, 2),
)
def test_pack_and_unpack_are_their_definition(
    implementation: ModuleType, seed: int, channels: int, grid: Any, patch: Any, extra: int, index: int
) -> None:
    shape = (channels, *(g * p for g, p in zip(grid, patch, strict=True)))
    latent = normal(np.random.default_rng(seed), shape, DTYPES[index])
    expected = reference.pack(latent, patch)
    buffer, out = wide_rows(expected.shape[:1], expected.shape[1], extra, latent.dtype)

    tokens = kernels.pack(latent, patch, out=out)
    back = kernels.unpack(tokens, channels, grid, patch)

    assert tokens is out
    np.testing.assert_array_equal(bits(tokens), bits(expected))
    assert np.count_nonzero(buffer == 7) >= extra * len(tokens), "values beyond the rows were written"
    np.testing.assert_array_equal(bits(back), bits(latent))
    np.testing.assert_array_equal(bits(kernels.pack(latent, patch)), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 4)], ids=str)
@pytest.mark.parametrize("extra", [0, 3])
def test_large_latents_round_trip(implementation: ModuleType, dtype: Any, patch: Any, extra: int) -> None:
    """Past 16 MiB results bypass the cache, a whole cache line at a time: odd widths cut lines everywhere."""
    grid = tuple(size // p for size, p in zip((26, 260, 172), patch, strict=True))
    latent = normal(np.random.default_rng(0), (8, *(g * p for g, p in zip(grid, patch, strict=True))), dtype)
    values = 8 * int(np.prod(patch))
    _, out = wide_rows((int(np.prod(grid)),), values, extra, dtype)

    tokens = kernels.pack(latent, patch, out=out)
    back = kernels.unpack(tokens, 8, grid, patch)

    corner = tuple(slice(p * (g - 1), p * g) for g, p in zip(grid, patch, strict=True))
    np.testing.assert_array_equal(bits(tokens[-1]), bits(latent[:, *corner].ravel()))
    np.testing.assert_array_equal(bits(back), bits(latent))


def test_packed_tokens_are_what_a_convolution_sees(implementation: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    patch = (1, 2, 2)
    convolution = torch.nn.Conv3d(16, 32, patch, stride=patch, bias=False, dtype=torch.float64)
    latent = normal(np.random.default_rng(1), (16, 3, 6, 10))

    tokens = kernels.pack(latent, patch)

    expected = convolution(torch.from_numpy(latent)[None].double())[0].flatten(1).T  # [32,T,H,W] -> [N,32]
    weight = convolution.weight.detach().flatten(1).numpy()
    assert_close(tokens @ weight.T, expected.detach().numpy(), 1e-12)  # float64 sums of 64 products near 0.1


# ---- guided_step ----


def make_step(seed: int, count: int, width: int, history: int, batch: int, dtype: Any, mode: int) -> dict[str, Any]:
    """Random arguments; `mode` 0 has no known tokens, 1 has clean ones, 2 has noisy ones."""
    rng = np.random.default_rng(seed)
    matrix = normal(rng, (history + 1, history + 2))
    matrix[rng.random(matrix.shape) < 0.4] = 0
    for row in range(history + 1):
        if rng.random() < 0.3:
            matrix[row] = np.eye(1, history + 2, row)
    known = {"known": (rng.random(count) < 0.5).astype(np.float32), "clean": normal(rng, (count, width))}
    noisy = {"noise": normal(rng, (count, width)), "noise_scale": 0.7}
    return {
        "state": [normal(rng, (count, width)) for _ in range(history + 1)],
        "velocity": normal(rng, (batch, count, width), dtype),
        "matrix": matrix,
        "guidance": float(rng.uniform(-1, 8)),
        **(known if mode else {}),
        **({"clean_scale": 0.3} if mode == 2 else {}),
        **(noisy if mode == 2 else {}),
    }


def expected_step(step: dict[str, Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    names = ("state", "velocity", "matrix", "guidance", "known", "clean", "noise")
    return reference.guided_step(
        *(step.get(name) for name in names), step.get("clean_scale", 1.0), step.get("noise_scale", 0.0)
    )


@given(
    seed=seeds,
    count=st.integers(0, 9),
    width=st.one_of(st.integers(1, 70), st.sampled_from([192, 1500, 2500])),
    history=st.integers(0, 4),
    batch=st.integers(1, 2),
    mode=st.integers(0, 2),
    extra=st.integers(0, 5),
    index=st.integers(0, 2),
)
@settings(max_examples=200)
def test_guided_step_is_its_definition(
    implementation: ModuleType,
    seed: int,
    count: int,
    width: int,
    history: int,
    batch: int,
    mode: int,
    extra: int,
    index: int,
) -> None:
    step = make_step(seed, count, width, history, batch, DTYPES[index], mode)
    expected, sizes = expected_step(step)
    buffer, tokens = wide_rows((batch, count), width, extra, DTYPES[index])

    kernels.guided_step(tokens=tokens, **step)

    assert_close(np.stack(step["state"]), expected, STEP_TOLERANCE * sizes)
    np.testing.assert_array_equal(bits(tokens[0]), bits(step["state"][0].astype(DTYPES[index])))
    np.testing.assert_array_equal(bits(tokens[-1]), bits(tokens[0]))
    assert np.count_nonzero(buffer == 7) >= batch * count * extra, "values beyond the rows were written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "width", "extra"), [(11, 17, 3), (30_000, 97, 0), (30_000, 64, 2)])
def test_implementations_give_the_same_bits(dtype: Any, count: int, width: int, extra: int) -> None:
    outcomes = []
    for implementation in (compiled, kernels_numpy):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_implementation", implementation)
            step = make_step(3, count, width, 3, 2, dtype, 2)
            buffer, tokens = wide_rows((2, count), width, extra, dtype)
            kernels.guided_step(tokens=tokens, **step)
            outcomes.append([*step["state"], buffer])

    for one, other in zip(*outcomes, strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_value_is_read_exactly(implementation: ModuleType, dtype: Any) -> None:
    velocity = np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(1, 256, 256)
    x, tokens = np.zeros((256, 256), np.float32), np.empty((1, 256, 256), dtype)

    kernels.guided_step([x], velocity, tokens, [[0, 1]])

    np.testing.assert_array_equal(x, velocity[0].astype(np.float32))  # which takes NaNs as equal
    np.testing.assert_array_equal(tokens.astype(np.float32), velocity.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounding_is_half_to_even(implementation: ModuleType, dtype: Any) -> None:
    patterns = np.random.default_rng(5).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    exact = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    with np.errstate(all="ignore"):  # halfway to the neighbour, and just beside it
        ties = (exact + np.roll(exact, -1)) / 2
    values = np.concatenate([patterns.view(np.float32), ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf)])
    x, tokens = values.reshape(256, -1), np.empty((1, 256, values.size // 256), dtype)

    kernels.guided_step([x], np.zeros_like(tokens), tokens, [[1, 0]])

    with np.errstate(all="ignore"):
        expected = values.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(tokens.ravel().astype(np.float32), expected)


def test_overlapping_arrays_are_refused(implementation: ModuleType) -> None:
    memory = np.zeros(64, np.float32)
    latent, rows, table = memory.reshape(4, 1, 4, 4), memory.reshape(4, 16), memory[:18].reshape(6, 3)
    x, velocity = np.zeros((4, 6), np.float32), np.zeros((1, 4, 6), np.float32)
    with pytest.raises(ValueError, match="tokens must not overlap latent"):
        kernels.pack(latent, (1, 2, 2), out=rows)
    with pytest.raises(ValueError, match="latent must not overlap tokens"):
        kernels.unpack(rows, 4, (1, 2, 2), (1, 2, 2), out=latent)
    with pytest.raises(ValueError, match="sin must not overlap cos"):
        kernels.rope3d((1, 2, 3), 6, out=(table, table))
    with pytest.raises(ValueError, match="tokens must not overlap velocity"):
        kernels.guided_step([x], velocity, velocity, [[1, 0]])
    with pytest.raises(ValueError, match=r"tokens must not overlap state\[0\]"):
        kernels.guided_step([x], velocity, x[None], [[1, 0]])


def test_unused_buffers_are_not_read(implementation: ModuleType) -> None:
    x, history = np.ones((2, 3), np.float32), np.full((2, 3), np.nan, np.float32)
    tokens = np.zeros((1, 2, 3), np.float32)

    kernels.guided_step([x, history], np.ones((1, 2, 3), np.float32), tokens, [[1, 0, 0.5], [0, 0, 1]])

    np.testing.assert_array_equal(x, np.full((2, 3), 1.5))
    np.testing.assert_array_equal(history, np.ones((2, 3)))


# ---- without the extension ----


def test_numpy_takes_over_where_the_extension_is_absent() -> None:
    code = (
        "import sys; sys.modules['tubelet.runtime._kernels'] = None\n"
        "from tubelet.runtime import kernels\n"
        "assert kernels.IMPLEMENTATION == 'numpy', kernels.IMPLEMENTATION\n"
        "assert kernels.rope3d((1, 2, 3), 8)[0].shape == (6, 4)"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


# ---- errors ----

f32 = np.float32


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state", {"state": []}),
        ("state[1]", {"state": [np.zeros((4, 6), f32), np.zeros((4, 6))]}),
        ("state[1]", {"state": [np.zeros((4, 6), f32), np.zeros((5, 6), f32)]}),
        ("state[0]", {"state": [np.zeros((6, 4), f32).T, np.zeros((4, 6), f32)]}),
        ("state[1]", {"state": [np.zeros((4, 6), f32)] * 2}),
        ("state[0]", {"state": [np.broadcast_to(f32(0), (4, 6)), np.zeros((4, 6), f32)]}),
        ("velocity", {"velocity": np.zeros((3, 4, 6), f32)}),
        ("velocity", {"velocity": np.zeros((2, 4, 6), np.int32)}),
        ("velocity", {"velocity": np.zeros((2, 4, 12), f32)[..., ::2]}),
        ("tokens", {"tokens": np.zeros((2, 4, 6), np.float16)}),
        ("tokens", {"tokens": np.zeros((1, 4, 6), f32)}),
        ("tokens", {"tokens": np.zeros((2, 4, 5), f32)}),
        ("tokens", {"tokens": np.zeros((2, 4, 6), f32)[:, ::-1]}),
        ("matrix", {"matrix": np.zeros((2, 2), f32)}),
        ("known", {"known": np.zeros(5, f32)}),
        ("known", {"known": np.zeros(4, bool)}),
        ("clean", {"clean": None}),
        ("clean", {"clean": np.zeros((4, 5), f32)}),
        ("noise", {"noise": None, "noise_scale": 1.0}),
    ],
)
def test_guided_step_names_the_wrong_argument(implementation: ModuleType, name: str, change: dict[str, Any]) -> None:
    step = make_step(0, 4, 6, 1, 2, f32, 2) | {"tokens": np.zeros((2, 4, 6), f32)}

    with pytest.raises(ValueError, match=rf"^{name.replace('[', chr(92) + '[')} "):
        kernels.guided_step(**(step | change))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("head_dim", lambda: kernels.rope3d((1, 2, 3), 7)),
        ("grid", lambda: kernels.rope3d((1, 0, 3), 8)),
        ("grid", lambda: kernels.rope3d((1, 3), 8)),  # type: ignore[arg-type]
        ("theta", lambda: kernels.rope3d((1, 2, 3), 8, theta=-1.0)),
        ("ntk", lambda: kernels.rope3d((1, 2, 3), 8, ntk=(1.0, 2.0, 1.0))),
        ("sin", lambda: kernels.rope3d((1, 2, 3), 8, out=(np.empty((6, 4), f32), np.empty((6, 5), f32)))),
        ("cos", lambda: kernels.rope3d((1, 2, 3), 8, out=(np.empty((6, 4)), np.empty((6, 4), f32)))),
        ("latent", lambda: kernels.pack(np.zeros((4, 6, 6), f32), (1, 2, 2))),
        ("latent", lambda: kernels.pack(np.zeros((4, 1, 5, 6), f32), (1, 2, 2))),
        ("latent", lambda: kernels.pack(np.zeros((4, 1, 6, 6)), (1, 2, 2))),
        ("latent", lambda: kernels.pack(np.zeros((4, 1, 6, 6), f32)[..., ::-1], (1, 2, 2))),
        ("patch", lambda: kernels.pack(np.zeros((4, 1, 6, 6), f32), (1, 0, 2))),
        ("tokens", lambda: kernels.pack(np.zeros((4, 1, 6, 6), f32), (1, 2, 2), out=np.zeros((9, 15), f32))),
        ("tokens", lambda: kernels.unpack(np.zeros((8, 16), f32), 4, (1, 3, 3), (1, 2, 2))),
        (
            "out",
            lambda: kernels.unpack(np.zeros((9, 16), f32), 4, (1, 3, 3), (1, 2, 2), out=np.zeros((4, 1, 6, 7), f32)),
        ),
    ],
)
def test_the_others_name_the_wrong_argument(implementation: ModuleType, name: str, call: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} "):
        call()
