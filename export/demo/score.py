"""Measures from the pixels of a clip what it shows: the judge of the embedded model.

Flows in: a clip, uint8 [frames, height, width, 3]. Flows out: the attributes of the synthetic world and two quality
flags. Measuring knows neither the prompt nor the network; only `score` compares with a scene. An attribute that no
name of the world describes is `None`.

Shape is judged by moments of a soft mask, which forgive the blunt corners that a small VAE makes; a bounding box does
not. Lengths are shares of the picture's side, times are shares of the clip, so one set of limits serves all sizes. A
clip cut to half its rendered length still moves by 15 % of the side (twice `MOVED`) and grows by 1.26 (twice `GREW`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from scipy import ndimage  # type: ignore[import-untyped]

from .world import BACKGROUNDS, COLOURS, SCENES, Scene, caption

# Distances between colours, in levels of 255 over RGB (Euclidean).
BACKGROUND_DISTANCE = 50.0  # the palette's closest backgrounds are 133 apart
COLOUR_DISTANCE = 45.0  # the closest colours, yellow and orange, are 87 apart
OBJECT_CONTRAST = 45.0  # the faintest pair, purple on gray, is 106 apart
OFF_COLOUR = 60.0  # a pixel this far beside the line from background to object is no mixture of the two
GHOST = 18.0  # six sigma of the noise that is forgiven; a 25 % residue of purple on gray is 26
# The quality flags.
EDGE = 3  # pixels around the object that belong to its edge
GHOST_SHARE = 0.003  # of a frame's other pixels: 7 of a 48x48 frame, where the smallest object covers 39
BLOB_STRENGTH = 0.3  # share of the object's contrast from which a pixel far from the object is a second blob
BLOB_SHARE = 0.05  # of the object's area
AREA_JUMP = math.log(1.35)  # how far a frame's area may lie from the clip's trend
# Shape. Ideal values, then those of the smallest rendered object under a blur of 0.8 pixels.
SKEW = 0.25  # triangle -0.57 (-0.4), others 0
CIRCLE_OR_SQUARE = (0.55, 0.84, 1.15)  # circle 0.67 (0.74), square 1.0 (1.0), a diamond 0.4
ASPECT = 1.25  # spread along x over spread along y: 1 for all three shapes
FILL = 0.6  # area over 4 pi times both spreads: circle 1, square 0.95, triangle 0.83 (0.7), a ring less
# Motion over the whole clip. Each axis is measured in units of the least travel that counts.
MOVED = 0.075  # of the side
GREW = 0.115  # of the logarithm of the radius
WOBBLE = 1 / 3  # how far, in these units, a path may stray from its line
STRAY = 0.2  # or as a share of its own travel, so that a fast object need not keep its speed exactly
MINOR = 0.3  # a second motion counts from this share of the main one


@dataclass(frozen=True)
class Measured:
    """What a clip shows; `motion` is `None` for an image too."""

    shape: str | None
    colour: str | None
    background: str | None
    motion: str | None
    whole: bool  # one steady object, in every frame, inside the picture
    clean: bool  # in every frame an object and, around it, a background without ghosts


@dataclass(frozen=True)
class _Object:
    """One frame's object: its soft mask's moments and its surroundings."""

    area: float  # in pixels
    centre: tuple[float, float]  # x, y as shares of the width and height
    skew: tuple[float, float]  # of the mask along x and y
    kurtosis: float  # E[x²y²] / (E[x²] E[y²])
    aspect: float
    fill: float
    cut: bool  # by the picture's border
    strays: float  # pixels of second blobs over the object's area
    ghosts: float  # share of the other pixels that are not background


def measure(clip: np.ndarray) -> Measured:
    """Finds the background, the object's colour, the object in each frame, and what its path and mask say.

    Raises ValueError for anything but uint8 [frames, height, width, 3].
    """
    background, cores, found = _objects(clip)
    background_name = _nearest(background, BACKGROUNDS, BACKGROUND_DISTANCE)
    if not cores:
        return Measured(None, None, background_name, None, whole=False, clean=False)
    objects = [frame for frame in found if frame is not None]
    complete = len(objects) == len(clip)
    return Measured(
        shape=_shape(objects) if objects else None,
        colour=_colour(cores, background),
        background=background_name,
        motion=_motion(objects) if complete and len(clip) > 1 else None,
        whole=complete and _is_whole(objects),
        clean=complete and max(frame.ghosts for frame in objects) <= GHOST_SHARE,
    )


def track(clip: np.ndarray) -> np.ndarray:
    """The object's centre (x, y) in pixels in each frame [T,2]; nan where there is none. Raises as `measure`."""
    size = np.array([clip.shape[2], clip.shape[1]])
    return np.array([np.full(2, np.nan) if frame is None else frame.centre * size for frame in _objects(clip)[2]])


def _objects(clip: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[_Object | None]]:
    """The background's colour, what `_cores` finds, and the object of each frame, if it has one."""
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or not len(clip):
        raise ValueError(f"clip is {clip.dtype} {clip.shape}: pass uint8 [frames, height, width, 3]")
    pixels = clip.astype(np.float32)
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)  # [T,2H+2W,3]
    background = np.median(border, axis=(0, 1))
    difference = pixels - background
    cores = _cores(difference)
    if not cores:
        return background, cores, [None] * len(clip)
    contrast = np.median(np.concatenate(cores), axis=0)  # object minus background
    return background, cores, [_find(frame, contrast) for frame in difference]


def score(clip: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Which attributes of the scene the clip shows, its quality flags, and `all`; an image's motion is right."""
    measured = measure(clip)
    result = {field.name: getattr(measured, field.name) == getattr(scene, field.name) for field in fields(scene)}
    result["motion"] |= len(clip) == 1
    result |= {"whole": measured.whole, "clean": measured.clean}
    return {**result, "all": all(result.values())}


def evaluation_set(count: int, seed: int) -> list[tuple[str, Scene]]:
    """Captions with their scenes, trained and held out, in an order fixed by the seed; no scene twice before all."""
    rng = np.random.default_rng(seed)
    rounds = -(-count // len(SCENES))
    order = [i for _ in range(rounds) for i in rng.permutation(len(SCENES))]
    return [(caption(SCENES[i], rng), SCENES[i]) for i in order[:count]]


def _nearest(colour: np.ndarray, palette: Mapping[str, tuple[int, int, int]], limit: float) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= limit else None


def _length(colours: np.ndarray) -> np.ndarray:
    """[...,3] -> [...]; several times faster than np.linalg.norm along so short an axis."""
    return np.sqrt(np.einsum("...c,...c->...", colours, colours))


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected component, all False where there is none."""
    labels, count = ndimage.label(mask)
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax() if count else mask


def _cores(difference: np.ndarray) -> list[np.ndarray]:
    """Per frame with an object, the differences [n,3] of the pixels deepest inside it, which no edge has blended."""
    cores = []
    for frame in difference:
        strength = _length(frame)
        mask = _largest(strength > max(OBJECT_CONTRAST, np.quantile(strength, 1 - GHOST_SHARE) / 2))
        if mask.any():
            depth = ndimage.distance_transform_edt(mask)
            cores.append(frame[depth >= 0.6 * depth.max()])
    return cores


def _colour(cores: list[np.ndarray], background: np.ndarray) -> str | None:
    """The name that four frames of five agree on."""
    names = [_nearest(np.median(core, axis=0) + background, COLOURS, COLOUR_DISTANCE) for core in cores]
    name = max(set(names), key=names.count)
    return name if names.count(name) >= 0.8 * len(names) else None


def _find(difference: np.ndarray, contrast: np.ndarray) -> _Object | None:
    """The object in one frame [H,W,3], given its colour minus the background's."""
    norm = float(np.linalg.norm(contrast))
    alpha = difference @ contrast / norm**2
    off_colour = _length(difference - alpha[..., None] * contrast)
    core = _largest((alpha > 0.5) & (off_colour < OFF_COLOUR))
    if not core.any():
        return None
    near = ndimage.binary_dilation(core, iterations=EDGE)
    strength = _length(difference)
    blob = max(OBJECT_CONTRAST, BLOB_STRENGTH * norm)

    height, width = core.shape
    rows, columns = np.nonzero(near)
    weight = np.clip(alpha[near], 0.0, 1.2)
    area = float(weight.sum())
    weight /= area
    centre_x, centre_y = weight @ columns + 0.5, weight @ rows + 0.5
    x, y = columns + 0.5 - centre_x, rows + 0.5 - centre_y
    xx, yy = float(weight @ x**2), float(weight @ y**2)
    return _Object(
        area=area,
        centre=(float(centre_x) / width, float(centre_y) / height),
        skew=(float(weight @ x**3) / xx**1.5, float(weight @ y**3) / yy**1.5),
        kurtosis=float(weight @ (x**2 * y**2)) / (xx * yy),
        aspect=math.sqrt(xx / yy),
        fill=area / (4 * math.pi * math.sqrt(xx * yy)),
        cut=bool(core[0].any() or core[-1].any() or core[:, 0].any() or core[:, -1].any()),
        strays=float((strength[~near] > blob).sum()) / area,
        ghosts=float((strength[~near] > GHOST).mean()) if not near.all() else 0.0,
    )


def _shape(objects: list[_Object]) -> str | None:
    """Decides on the medians over the frames."""
    skew_x, skew_y = np.median([frame.skew for frame in objects], axis=0)
    kurtosis = float(np.median([frame.kurtosis for frame in objects]))
    aspect = float(np.median([frame.aspect for frame in objects]))
    fill = float(np.median([frame.fill for frame in objects]))
    if not 1 / ASPECT < aspect < ASPECT or fill < FILL or abs(skew_x) > SKEW or skew_y > SKEW:
        return None
    if skew_y < -SKEW:
        return "triangle"
    low, middle, high = CIRCLE_OR_SQUARE
    if not low < kurtosis < high:
        return None
    return "circle" if kurtosis < middle else "square"


def _is_whole(objects: list[_Object]) -> bool:
    log_area = np.log([frame.area for frame in objects])
    steady = float(np.abs(_line(log_area)[1]).max()) < AREA_JUMP
    return steady and not any(frame.cut or frame.strays > BLOB_SHARE for frame in objects)


def _line(values: np.ndarray) -> tuple[float, np.ndarray]:
    """Theil-Sen fit over the clip's time from 0 to 1: the rise, and how far each value lies from the line."""
    if len(values) == 1:
        return 0.0, np.zeros(1)
    time = np.linspace(0.0, 1.0, len(values))
    first, second = np.triu_indices(len(values), k=1)
    rise = float(np.median((values[second] - values[first]) / (time[second] - time[first])))
    rest = values - rise * time
    return rise, rest - np.median(rest)


def _motion(objects: list[_Object]) -> str | None:
    """The one motion that exceeds its limit, `still` where none does; `None` for a mixture or an unsteady path."""
    x, y = np.array([frame.centre for frame in objects]).T
    log_radius = np.log([frame.area for frame in objects]) / 2
    axes = (
        (*_line(x / MOVED), ("left", "right")),
        (*_line(y / MOVED), ("up", "down")),
        (*_line(log_radius / GREW), ("shrinks", "grows")),
    )
    travel, rest, names = max(axes, key=lambda axis: abs(axis[0]))
    moves = abs(travel) >= 1
    if np.abs(rest).max() > max(WOBBLE, STRAY * abs(travel)):
        return None
    for other, stray, other_names in axes:
        wobble = float(np.abs(stray).max())
        minor = max(1.0, MINOR * abs(travel))
        if other_names != names and (abs(other) >= minor or wobble >= (minor if moves else WOBBLE)):
            return None
    return names[int(travel > 0)] if moves else "still"
