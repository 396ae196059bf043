"""Tasks: what each keeps, how long it is, and that it is made of the right windows. Quality: `benchmarks/tasks.py`.

pytest tests/test_studio.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from tubelet.runtime import Cancelled, Pipeline, Request, UserError
from tubelet.runtime.studio import CONTEXT, Scene, Studio

PROMPT = "a red circle moves right on a white background"
FAST = Request(PROMPT, width=32, height=32, steps=2, guidance=1.0)


def joined(chunks: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(chunks))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


@pytest.fixture(scope="module")
def studio(pipeline: Pipeline) -> Studio:
    return Studio(pipeline)


@pytest.fixture(scope="module")
def clip(studio: Studio) -> np.ndarray:
    """A clip of the model's own, uint8 [33,48,48,3]."""
    return joined(studio.generate(Request(PROMPT, width=48, height=48)))


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (19, 32, 32, 3), np.uint8)


def replace(request: Request, **changes: object) -> Request:
    return dataclasses.replace(request, **changes)


def test_what_fits_at_once_is_the_pipelines(studio: Studio, pipeline: Pipeline) -> None:
    request = replace(FAST, frames=65)
    np.testing.assert_array_equal(joined(studio.generate(request)), pipeline.generate(request))


@pytest.mark.parametrize("frames", [66, 97, 140])
def test_longer_clips_are_made_in_windows_that_overlap(
    studio: Studio, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(studio, "_stream", lambda request, canvas: seen.append((request, canvas)) or stand_in(canvas))

    def stand_in(canvas: object) -> Iterator[np.ndarray]:
        shape = (33, 32, 32, 3) if canvas is None else (1 + 4 * (canvas.latents.shape[1] - 1), 32, 32, 3)  # type: ignore[attr-defined]
        yield np.full(shape, len(seen), np.uint8)

    made = joined(studio.generate(replace(FAST, frames=frames)))

    assert len(made) == frames
    assert seen[0][1] is None
    for _, canvas in seen[1:]:
        whole = canvas.known.all(axis=(1, 2))
        assert whole[:3].all() and not canvas.known[3:].any() and CONTEXT == 9
    assert len({request.seed for request, _ in seen}) == len(seen)
    lengths = np.unique(made[:, 0, 0, 0], return_counts=True)[1]
    assert lengths[0] == 33 and set(lengths[1:-1]) <= {24}


def test_scenes_show_one_after_another_and_begin_with_the_last_frame(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    painted = []
    real = studio._stream
    monkeypatch.setattr(
        studio, "_stream", lambda request, canvas: painted.append((request, canvas)) or real(request, canvas)
    )
    scenes = [Scene(0, "a red circle"), Scene(10, "a blue circle"), Scene(50, "a green circle")]

    made = joined(studio.generate(replace(FAST, frames=60), scenes=scenes))

    assert len(made) == 60
    assert [request.prompt for request, _ in painted] == ["a red circle", *["a blue circle"] * 2, "a green circle"]
    known = [0 if canvas is None else int(canvas.known.all(axis=(1, 2)).sum()) for _, canvas in painted]
    assert known == [0, 1, 3, 1]


def test_keyframes_are_where_they_belong(studio: Studio, clip: np.ndarray) -> None:
    shown = {0: clip[0], 16: clip[16], 32: clip[32]}
    made = joined(studio.generate(Request(PROMPT, width=48, height=48), shown))
    assert made.shape == clip.shape
    for number, image in shown.items():
        np.testing.assert_array_equal(made[number], image)
    for number in (1, 15, 17, 31):  # what is made beside them leads there
        assert psnr(made[number], clip[number]) > 22


def test_a_picture_begins_a_long_video(studio: Studio, clip: np.ndarray) -> None:
    made = joined(studio.generate(replace(FAST, width=48, height=48, frames=70), {0: clip[0]}))
    assert len(made) == 70
    np.testing.assert_array_equal(made[0], clip[0])
    assert psnr(made[1], clip[1]) > 22


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("frames", "context"), [(1, 9), (7, 1), (40, 9), (33, 17)])
def test_extension_keeps_the_clip_and_adds_as_much_as_asked(
    studio: Studio, noise: np.ndarray, frames: int, backward: bool, context: int
) -> None:
    made = joined(studio.extend(noise, FAST, frames, backward, context))
    assert len(made) == 19 + frames
    np.testing.assert_array_equal(made[frames:] if backward else made[:19], noise)


@pytest.mark.parametrize(("frames", "backward", "longest"), [(40, False, 33), (40, True, 49), (70, True, 65)])
def test_the_longest_canvas_of_an_extension_is_told_before(
    pipeline: Pipeline, noise: np.ndarray, frames: int, backward: bool, longest: int
) -> None:
    studio = Recorder(pipeline)
    joined(studio.extend(noise, FAST, frames, backward))
    assert max(studio.painted) == longest == studio.extended(frames, backward)


class Recorder(Studio):
    """Remembers how long its canvases were."""

    def __init__(self, pipeline: Pipeline):
        super().__init__(pipeline)
        self.painted: list[int] = []

    def _paint_around(self, request: Request, shown: Mapping[int, np.ndarray], frames: int) -> np.ndarray:
        self.painted.append(frames)
        return super()._paint_around(request, shown, frames)


@pytest.mark.parametrize("context", [0, 33, 40])
@pytest.mark.parametrize("backward", [False, True])
def test_a_context_that_leaves_no_room_is_refused(studio: Studio, context: int, backward: bool) -> None:
    clip = np.zeros((50, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match=f"context must be from 1 to 32 frames, is {context}"):
        joined(studio.extend(clip, FAST, 5, backward, context))


def test_a_clip_shorter_than_the_context_is_extended(studio: Studio, noise: np.ndarray) -> None:
    for backward in (False, True):
        assert len(joined(studio.extend(noise[:3], FAST, 5, backward))) == 8


@pytest.mark.parametrize("frames", [1, 3, 24])
def test_loops_and_connections_keep_both_ends(studio: Studio, noise: np.ndarray, frames: int) -> None:
    bridged = studio.bridged(frames)
    loop, connected = joined(studio.loop(noise, FAST, frames)), joined(studio.connect(noise, noise[::-1], FAST, frames))
    assert len(loop) == 19 + bridged and len(connected) == 38 + bridged
    assert 0 <= bridged - frames < 4 and (bridged + 2) % 4 == 1
    np.testing.assert_array_equal(loop[:19], noise)
    np.testing.assert_array_equal(connected[-19:], noise[::-1])


def test_what_is_too_long_to_make_at_once_is_refused(studio: Studio) -> None:
    clip = np.zeros((66, 32, 32, 3), np.uint8)
    assert (studio.bridged(63), studio.blended(65)) == (63, 65)
    for chunks in (studio.loop(clip, FAST, 64), studio.connect(clip, clip, FAST, 64)):
        with pytest.raises(UserError, match=r"64 frames from one clip to the next are over the 63 .*, 2\.62 seconds"):
            joined(chunks)
    with pytest.raises(UserError, match=r"a blend of 66 frames is over the 65 that are made at once, 2\.71 seconds"):
        studio.blend(clip, clip, FAST, 0.5, inversion=False)


def test_editing_goes_from_the_clip_to_the_prompt(studio: Studio, clip: np.ndarray) -> None:
    request = Request("a blue circle moves right on a white background", width=48, height=48, seed=4)
    made = {s: joined(studio.edit(clip, replace(request, strength=s))) for s in (0.0, 0.5, 1.0)}
    np.testing.assert_array_equal(made[0.0], clip)
    assert psnr(made[0.5], clip) > psnr(made[1.0], clip)


def test_an_edit_of_any_length_has_that_length(studio: Studio, noise: np.ndarray) -> None:
    long = np.tile(noise, (5, 1, 1, 1))
    for frames in (1, 2, 19, 94):
        assert len(joined(studio.edit(long[:frames], replace(FAST, strength=0.5)))) == frames


def test_inpainting_changes_what_is_masked_alone(studio: Studio, noise: np.ndarray) -> None:
    mask = np.zeros(noise.shape[:3], np.bool_)
    mask[4:12, 3:20, 5:30] = True
    made = joined(studio.inpaint(noise, mask, FAST))
    np.testing.assert_array_equal(made[~mask], noise[~mask])
    assert (made[mask] != noise[mask]).mean() > 0.9


def test_blending_by_inversion_returns_the_ends(studio: Studio, clip: np.ndarray) -> None:
    first, second = clip[:17], clip[16:]
    request = Request("", width=48, height=48)
    assert psnr(studio.blend(first, second, request, 0.0, inversion=True), first) > 24
    assert psnr(studio.blend(first, second, request, 1.0, inversion=True), second) > 24
    weak = replace(request, strength=0.0)
    assert psnr(studio.blend(first, second, weak, 1.0, inversion=False), second) > 28


def test_a_task_is_cancelled_between_steps(pipeline: Pipeline, noise: np.ndarray) -> None:
    done = []
    studio = Studio(pipeline, lambda step, of: done.append(step), lambda: len(done) == 3)
    with pytest.raises(Cancelled):
        joined(studio.extend(noise, FAST, 60))
    assert done == [1, 2, 1]


@pytest.mark.parametrize(
    ("scenes", "message"),
    [
        ([Scene(1, "x")], "start at 1"),
        ([Scene(0, "x"), Scene(8, "y"), Scene(8, "z")], "start at 0, 8, 8"),
        ([Scene(0, "x"), Scene(33, "y")], "below 33 frames"),
        ([Scene(0, "x"), Scene(8, "red " * 40)], "the prompt has 41 tokens"),
    ],
)
def test_scenes_that_cannot_be_shown_are_refused(studio: Studio, scenes: list[Scene], message: str) -> None:
    with pytest.raises(UserError, match=message):
        joined(studio.generate(replace(FAST, frames=33), scenes=scenes))


def test_a_keyframe_outside_is_refused(studio: Studio, noise: np.ndarray) -> None:
    with pytest.raises(UserError, match="keyframe 33 is outside the frames 0 to 32"):
        joined(studio.generate(replace(FAST, frames=33), {33: noise[0]}))


@pytest.mark.parametrize("frames", [9, 33])
def test_a_keyframe_after_the_first_scene_is_refused(studio: Studio, noise: np.ndarray, frames: int) -> None:
    with pytest.raises(UserError, match="keyframe 5 is outside the frames 0 to 4 of the first scene"):
        studio.check(replace(FAST, frames=frames), [Scene(0, "x"), Scene(5, "y")], {4: noise[0], 5: noise[0]})
