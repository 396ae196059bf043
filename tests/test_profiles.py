"""Profiles: all traffic is covered, the choice is the best there is, and what is outside is told the nearest shape.

pytest tests/test_profiles.py
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tubelet.export.dit import Denoiser
from tubelet.export.profiles import MIN_TOKENS, choose, component_profiles, flops, partition
from tubelet.export.traffic import Shape, read_traffic
from tubelet.runtime import EMBEDDED, Bundle, Captioner, Pipeline, Request, UserError
from tubelet.runtime.geometry import plan
from tubelet.runtime.profiles import Range, nearest, select
from tubelet.runtime.spec import ModelSpec
from tubelet.runtime.targets import HostEngines

SPEC = Bundle.open(EMBEDDED).spec

legal_shapes = st.builds(
    lambda columns, rows, k, share: Shape(16 * columns, 16 * rows, 1 + 4 * k, share),
    *(st.integers(1, 8), st.integers(1, 8), st.integers(0, 16), st.floats(0.01, 100)),
)
traffics = st.lists(legal_shapes, min_size=1, max_size=8).map(lambda shapes: [Shape(64, 64, 33, 1.0), *shapes])


@settings(deadline=None)
@given(traffic=traffics, limit=st.integers(1, 9))
def test_every_shape_is_covered_or_outside(traffic: list[Shape], limit: int) -> None:
    choice = choose(SPEC, traffic, limit)

    assert all(1 <= len(profiles) <= limit for profiles in choice.profiles.values())
    assert len(choice.served) + len(choice.outside) == len(traffic)
    for served in choice.served:
        tokens, (_, h, w) = served.geometry.tokens, served.geometry.latent
        for rows in (1, 2):  # without guidance and with it
            assert select(choice.profiles["denoiser"], {"B": rows, "N": tokens, "L": 16}) is not None
            assert select(choice.profiles["conditioner"], {"B": rows, "L": 16}) is not None
        for component in ("vae_decoder", "vae_encoder"):
            assert select(choice.profiles[component], {"B": 1, "t": 1, "h": h, "w": w}) is not None
        assert select(choice.profiles["captioner_memory"], {"B": 1, "N": tokens}) is not None
    for outside in choice.outside:
        assert plan(SPEC, outside.shape.width, outside.shape.height, outside.shape.frames).tokens < MIN_TOKENS


@settings(deadline=None)
@given(traffic=traffics)
def test_more_profiles_never_cost_more(traffic: list[Shape]) -> None:
    choices = [choose(SPEC, traffic, limit) for limit in range(1, len(traffic) + 1)]

    costs = [choice.cost for choice in choices]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(costs))
    assert costs[0] == choices[0].cost_of_one
    assert costs[-1] == choices[0].cost_of_all


@settings(deadline=None)
@given(traffic=traffics, limit=st.integers(1, 4))
def test_token_ranges_begin_at_32_or_more_and_leave_no_gap(traffic: list[Shape], limit: int) -> None:
    ranges = [profile["N"] for profile in choose(SPEC, traffic, limit).profiles["denoiser"]]

    assert ranges[0].min >= MIN_TOKENS
    assert all(b.min == a.max + 1 for a, b in itertools.pairwise(ranges))


@settings(deadline=None)
@given(data=st.data(), count=st.integers(1, 6), limit=st.integers(1, 7))
def test_partition_is_as_good_as_trying_everything(data: st.DataObject, count: int, limit: int) -> None:
    penalties = data.draw(
        st.lists(st.lists(st.integers(0, 100), min_size=count, max_size=count), min_size=count, max_size=count)
    )

    def cost(run: tuple[int, ...] | range, opt: int) -> int:
        return sum(penalties[item][opt] for item in run)

    def all_cuts() -> Any:
        for cuts in range(min(limit, count)):
            for inner in itertools.combinations(range(1, count), cuts):
                runs = [range(a, b) for a, b in itertools.pairwise((0, *inner, count))]
                yield sum(min(cost(run, opt) for opt in run) for run in runs), len(runs)

    found = partition(range(count), lambda item, opt: penalties[item][opt], limit)

    assert [item for run, _ in found for item in run] == list(range(count))
    assert all(opt in run for run, opt in found)
    assert (sum(cost(tuple(run), opt) for run, opt in found), len(found)) == min(all_cuts())  # the fewest runs too


def test_the_cost_is_that_of_the_denoisers_matrix_products(spec: ModelSpec) -> None:
    d, length = spec.denoiser, spec.text_encoder.length

    def count(tokens: int) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            cross, table = torch.zeros(d.depth, 1, d.heads, length, d.head_size), torch.zeros(tokens, d.head_size // 2)
            inputs = torch.zeros(1, tokens, d.token_inputs), torch.zeros(1, 2, d.time_features)
            Denoiser(d)(*inputs, table, table, cross, cross, torch.zeros(1, tokens))
        return counter.get_total_flops()

    assert count(64) - count(32) == flops(spec, 64) - flops(spec, 32)  # what does not depend on N is left out
    assert count(128) - count(32) == flops(spec, 128) - flops(spec, 32)


def test_few_requests_share_a_profile_and_many_get_their_own() -> None:
    shapes = [Shape(64, 64, frames, share) for frames, share in ((9, 1), (13, 1), (33, 98), (65, 1))]
    profiles = choose(SPEC, shapes, 2).profiles["denoiser"]

    assert [profile["N"] for profile in profiles] == [Range(48, 144, 144), Range(145, 272, 272)]
    assert [profile["B"] for profile in profiles] == [Range(1, 2, 2)] * 2  # the model's default is guided


def test_the_nearest_optimum_takes_a_run() -> None:
    profiles = [{"N": Range(32, 64, 256)}, {"N": Range(100, 200, 256)}]
    assert [select(profiles, {"N": n}) for n in (31, 32, 100, 120, 256, 257)] == [None, 0, 0, 1, 1, None]


@settings(deadline=None)
@given(
    traffic=traffics, width=st.integers(1, 3000), height=st.integers(1, 3000), frames=st.integers(1, 3000),
    limit=st.integers(1, 4),
)  # fmt: skip
def test_the_nearest_shape_is_legal_and_inside(
    traffic: list[Shape], width: int, height: int, frames: int, limit: int
) -> None:
    profiles = choose(SPEC, traffic, limit).profiles
    found = nearest(SPEC, profiles, width, height, frames)

    assert plan(SPEC, found.width, found.height, found.frames) == found
    assert select(profiles["denoiser"], {"N": found.tokens}) is not None
    assert select(profiles["vae_decoder"], {"h": found.latent[1], "w": found.latent[2]}) is not None
    assert nearest(SPEC, profiles, found.width, found.height, found.frames) == found


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((96, 64, 500), (96, 64, 33)),  # too long: the same picture, shorter
        ((960, 640, 33), (96, 64, 33)),  # too large: the same aspect ratio
        ((64, 96, 33), (64, 80, 33)),  # more upright than any picture inside
        ((95, 65, 30), (96, 64, 29)),  # not legal
        ((96, 64, 1), (96, 64, 5)),  # too few tokens
    ],
)
def test_the_picture_is_kept_before_the_duration(asked: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    traffic = [Shape(96, 64, 33, 1.0), Shape(64, 80, 9, 1.0), Shape(96, 64, 5, 1.0)]
    found = nearest(SPEC, choose(SPEC, traffic, 3).profiles, *asked)
    assert (found.width, found.height, found.frames) == expected


def test_nothing_is_nearest_where_nothing_is_inside() -> None:
    profiles = {"denoiser": [{"N": Range(33, 33, 33)}], "vae_decoder": [{"h": Range(8, 8, 8), "w": Range(8, 8, 8)}]}
    with pytest.raises(UserError, match="no shape of the model tubelet-demo is inside the profiles"):
        nearest(SPEC, profiles, 64, 64, 33)
    with pytest.raises(UserError, match="must be above 0, is 0x64 with 33 frames"):
        nearest(SPEC, profiles, 0, 64, 33)


def test_every_run_of_the_pipeline_is_inside_one_profile(pipeline: Pipeline) -> None:
    bundle = pipeline.bundle
    shapes = component_profiles(bundle.manifest, [Shape(48, 64, 29, 1.0), Shape(64, 64, 21, 3.0)], 2)
    runs: list[tuple[str, dict[str, tuple[int, ...]]]] = []
    engines = {name: _Recorder(pipeline.engines[name], name, runs) for name in bundle.manifest.components}
    recorded = Pipeline(bundle, HostEngines(engines.__getitem__), pipeline.target)

    frames = recorded.generate(Request("a red circle", width=48, height=64, frames=29, steps=1))
    recorded.generate(Request("a red circle", width=64, height=64, frames=21, steps=1, guidance=1.0))
    Captioner(bundle.spec, engines, recorded.tokenizer).caption(recorded.encode(frames), beams=3)

    assert {name for name, _ in runs} == set(bundle.manifest.components) == set(shapes)
    for name, run in runs:
        assert any(
            all(np.all((profile[i][0] <= np.array(s)) & (s <= np.array(profile[i][2]))) for i, s in run.items())
            for profile in shapes[name]
        ), (name, run)
    for component, profiles in shapes.items():
        for profile in profiles:
            assert set(profile) == set(bundle.manifest.components[component].inputs)
            for least, usual, most in profile.values():
                assert all(1 <= a <= b <= c for a, b, c in zip(least, usual, most, strict=True))


class _Recorder:
    """An engine that notes the shapes of its inputs."""

    def __init__(self, engine: Any, name: str, runs: list[tuple[str, dict[str, tuple[int, ...]]]]):
        self.engine, self.name, self.runs = engine, name, runs

    def __call__(self, inputs: Any) -> Any:
        self._note(inputs)
        return self.engine(inputs)

    def bind(self, inputs: Any, outputs: Any) -> Any:
        self._note(inputs)
        return self.engine.bind(inputs, outputs)

    def _note(self, inputs: Any) -> None:
        self.runs.append((self.name, {port: array.shape for port, array in inputs.items()}))


SHAPE = "[[shape]]\nwidth = 64\nheight = 64\nframes = 33\nshare = 3\n"


def test_traffic_reads_seconds_and_normalises_shares(tmp_path: Path, spec: ModelSpec) -> None:
    file = tmp_path / "traffic.toml"
    file.write_text(SHAPE + SHAPE.replace("frames = 33", "seconds = 1").replace("= 3", "= 1.0"))
    assert read_traffic(file, spec) == (Shape(64, 64, 33, 0.75), Shape(64, 64, 25, 0.25))

    file.write_text(SHAPE.replace("frames = 33", "seconds = 1\nfps = 8"))
    assert [shape.frames for shape in read_traffic(file, spec)] == [9]

    plainest = SHAPE.replace("share = 3\n", "")
    file.write_text(plainest + plainest)
    assert [shape.share for shape in read_traffic(file, spec)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold one .* or more and nothing else, holds"),
        ("shape = 5", "must hold one"),
        (SHAPE + "[other]", r"nothing else, holds \['other', 'shape'\]"),
        ("shape = [5]", "number 1: shape must be an object, is 5"),
        ("[[shape", "is not TOML"),
        ("\xff", "is not TOML"),
        (SHAPE.replace("width = 64\n", ""), r"number 1: shape lacks \['width'\]$"),
        (SHAPE + SHAPE.replace("width", "breadth"), r"number 2: shape lacks \['width'\] and has unknown \['breadth'\]"),
        (SHAPE.replace("64", "'64'"), "shape.width must be int, is '64'"),
        (SHAPE.replace("64", "-64"), "shape.width must be above 0, is -64"),
        (SHAPE.replace("share = 3", "share = 0"), "shape.share must be above 0, is 0"),
        (SHAPE.replace("share = 3", "share = nan"), "shape.share must be above 0, is nan"),
        (SHAPE.replace("64", "2000000"), "shape.width must be at most 1000000, is 2000000"),
        (SHAPE + "batch = 2", r"shape has unknown \['batch'\]$"),
        (SHAPE.replace("frames = 33\n", ""), "needs either frames or seconds, has frames None and seconds None"),
        (SHAPE + "seconds = 2", "needs either frames or seconds, has frames 33 and seconds 2.0"),
        (SHAPE + "fps = 24", "shape.fps 24.0 needs seconds; leave it out"),
        (SHAPE.replace("frames = 33", "seconds = 1e9"), "shape.seconds 1e.09 at 24 fps is over 1000000 frames"),
    ],
)
def test_a_wrong_traffic_file_is_named(tmp_path: Path, spec: ModelSpec, text: str, message: str) -> None:
    file = tmp_path / "traffic.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as raised:
        read_traffic(file, spec)
    assert str(raised.value).startswith(str(file))


def test_no_profile_for_nothing(spec: ModelSpec) -> None:
    with pytest.raises(
        UserError, match="the model tubelet-demo serves no shape of the traffic: width 65 is not a positive multiple"
    ):
        choose(spec, [Shape(65, 64, 33, 1.0)], 4)
    with pytest.raises(UserError, match="the most profiles must be 1 or more, is 0"):
        choose(spec, [Shape(64, 64, 33, 1.0)], 0)


def test_the_command_prints_the_choice(tubelet: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "traffic.toml").write_text(SHAPE + SHAPE.replace("33", "65").replace("= 3", "= 1"))

    result = tubelet("profiles", "--traffic", "traffic.toml")
    assert result.code == 0, result.err
    for text in ("75.0%", "64x64", "N 144", "145..272..272", "expected cost of a step: 0.9"):
        assert text in result.out
    told = json.loads(tubelet("profiles", str(EMBEDDED), "--traffic", "traffic.toml", "--json").out)
    assert [(row["tokens"], row["profile"]) for row in told["traffic"]] == [(144, 0), (272, 1)]
    denoiser = next(row for row in told["components"] if row["component"] == "denoiser")
    assert denoiser["profiles"][1]["N"] == {"min": 145, "opt": 272, "max": 272}
    assert denoiser["plan_growth"] == 2 * 6 * 1_500_000 and denoiser["build_seconds"] == 2 * 6 * 1.5
    assert told["cost"]["to_one_profile"] < told["cost"]["to_one_for_each_n"] == 1


def test_the_command_exits_with_1_where_traffic_is_outside(tubelet: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "traffic.toml").write_text(SHAPE + SHAPE.replace("33", "34"))

    result = tubelet("profiles", "--traffic", "traffic.toml")
    assert result.code == 1
    assert "outside: 64x64 with 34 frames, 50.0%: frames 34 is not 1 + 4*k" in result.out
    assert "The nearest shape inside is 64x64 with 33 frames" in result.out
    told = tubelet("profiles", "--traffic", "traffic.toml", "--json")
    assert told.code == 1 and json.loads(told.out)["outside"][0]["nearest"]["frames"] == 33


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--traffic", "absent.toml"], "cannot read absent.toml: No such file or directory"),
        (["--traffic", "traffic.toml"], "traffic.toml must hold one"),
        (["absent", "--traffic", "traffic.toml"], "absent is not a bundle"),
        (["--traffic", "traffic.toml", "--max-profiles", "0"], "--max-profiles"),
        ([], "--traffic"),
    ],
)
def test_mistakes_exit_with_2(tubelet: Callable[..., Any], tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "traffic.toml").write_text("")
    result = tubelet("profiles", *arguments)
    assert result.code == 2
    assert message in " ".join(result.err.replace("│", " ").split())
