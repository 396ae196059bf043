"""The synthetic world of the embedded model: moving shapes on plain backgrounds, with captions.

Flows in: a NumPy generator and a canvas size. Flows out: clips (uint8 frames) and caption strings. Knows nothing of
networks; the scorer (`score.py`) and the training scripts share its tables. Its words live in `tubelet.runtime.world`,
because the runtime completes prompts with them.
"""

from __future__ import annotations

import itertools

import numpy as np

from tubelet.runtime.world import ATTRIBUTES, BACKGROUNDS, COLOURS, MOTIONS, SHAPES, TEMPLATES, VERBS, Scene, say

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "HELD_OUT",
    "MOTIONS",
    "OPPOSITE",
    "SCENES",
    "SHAPES",
    "TRAINED",
    "VERBS",
    "Scene",
    "caption",
    "render",
    "vocabulary",
]

STILL_TEMPLATES = (
    "a {colour} {shape} on a {background} background",
    "on a {background} background a {colour} {shape}",
    "a {shape} that is {colour} over {background}",
    "an image of a {colour} {shape} on {background}",
)
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "grows": "shrinks", "shrinks": "grows"}
TRIANGLE_REACH = 1.15  # its apex lies this many radii from its centroid
HELD_OUT_EVERY = 10  # one combination in ten is never trained: prompts for generalisation

SCENES = tuple(Scene(*row) for row in itertools.product(*ATTRIBUTES.values()))
_ORDER = np.random.default_rng(2026).permutation(len(SCENES))
HELD_OUT = tuple(SCENES[i] for i in _ORDER[::HELD_OUT_EVERY])
TRAINED = tuple(scene for scene in SCENES if scene not in set(HELD_OUT))


def caption(scene: Scene, rng: np.random.Generator, image: bool = False) -> str:
    """One wording of a scene; an image's caption leaves out the motion half of the time."""
    templates = STILL_TEMPLATES if image and rng.random() < 0.5 else TEMPLATES
    verbs = VERBS[scene.motion]
    return say(scene, templates[rng.integers(len(templates))], verbs[rng.integers(len(verbs))])


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    lines = [*TEMPLATES, *STILL_TEMPLATES, *itertools.chain(*VERBS.values())]
    words = {word for line in lines for word in line.split() if not word.startswith("{")}
    return sorted(words | set(SHAPES) | set(COLOURS) | set(BACKGROUNDS))


def render(
    scene: Scene, width: int, height: int, frames: int, rng: np.random.Generator, stops: bool = False
) -> np.ndarray:
    """Draws a clip, uint8 [frames, height, width, 3], with a random size, place and speed of the shape.

    The whole shape stays inside the picture. Over the clip a moving shape crosses 30-60 % of the picture's side,
    a growing one gains a factor of 1.6-2.2 in radius. With `stops` the clip is one moment of a longer one: the shape is
    anywhere on its way, which it ends where there is no room left.
    """
    side = min(width, height)
    u = np.linspace(0.0, 1.0, frames)
    radius = np.full(frames, side * rng.uniform(0.14, 0.21))
    if scene.motion in ("grows", "shrinks"):
        small = side * rng.uniform(0.10, 0.14)
        gain = rng.uniform(1.6, 2.2)
        way = np.minimum(rng.random() + u, 1) if stops else u
        radius = small * gain ** (way if scene.motion == "grows" else 1 - way)
    margin = radius.max() * (TRIANGLE_REACH if scene.shape == "triangle" else 1.0) + 1.5
    delta = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(scene.motion, (0, 0))
    path = []
    for extent, direction in zip((width, height), delta, strict=True):
        room = extent - 2 * margin
        travel = direction * min(room, extent * rng.uniform(0.30, 0.60))
        if stops:
            path.append(np.clip(margin + rng.random() * room + travel * u, margin, extent - margin))
            continue
        start = margin + max(-travel, 0.0) + rng.random() * (room - abs(travel))
        path.append(start + travel * u)
    alpha = _coverage(scene.shape, path[0], path[1], radius, width, height)[..., None]
    colour, background = np.array(COLOURS[scene.colour]), np.array(BACKGROUNDS[scene.background])
    return np.rint(background + alpha * (colour - background)).astype(np.uint8)


def _coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray, width: int, height: int) -> np.ndarray:
    """Antialiased inside-ness [frames, height, width] from signed distances to the shape's edges."""
    dx = (np.arange(width) + 0.5)[None, None, :] - x[:, None, None]
    dy = (np.arange(height) + 0.5)[None, :, None] - y[:, None, None]
    r = radius[:, None, None]
    if shape == "circle":
        distance = np.hypot(dx, dy) - r
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.89 * r
    else:  # an upright triangle around its centroid
        r = r * TRIANGLE_REACH
        slanted = np.abs(dx) * np.cos(np.pi / 6) - dy * np.sin(np.pi / 6) - 0.5 * r
        distance = np.maximum(slanted, dy - 0.5 * r)
    return np.clip(0.5 - distance, 0.0, 1.0)
