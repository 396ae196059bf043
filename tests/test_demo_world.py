"""Proves that the synthetic world is what its captions say, and that its judge accepts it and rejects every flaw.

Run: pytest tests/test_demo_world.py
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tubelet.export.demo.score import Measured, evaluation_set, measure, score
from tubelet.export.demo.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MOTIONS,
    SCENES,
    SHAPES,
    TRAINED,
    VERBS,
    Scene,
    caption,
    render,
    vocabulary,
)

SIZES = ((48, 48), (48, 64), (80, 48), (64, 112), (128, 128))
RIGHT = dict.fromkeys(("shape", "colour", "background", "motion", "whole", "clean", "all"), True)

scenes, seeds = st.sampled_from(SCENES), st.integers(0, 2**32 - 1)
still_scenes = st.sampled_from([scene for scene in SCENES if scene.motion == "still"])
moving_scenes = st.sampled_from([scene for scene in SCENES if scene.motion != "still"])


def draw(scene: Scene, seed: int, frames: int = 9, size: tuple[int, int] = (48, 48)) -> np.ndarray:
    return render(scene, *size, frames, np.random.default_rng(seed))


def object_pixels(clip: np.ndarray, scene: Scene) -> np.ndarray:
    """Where a rendered clip differs from its background: [frames, height, width]."""
    return (clip != np.array(BACKGROUNDS[scene.background])).any(axis=3)


def mix(clip: np.ndarray, where: np.ndarray, scene: Scene, share: float) -> np.ndarray:
    """Puts `share` of the object's colour on the background wherever `where` holds."""
    background, colour = np.array(BACKGROUNDS[scene.background]), np.array(COLOURS[scene.colour])
    mixed = np.rint(background + share * (colour - background)).astype(np.uint8)
    return np.where(where[..., None], mixed, clip)


def damage(clip: np.ndarray, seed: int) -> np.ndarray:
    """Stands in for a small VAE: blur of 0.5-0.8 pixels, noise of 3 levels, a gain of up to 3 %."""
    rng = np.random.default_rng(seed)
    sigma = rng.uniform(0.5, 0.8)
    blurred = ndimage.gaussian_filter(clip.astype(np.float64), (0, sigma, sigma, 0)) * rng.uniform(0.97, 1.03)
    return np.clip(np.rint(blurred + rng.normal(0, 3, clip.shape)), 0, 255).astype(np.uint8)


# The world.


@given(scene=scenes, seed=seeds, frames=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_the_same_seed_renders_the_same_clip(scene: Scene, seed: int, frames: int) -> None:
    clip = draw(scene, seed, frames)

    assert clip.shape == (frames, 48, 48, 3)
    np.testing.assert_array_equal(clip, draw(scene, seed, frames))
    assert (clip != draw(scene, seed + 1, frames)).any()


@given(scene=scenes, seed=seeds, size=st.sampled_from(SIZES))
@settings(max_examples=60, deadline=None)
def test_the_whole_shape_stays_inside_the_picture(scene: Scene, seed: int, size: tuple[int, int]) -> None:
    mask = object_pixels(draw(scene, seed, 5, size), scene)

    assert mask.any(axis=(1, 2)).all()
    assert not mask[:, [0, -1]].any() and not mask[:, :, [0, -1]].any()


@given(scene=scenes, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_a_caption_names_every_attribute_and_only_words_of_the_vocabulary(scene: Scene, seed: int) -> None:
    video, image = (caption(scene, np.random.default_rng(seed), image) for image in (False, True))

    assert any(verb in video for verb in VERBS[scene.motion])
    for text in (video, image):
        words = text.split()
        assert set(words) <= set(vocabulary())
        for names, name in ((SHAPES, scene.shape), (COLOURS, scene.colour), (BACKGROUNDS, scene.background)):
            assert [word for word in words if word in names] == [name]
        assert "a orange" not in text


def test_verbs_tell_the_motions_apart() -> None:
    every = [verb for verbs in VERBS.values() for verb in verbs]

    assert set(VERBS) == set(MOTIONS)
    assert len(set(every)) == len(every)


def test_held_out_scenes_are_never_trained_but_each_of_their_words_is() -> None:
    assert not set(HELD_OUT) & set(TRAINED)
    assert set(HELD_OUT) | set(TRAINED) == set(SCENES)
    assert len(HELD_OUT) == pytest.approx(len(SCENES) / 10, abs=1)
    for name in ("shape", "colour", "background", "motion"):
        assert {getattr(scene, name) for scene in TRAINED} == {getattr(scene, name) for scene in SCENES}


def test_the_evaluation_set_is_fixed_by_its_seed_and_covers_held_out_scenes() -> None:
    prompts = evaluation_set(len(SCENES) + 10, seed=4)

    assert prompts == evaluation_set(len(SCENES) + 10, seed=4)
    assert prompts != evaluation_set(len(SCENES) + 10, seed=5)
    assert {scene for _, scene in prompts[: len(SCENES)]} == set(SCENES) >= set(HELD_OUT)
    assert all(scene.colour in text and scene.shape in text for text, scene in prompts)
    assert evaluation_set(0, seed=4) == []


# The judge accepts the world.


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_rendered_scene_scores_full_marks(motion: str) -> None:
    wrong = [
        (scene, measure(clip))
        for number, scene in enumerate(SCENES)
        if scene.motion == motion and score(clip := draw(scene, number, 5), scene) != RIGHT
    ]

    assert wrong == []


@given(scene=scenes, seed=seeds, size=st.sampled_from(SIZES), frames=st.sampled_from((5, 9, 17, 33, 41)))
@settings(max_examples=25, deadline=None)
def test_every_size_and_length_scores_full_marks(scene: Scene, seed: int, size: tuple[int, int], frames: int) -> None:
    assert score(draw(scene, seed, frames, size), scene) == RIGHT


@given(
    scene=scenes, seed=seeds, size=st.sampled_from(SIZES[:4]), frames=st.sampled_from((5, 9, 17)), part=st.floats(0, 1)
)
@settings(max_examples=30, deadline=None)
def test_half_a_clip_that_a_small_vae_has_blurred_scores_full_marks(
    scene: Scene, seed: int, size: tuple[int, int], frames: int, part: float
) -> None:
    half = frames // 2 + 1
    start = round(part * (frames - half))
    clip = damage(draw(scene, seed, frames, size)[start : start + half], seed)

    assert score(clip, scene) == RIGHT, measure(clip)


@given(scene=scenes, seed=seeds)
@settings(max_examples=20, deadline=None)
def test_an_image_has_no_motion_and_any_is_right(scene: Scene, seed: int) -> None:
    image = draw(scene, seed, 1)

    assert measure(image).motion is None
    assert score(image, scene) == RIGHT


# The judge rejects flaws.


@given(shown=scenes, asked=scenes, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_exactly_the_attributes_that_differ_are_wrong(shown: Scene, asked: Scene, seed: int) -> None:
    result = score(draw(shown, seed), asked)

    for name in ("shape", "colour", "background", "motion"):
        assert result[name] == (getattr(shown, name) == getattr(asked, name))
    assert result["all"] == (shown == asked)
    assert result["whole"] and result["clean"]


@given(scene=scenes, seed=seeds, share=st.floats(0.25, 1), frame=st.integers(0, 8))
@settings(max_examples=25, deadline=None)
def test_a_residue_of_the_object_elsewhere_is_not_clean(scene: Scene, seed: int, share: float, frame: int) -> None:
    clip = draw(scene, seed)
    mask = object_pixels(clip, scene)
    ghost = np.roll(mask, (24, 24), axis=(1, 2)) & ~mask
    ghost[np.arange(9) != frame] = False  # one bad frame is enough
    haunted = mix(clip, ghost, scene, share)

    result = score(haunted, scene)

    assert not result["clean"] and not result["all"]
    assert result["shape"] and result["colour"] and result["background"]
    if share > 0.5:
        assert not result["whole"]


@given(scene=scenes, seed=seeds)
@settings(max_examples=20, deadline=None)
def test_a_halo_is_not_clean(scene: Scene, seed: int) -> None:
    clip = draw(scene, seed)
    mask = object_pixels(clip, scene)
    within_frames = np.pad(ndimage.generate_binary_structure(2, 1)[None], ((1, 1), (0, 0), (0, 0)))
    around = ndimage.binary_dilation(mask, within_frames, iterations=7)

    assert not score(mix(clip, around & ~mask, scene, 0.25), scene)["clean"]


@given(scene=scenes, seed=seeds, colour=st.sampled_from(sorted(COLOURS)))
@settings(max_examples=20, deadline=None)
def test_a_second_blob_of_any_colour_is_not_whole(scene: Scene, seed: int, colour: str) -> None:
    clip = draw(scene, seed)
    free = ~ndimage.binary_dilation(object_pixels(clip, scene).any(axis=0), iterations=5)
    room = ndimage.binary_erosion(free, np.ones((7, 7)))
    assume(room.any())
    row, column = np.argwhere(room)[0]
    clip[:, row - 3 : row + 4, column - 3 : column + 4] = COLOURS[colour]

    result = score(clip, scene)

    assert not result["whole"] and not result["all"]


@given(scene=still_scenes, seed=seeds, pixels=st.integers(2, 4), side=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_an_object_cut_by_the_border_is_not_whole(scene: Scene, seed: int, pixels: int, side: int) -> None:
    turned = np.rot90(draw(scene, seed), side, axes=(1, 2))
    first = np.flatnonzero(object_pixels(turned, scene).any(axis=(0, 1)))[0]
    clip = np.rot90(turned[:, :, first + pixels :], -side, axes=(1, 2))

    result = score(clip, scene)

    assert not result["whole"] and not result["all"]


@given(scene=scenes, seed=seeds, frame=st.integers(0, 8))
@settings(max_examples=20, deadline=None)
def test_an_object_missing_from_one_frame_is_not_whole(scene: Scene, seed: int, frame: int) -> None:
    clip = draw(scene, seed)
    clip[frame] = BACKGROUNDS[scene.background]

    result = score(clip, scene)

    assert not result["whole"] and not result["motion"] and not result["all"]


@given(scene=moving_scenes, seed=seeds, frames=st.sampled_from((8, 9, 17)))
@settings(max_examples=25, deadline=None)
def test_a_motion_that_turns_back_is_no_motion_of_the_world(scene: Scene, seed: int, frames: int) -> None:
    there = draw(scene, seed, frames)[: frames // 2 + 1]
    clip = np.concatenate([there, there[::-1][1:]])

    assert measure(clip).motion is None


@given(scene=moving_scenes, seed=seeds)
@settings(max_examples=20, deadline=None)
def test_a_motion_played_backwards_is_the_opposite_motion(scene: Scene, seed: int) -> None:
    pairs = (("left", "right"), ("up", "down"), ("grows", "shrinks"))
    opposite = {a: b for pair in pairs for a, b in (pair, pair[::-1])}

    assert measure(draw(scene, seed)[::-1]).motion == opposite[scene.motion]


@given(scene=still_scenes, seed=seeds)
@settings(max_examples=20, deadline=None)
def test_a_jump_is_no_motion_of_the_world(scene: Scene, seed: int) -> None:
    clip = draw(scene, seed)
    clip[4:] = np.roll(clip[4:], 5, axis=2)

    assert measure(clip).motion is None


@given(scene=still_scenes, seed=seeds)
@settings(max_examples=20, deadline=None)
def test_shapes_outside_the_world_have_no_name(scene: Scene, seed: int) -> None:
    clip = draw(scene, seed, 2)
    oval = clip.repeat(2, axis=2)
    mask = object_pixels(clip, scene)
    y, x = np.mgrid[:48, :48] - 23.5
    rhomb, ring = abs(x) + abs(y) < 12, abs(np.hypot(x, y) - 11) < 3
    others = [
        oval,
        *(mix(mix(clip, mask, scene, 0.0), rhomb_or_ring[None], scene, 1.0) for rhomb_or_ring in (rhomb, ring)),
    ]
    if scene.shape == "triangle":
        others.append(clip[:, ::-1])

    assert [measure(other).shape for other in others] == [None] * len(others)


@given(scene=scenes, seed=seeds)
@settings(max_examples=20, deadline=None)
def test_a_colour_that_changes_has_no_name(scene: Scene, seed: int) -> None:
    names = sorted(COLOURS)
    other = Scene(scene.shape, names[names.index(scene.colour) - 1], scene.background, scene.motion)
    clip = np.concatenate([draw(scene, seed)[:5], draw(other, seed)[5:]])

    assert measure(clip).colour is None


def test_colours_outside_the_world_have_no_name() -> None:
    clip = np.full((3, 48, 48, 3), (70, 10, 10), np.uint8)
    clip[:, 15:30, 15:30] = (255, 170, 200)

    assert measure(clip) == Measured("square", None, None, "still", whole=True, clean=True)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_picture_shows_nothing_but_its_background(background: str) -> None:
    clip = np.full((3, 48, 48, 3), BACKGROUNDS[background], np.uint8)

    assert measure(clip) == Measured(None, None, background, None, whole=False, clean=False)


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_noise_is_neither_whole_nor_clean(seed: int) -> None:
    measured = measure(np.random.default_rng(seed).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8))

    assert not measured.whole and not measured.clean


@pytest.mark.parametrize(
    "clip", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_anything_but_a_clip_of_bytes_is_refused(clip: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pass uint8"):
        measure(clip)
