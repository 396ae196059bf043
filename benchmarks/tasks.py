"""How well the embedded model does every task, measured from the pixels it makes.

    python benchmarks/tasks.py [--count 50] [--only NAME,NAME] [--sheets FOLDER]

Given clips are rendered from the model's world, so the truth is known; cases are drawn with a fixed seed from all
scenes, held-out ones included. Default settings of the library. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tubelet.export.demo.score import evaluation_set, measure, score, track
from tubelet.export.demo.train_vae import psnr
from tubelet.export.demo.world import COLOURS, OPPOSITE, SHAPES, Scene, caption, render
from tubelet.runtime import EMBEDDED, Pipeline, Request, VideoWriter
from tubelet.runtime.sheet import contact_sheet
from tubelet.runtime.studio import Scene as Shown
from tubelet.runtime.studio import Studio

SEED = 2027
SIZES = ((64, 64), (48, 48), (64, 48), (48, 64), (80, 64), (64, 80), (96, 64), (96, 96))
ANY = (
    *((32, 32, 1), (48, 32, 5), (32, 48, 17), (64, 64, 1), (48, 48, 9), (64, 48, 33), (48, 64, 49), (64, 64, 65)),
    *((80, 48, 17), (48, 80, 33), (96, 64, 25), (64, 96, 33), (96, 96, 49), (112, 64, 33), (64, 112, 41)),
    *((128, 64, 33), (64, 128, 17), (112, 112, 33), (128, 128, 33), (128, 128, 65)),
)
MOVING = ("left", "right", "up", "down")

Values = dict[str, float]
Frames = np.ndarray


@dataclasses.dataclass
class Case:
    """One scene to work on: its caption, a clip of it, and what else a task draws."""

    studio: Studio
    number: int
    prompt: str
    scene: Scene
    rng: np.random.Generator

    def request(self, prompt: str | None = None, **changes: object) -> Request:
        return Request(self.prompt if prompt is None else prompt, seed=self.number, **changes)  # type: ignore[arg-type]

    def size(self) -> tuple[int, int]:
        return SIZES[self.number % len(SIZES)]

    def render(self, frames: int, scene: Scene | None = None) -> Frames:
        return render(scene or self.scene, *self.size(), frames, self.rng)

    def other(self, **changes: str) -> tuple[str, Scene]:
        """The scene with another colour, shape and so on, and its caption."""
        scene = dataclasses.replace(self.scene, **changes)
        return caption(scene, self.rng), scene

    def another(self, names: object, but: str, *more: str) -> str:
        """A name at random that is none of these."""
        left = [name for name in names if name not in (but, *more)]  # type: ignore[attr-defined]
        return str(left[self.rng.integers(len(left))])


def joined(chunks: Iterator[Frames]) -> Frames:
    return np.concatenate(list(chunks))


def jumps(clip: Frames) -> np.ndarray:
    """How far the object moves from each frame to the next, in pixels [T-1]; infinite where it is missing."""
    distance = np.linalg.norm(np.diff(track(clip), axis=0), axis=1)
    return np.where(np.isnan(distance), np.inf, distance)


def changes(clip: Frames) -> np.ndarray:
    """Mean absolute difference between each frame and the next, in levels of 255 [T-1]."""
    return np.abs(np.diff(clip.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))


def strip(clips: list[Frames]) -> Frames:
    """Clips side by side on white, 8 pixels apart; a shorter one stays at its last frame."""
    length, height = (max(clip.shape[axis] for clip in clips) for axis in (0, 1))
    picture = np.full((length, height, sum(clip.shape[2] + 8 for clip in clips) - 8, 3), 255, np.uint8)
    left = 0
    for clip in clips:
        held = clip[np.minimum(np.arange(length), len(clip) - 1)]
        picture[:, : clip.shape[1], left : left + clip.shape[2]] = held
        left += clip.shape[2] + 8
    return picture


def write(path: Path, frames: Frames) -> None:
    with VideoWriter(path, frames.shape[2], frames.shape[1], 24) as writer:
        writer.write(frames)


def image(case: Case) -> tuple[Values, Frames]:
    width, height = case.size()
    made = joined(case.studio.generate(case.request(width=width, height=height, frames=1)))
    return {"attributes": score(made, case.scene)["all"]}, made


def any_shape(case: Case) -> tuple[Values, Frames]:
    width, height, frames = ANY[case.number % len(ANY)]
    made = joined(case.studio.generate(case.request(width=width, height=height, frames=frames)))
    assert made.shape == (frames, height, width, 3)
    return {"attributes": score(made, case.scene)["all"]}, made


def image_to_video(case: Case) -> tuple[Values, Frames]:
    given = case.render(33)[0]
    made = joined(case.studio.generate(sized(case.request(frames=33), given), {0: given}))
    measured = measure(made)
    return {"kept": bool((made[0] == given).all()), "motion": measured.motion == case.scene.motion}, made


def sized(request: Request, picture: Frames) -> Request:
    return dataclasses.replace(request, width=picture.shape[1], height=picture.shape[0])


def extend(case: Case, backward: bool = False) -> tuple[Values, Frames]:
    """17 of 65 frames are given, two seconds are added."""
    true = case.render(65)
    given = true[-17:] if backward else true[:17]
    made = joined(case.studio.extend(given, case.request(), 48, backward))
    kept = made[48:] if backward else made[:17]
    seam = 47 if backward else 16
    return {
        "kept": bool((kept == given).all()),
        "jump_px": jumps(made)[seam],
        "motion": measure(made[:48] if backward else made[17:]).motion == case.scene.motion,
    }, made


def backward(case: Case) -> tuple[Values, Frames]:
    return extend(case, backward=True)


def loop(case: Case) -> tuple[Values, Frames]:
    given = case.render(33)
    back = dataclasses.replace(case.scene, motion=OPPOSITE.get(case.scene.motion, "still"))
    made = joined(case.studio.loop(given, case.request(caption(back, case.rng)), 31))
    around = np.concatenate([made[-1:], made[:1]])
    return {"jump_px": jumps(around)[0], "worst_jump_px": jumps(made).max()}, made


def connect(case: Case) -> tuple[Values, Frames]:
    """Half of the cases join two clips of one object, half two different scenes."""
    first = case.render(17)
    other = case.scene
    if case.number % 2:
        colour = case.another(COLOURS, case.scene.colour)
        other = dataclasses.replace(case.scene, colour=colour, shape=case.another(SHAPES, case.scene.shape))
    second = case.render(17, other)
    made = joined(case.studio.connect(first, second, case.request(""), 47))
    cut = changes(np.stack([first[-1], second[0]]))[0]
    return {"kept": bool((made[:17] == first).all() and (made[-17:] == second).all()),
            "worst_change_of_cut": changes(made).max() / cut}, made  # fmt: skip


def edit(case: Case) -> tuple[Values, Frames]:
    given = case.render(33)
    colour = case.another(COLOURS, case.scene.colour, case.scene.background)
    prompt, wanted = case.other(colour=colour, shape=case.another(SHAPES, case.scene.shape))
    made = joined(case.studio.edit(given, case.request(prompt, strength=0.7)))
    seen = measure(made)
    values: Values = {
        "attributes": (seen.shape, seen.colour, seen.background) == (wanted.shape, wanted.colour, wanted.background)
    }
    if case.scene.motion in MOVING:
        axis = 0 if case.scene.motion in ("left", "right") else 1
        values["trajectory"] = float(np.corrcoef(track(made)[:, axis], track(given)[:, axis])[0, 1])
    none = joined(case.studio.edit(given, case.request(prompt, strength=0.0)))
    full = joined(case.studio.edit(given, case.request(prompt, strength=1.0)))
    values |= {"strength_0_kept": bool((none == given).all()), "strength_1_attributes": score(full, wanted)["all"]}
    return values, made


def inpaint(case: Case) -> tuple[Values, Frames]:
    """A box around the object's whole path gets another object."""
    given = case.render(33)
    there = (np.abs(given.astype(int) - given[:, :1, :1]).max(axis=3) > 8).any(axis=0)
    rows, columns = (np.flatnonzero(there.any(axis=axis)) for axis in (1, 0))
    mask = np.zeros(given.shape[:3], np.bool_)
    mask[:, max(0, rows[0] - 4) : rows[-1] + 5, max(0, columns[0] - 4) : columns[-1] + 5] = True
    colour = case.another(COLOURS, case.scene.colour, case.scene.background)
    prompt, wanted = case.other(colour=colour, shape=case.another(SHAPES, case.scene.shape))
    made = joined(case.studio.inpaint(given, mask, case.request(prompt)))
    seen = measure(made)
    return {
        "kept": bool((made[~mask] == given[~mask]).all()),
        "inside": (seen.shape, seen.colour) == (wanted.shape, wanted.colour),
    }, made


def blend(case: Case) -> tuple[Values, Frames]:
    first = case.render(17)
    _, scene = case.other(colour=case.another(COLOURS, case.scene.colour))
    second = case.render(17, scene)
    ends = [case.studio.blend(first, second, case.request(""), weight, inversion=True) for weight in (0.0, 1.0)]
    half = case.studio.blend(first, second, case.request(""), 0.5, inversion=True)
    plain = case.studio.blend(first, second, case.request("", strength=0.6), 0.5, inversion=False)
    return {
        "weight_0_db": psnr(ends[0], first),
        "weight_1_db": psnr(ends[1], second),
        "half_whole": measure(half).whole,
        "latents_half_whole": measure(plain).whole,
    }, half


def keyframes(case: Case) -> tuple[Values, Frames]:
    true = case.render(33)
    shown = {number: true[number] for number in (0, 16, 32)}
    made = joined(case.studio.generate(sized(case.request(frames=33), true[0]), shown))
    return {
        "kept": all((made[number] == picture).all() for number, picture in shown.items()),
        "between_db": min(psnr(made[number], true[number]) for number in (8, 24)),
        "motion": measure(made).motion == case.scene.motion,
    }, made


def variation(case: Case) -> tuple[Values, Frames]:
    given = case.render(33)
    made = joined(case.studio.edit(given, case.request(strength=0.95)))
    seen = measure(made)
    apart = np.linalg.norm(track(made) - track(given), axis=1).mean()
    return {
        "attributes": (seen.shape, seen.colour, seen.background)
        == (case.scene.shape, case.scene.colour, case.scene.background),
        "apart_px": float(apart),
    }, made


def long_video(case: Case) -> tuple[Values, Frames]:
    """Six seconds of one prompt; an object that has no room left stays where it is."""
    made = joined(case.studio.generate(case.request(width=64, height=64, frames=145)))
    seen = measure(made)
    return {
        "jump_px": jumps(made).max(),
        "attributes": (seen.shape, seen.colour, seen.background)
        == (case.scene.shape, case.scene.colour, case.scene.background),
        "whole": seen.whole,
    }, made


def storyboard(case: Case) -> tuple[Values, Frames]:
    """Three motions of one object, 1 1/3 seconds each."""
    motions = [case.scene.motion, OPPOSITE.get(case.scene.motion, "still"), case.scene.motion]
    shown = [Shown(32 * i, case.other(motion=motion)[0]) for i, motion in enumerate(motions)]
    made = joined(case.studio.generate(case.request(width=64, height=64, frames=97), scenes=shown))
    right = [measure(made[32 * i : 32 * i + 33]).motion == motion for i, motion in enumerate(motions)]
    return {"jump_px": jumps(made).max(), "motions": float(np.mean(right))}, made


# per task: its function, and per measurement the target of a case and the share of cases that must reach it
Check = tuple[Callable[[float], bool], float]
TASKS: dict[str, tuple[Callable[[Case], tuple[Values, Frames]], dict[str, Check]]] = {
    "image": (image, {"attributes": (bool, 0.95)}),
    "any_shape": (any_shape, {"attributes": (bool, 0.85)}),
    "image_to_video": (image_to_video, {"kept": (bool, 1.0), "motion": (bool, 0.9)}),
    "extend": (extend, {"kept": (bool, 1.0), "jump_px": (lambda px: px <= 3, 1.0), "motion": (bool, 0.85)}),
    "backward": (backward, {"kept": (bool, 1.0), "jump_px": (lambda px: px <= 3, 1.0), "motion": (bool, 0.85)}),
    "loop": (loop, {"jump_px": (lambda px: px <= 3, 0.85), "worst_jump_px": (lambda px: px <= 3, 0.85)}),
    "connect": (connect, {"kept": (bool, 1.0), "worst_change_of_cut": (lambda share: share <= 0.5, 1.0)}),
    "edit": (
        edit,
        {
            "attributes": (bool, 0.8),
            "trajectory": (lambda r: r >= 0.8, 0.8),
            "strength_0_kept": (bool, 1.0),
            "strength_1_attributes": (bool, 0.8),
        },
    ),
    "inpaint": (inpaint, {"kept": (bool, 1.0), "inside": (bool, 0.8)}),
    "blend": (
        blend,
        {
            "weight_0_db": (lambda db: db >= 24, 1.0),
            "weight_1_db": (lambda db: db >= 24, 1.0),
            "half_whole": (bool, 0.0),
            "latents_half_whole": (bool, 0.0),
        },
    ),
    "keyframes": (keyframes, {"kept": (bool, 1.0), "between_db": (lambda db: db >= 20, 0.0), "motion": (bool, 0.0)}),
    "variation": (variation, {"attributes": (bool, 0.9), "apart_px": (lambda px: px >= 3, 0.8)}),
    "long_video": (long_video, {"jump_px": (lambda px: px <= 3, 1.0), "attributes": (bool, 0.9), "whole": (bool, 0.0)}),
    "storyboard": (storyboard, {"jump_px": (lambda px: px <= 3, 1.0), "motions": (lambda share: share == 1, 0.0)}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=EMBEDDED)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--only", default=",".join(TASKS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sheets", type=Path)
    options = parser.parse_args()
    studio = Studio(Pipeline.open(options.bundle, threads=options.threads))
    result: dict[str, object] = {}
    for name in options.only.split(","):
        task, checks = TASKS[name]
        start, values, rows = time.time(), [], []
        for number, (prompt, scene) in enumerate(evaluation_set(options.count, SEED)):
            value, made = task(Case(studio, number, prompt, scene, np.random.default_rng((SEED, number))))
            values.append(value)
            if number < 8:
                rows.append((made, f"{prompt}  " + ", ".join(f"{key} {v:.3g}" for key, v in value.items())))
        summary = {}
        for key, (passes, wanted) in checks.items():
            found = [float(value[key]) for value in values if key in value]
            share = float(np.mean([passes(v) for v in found]))
            summary[key] = {"share": share, "wanted": wanted, "median": float(np.median(found)), "cases": len(found)}
            summary[key] |= {"range": [min(found), max(found)]}
            spread = f"median {np.median(found):.3f}, {min(found):.3f} to {max(found):.3f}"
            print(
                f"{name:16}{key:24}{share:6.1%} of {wanted:4.0%}  {spread}{'' if share >= wanted else '  MISSED'}",
                flush=True,
            )
        result[name] = {"seconds": time.time() - start, **summary}
        if options.sheets:
            options.sheets.mkdir(parents=True, exist_ok=True)
            write(
                options.sheets / f"{name}.png", contact_sheet([c for c, _ in rows], [label for _, label in rows])[None]
            )
            if name not in ("image", "long_video"):
                write(options.sheets / f"{name}.webp", strip([clip for clip, _ in rows[:2]]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
