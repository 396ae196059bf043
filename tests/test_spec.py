"""Specs survive JSON and refuse nonsense; geometry accepts exactly the legal shapes and names the nearest one.

pytest tests/test_spec.py
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tubelet.runtime import UserError
from tubelet.runtime.geometry import coordinate_columns, frames_for, plan
from tubelet.runtime.spec import ModelSpec


def test_spec_survives_json(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("fps",), "24", "spec.fps must be int, is '24'"),
        (("vae", "widths"), [32], "vae.temporal needs 0 entries"),
        (("vae", "widths"), [32, 60, 64], "vae.widths 32 and 60"),
        (("vae", "latent_mean"), [0.0], "vae.latent_mean needs 8 entries"),
        (("denoiser", "heads"), 7, "denoiser.width 192 must be a multiple of twice denoiser.heads 7"),
        (("denoiser", "patch"), [2, 2, 2], "denoiser.patch must hold one latent frame"),
        (("denoiser", "patch"), [1, 2], "spec.denoiser.patch must have 3 entries, has 2"),
        (("denoiser", "text_width"), 5, "denoiser.text_width 5 differs"),
        (("vae", "latent_channels"), True, "spec.vae.latent_channels must be int, is True"),
        (("denoiser", "heads"), 0, "denoiser.heads must be above 0, is 0"),
        (("denoiser", "patch"), [1, 0, 2], "denoiser.patch must be above 0"),
        (("captioner",), [], r"spec.captioner must be an object, is \[\]"),
        (("captioner", "heads"), 3, "captioner.width 128 must be a multiple of captioner.heads 3"),
        (("captioner", "end"), 64, "captioner.end must be from 0 to 63"),
        (("captioner", "length"), 0, "captioner.length must be above 0"),
        (("captioner", "token_values"), 8, "captioner.token_values 8 differs from the denoiser's 32"),
        (("captioner", "vocabulary"), 65, "captioner.vocabulary 65 differs from text_encoder.vocabulary 64"),
        (("text_encoder", "extra"), 1, r"unknown \['extra'\]"),
    ],
)
def test_spec_names_the_wrong_field(spec: ModelSpec, path: tuple[str, ...], value: object, message: str) -> None:
    data = json.loads(json.dumps(spec.to_json()))
    target = data
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value

    with pytest.raises(UserError, match=message):
        ModelSpec.from_json(data)


@given(w=st.integers(1, 8), h=st.integers(1, 8), k=st.integers(0, 16))
def test_legal_shapes_fit_together(w: int, h: int, k: int) -> None:
    spec = embedded_spec()
    geometry = plan(spec, 16 * w, 16 * h, 1 + 4 * k)

    assert geometry.latent == (1 + k, 2 * h, 2 * w)
    assert geometry.grid == (1 + k, h, w)
    assert geometry.tokens == (1 + k) * h * w


@given(width=st.integers(-20, 300), height=st.integers(-20, 300), frames=st.integers(-5, 99))
def test_the_nearest_shape_in_the_message_is_legal(width: int, height: int, frames: int) -> None:
    spec = dataclasses.replace(embedded_spec(), max_tokens=10**6)
    size = {"width": width, "height": height, "frames": frames}
    for _ in range(3):  # each message mends one number
        try:
            plan(spec, **size)
            return
        except UserError as error:
            words = str(error).split()
            name = words[0]
            nearest = int(words[-1])
            assert abs(nearest - size[name]) <= max(8, 17 - size[name])
            size[name] = nearest
    plan(spec, **size)


def test_too_many_tokens_names_the_longest_legal_clip(spec: ModelSpec) -> None:
    small = dataclasses.replace(spec, max_tokens=40)
    with pytest.raises(UserError, match="at 64x64 use at most 5 frames"):
        plan(small, 64, 64, 33)
    assert plan(small, 64, 64, 5).tokens == 32
    with pytest.raises(UserError, match="use at most 96x96"):
        plan(small, 128, 128, 1)


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), tokens=st.integers(1, 500))
def test_the_largest_size_in_the_message_is_legal(width: int, height: int, tokens: int) -> None:
    spec = dataclasses.replace(embedded_spec(), max_tokens=tokens)
    try:
        plan(spec, 16 * width, 16 * height, 1)
        assert width * height <= tokens
    except UserError as error:
        size = str(error).split()[-1]
        assert plan(spec, *map(int, size.split("x")), 1).tokens <= tokens


def test_seconds_become_the_nearest_legal_frames(spec: ModelSpec) -> None:
    assert [frames_for(spec, s, 24) for s in (0.01, 1.0, 1.4, 60)] == [1, 25, 33, 1441]


@given(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)))
def test_coordinates_depend_on_the_place_alone(grid: tuple[int, int, int]) -> None:
    columns = coordinate_columns(grid).reshape(*grid, -1)

    u_t, u_w = columns[..., 0], columns[..., 10]
    np.testing.assert_allclose(u_t.mean(), 0, atol=1e-6)  # centred
    np.testing.assert_allclose(columns[..., 16], u_t * u_w, atol=1e-6)
    assert np.all(np.diff(u_t, axis=0) > 0) and np.all(np.diff(u_w, axis=2) > 0)


def embedded_spec() -> ModelSpec:
    from tubelet.runtime import EMBEDDED, Bundle

    global _SPEC
    _SPEC = _SPEC or Bundle.open(EMBEDDED).spec
    return _SPEC


_SPEC: ModelSpec | None = None
