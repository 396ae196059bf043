"""Commands that make clips from clips: extend, loop, connect, edit, inpaint, blend, variation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..canvas import Frames, Mask
from ..errors import UserError
from ..fit import Fit
from ..fit import Size as Extent
from ..media import read_clip
from ..recipe import Recipe
from ..request import Request
from ..studio import CONTEXT, Studio
from .app import command, err
from .options import ClipFile, Output, Prompt, Run, Sampling, Size, Strength, check_seconds
from .output import Clip, Clock, digest, output_paths, read_recipe, write_all

Make = Callable[["Studio", "Request"], Iterator["Frames"]]
OUT = Path("out.mp4")
SECONDS = Annotated[float, typer.Option(help="Duration of what is made.", callback=check_seconds)]


@command
def extend(
    clip: ClipFile,
    prompt: Prompt = None,
    *,
    output: Output = OUT,
    seconds: SECONDS = 2.0,
    backward: Annotated[bool, typer.Option("--backward", help="Make what happens before the clip.")] = False,
    context: Annotated[
        int, typer.Option(min=1, help="Frames of the clip that the model sees: 1 leaves the motion to the prompt.")
    ] = CONTEXT,
    size: Size,
    sampling: Sampling,
    run: Run,
) -> None:
    """Make a clip longer; the clip itself stays as it is."""
    desk = Desk("extend", [clip], prompt, output, size, sampling.request(), run)
    (given,) = desk.clips
    frames = desk.frames(seconds)
    desk.studio.check_context(context)
    desk.write(
        len(given) + frames,
        desk.studio.extended(frames, backward, min(context, len(given))),
        lambda studio, request: studio.extend(given, request, frames, backward, context),
        {"added": frames, "backward": backward, "context": context},
    )


@command
def loop(
    clip: ClipFile,
    prompt: Prompt = None,
    *,
    output: Output = OUT,
    seconds: SECONDS = 1.0,
    size: Size,
    sampling: Sampling,
    run: Run,
) -> None:
    """Make a clip that leads from its end to its start."""
    desk = Desk("loop", [clip], prompt, output, size, sampling.request(), run)
    (given,) = desk.clips
    frames = desk.studio.bridged(desk.frames(seconds))
    desk.write(
        len(given) + frames,
        frames + 2,  # the pictures that it leads from and to
        lambda studio, request: studio.loop(given, request, frames),
        {"added": frames},
    )


@command
def connect(
    first: ClipFile,
    second: ClipFile,
    prompt: Prompt = None,
    *,
    output: Output = OUT,
    seconds: SECONDS = 2.0,
    size: Size,
    sampling: Sampling,
    run: Run,
) -> None:
    """Make what happens between two clips."""
    desk = Desk("connect", [first, second], prompt, output, size, sampling.request(), run)
    one, other = desk.clips
    frames = desk.studio.bridged(desk.frames(seconds))
    desk.write(
        len(one) + frames + len(other),
        frames + 2,  # the pictures that it leads from and to
        lambda studio, request: studio.connect(one, other, request, frames),
        {"added": frames},
    )


@command
def edit(
    clip: ClipFile,
    prompt: Annotated[str, typer.Argument(help="What the clip shows then.")],
    *,
    output: Output = OUT,
    strength: Strength = 0.7,
    size: Size,
    sampling: Sampling,
    run: Run,
) -> None:
    """Make a clip show something else, moving as it does (SDEdit)."""
    _redo("edit", clip, prompt, output, strength, size, sampling, run)


@command
def variation(
    clip: ClipFile,
    prompt: Prompt = None,
    *,
    output: Output = OUT,
    strength: Strength = 0.95,
    size: Size,
    sampling: Sampling,
    run: Run,
) -> None:
    """Make another clip of the same kind; every seed makes another one."""
    _redo("variation", clip, prompt, output, strength, size, sampling, run)


def _redo(
    name: str, clip: Path, prompt: str | None, output: Path, strength: float, size: Size, sampling: Sampling, run: Run
) -> None:
    desk = Desk(name, [clip], prompt, output, size, sampling.request(strength=strength), run)
    (given,) = desk.clips
    desk.write(len(given), desk.studio.windowed(len(given)), lambda studio, request: studio.edit(given, request))


@command
def inpaint(
    clip: ClipFile,
    prompt: Annotated[str, typer.Argument(help="What the clip shows then.")],
    *,
    mask: Annotated[Path, typer.Option(help="Picture or video, white where the clip is made anew.")],
    output: Output = OUT,
    size: Size,
    sampling: Sampling,
    run: Run,
) -> None:
    """Make a part of a clip anew, in space and time; the rest stays as it is."""
    desk = Desk("inpaint", [clip], prompt, output, size, sampling.request(), run)
    (given,) = desk.clips
    white = desk.read_mask(mask, given)
    desk.write(
        len(given),
        desk.studio.windowed(len(given)),
        lambda studio, request: studio.inpaint(given, white, request),
        {"mask": [str(mask), digest(mask)]},
    )


@command
def blend(
    first: ClipFile,
    second: ClipFile,
    prompt: Prompt = None,
    *,
    output: Output = OUT,
    weight: Annotated[float, typer.Option(min=0, max=1, help="0 is the first clip, 1 the second.")] = 0.5,
    by: Annotated[
        str, typer.Option(help="inversion: between the noises that make the clips; latents: between the clips.")
    ] = "inversion",
    strength: Annotated[
        float | None, typer.Option(help="0 returns the clip, 1 ignores it; of --by latents, 0.6 if not given.")
    ] = None,
    size: Size,
    sampling: Sampling,
    run: Run,
) -> None:
    """Make a clip between two clips."""
    if by not in ("inversion", "latents"):
        raise UserError(f"--by must be inversion or latents, is {by!r}")
    inversion = by == "inversion"
    if strength is None:
        strength = 1.0 if inversion else 0.6
    request = sampling.request(strength=strength)
    desk = Desk("blend", [first, second], prompt, output, size, Studio.inverted(request) if inversion else request, run)
    frames = min(map(len, desk.clips))
    one, other = (clip[:frames] for clip in desk.clips)
    desk.write(
        frames,
        desk.studio.blended(frames),
        lambda studio, request: iter([studio.blend(one, other, request, weight, inversion)]),
        {"weight": weight, "by": by},
    )


class Desk:
    """What all these commands do: read clips, settle a request, make one clip, write it."""

    def __init__(
        self,
        command: str,
        files: list[Path],
        prompt: str | None,
        output: Path,
        size: Size,
        request: Request,
        run: Run,
    ):

        self.command, self.files, self.prompt, self.request, self.run = command, files, prompt, request, run
        (self.path,) = output_paths(output, 1, None)
        self.clock = Clock()
        with self.clock("load"):
            self.pipeline = run.open()
        self.studio = Studio(self.pipeline)
        self.fps = self.pipeline.spec.fps
        self.fit = size.fit or Fit.CROP
        with self.clock("read"):
            self.clips = self._read(size.of(self.pipeline.spec))

    def _describe(self) -> str:
        """What the clips show, by their own account or the captioner's; nothing where they differ."""
        said = set()
        for file, clip in zip(self.files, self.clips, strict=True):
            if (prompt := _told(file)) is not None:
                said.add(prompt)
            elif self.pipeline.spec.captioner is not None:
                said.add(self.studio.describe(clip))
        prompt = said.pop() if len(said) == 1 else ""
        err.print(f"prompt: {prompt or '(none)'}", markup=False)
        return prompt

    def _read(self, size: Callable[[Extent], Extent]) -> list[Frames]:
        """All clips in the size of the first."""
        first = read_clip(self.files[0], self.fps, size, self.fit)
        height, width = first.shape[1:3]
        return [first, *(read_clip(file, self.fps, lambda _: (width, height), self.fit) for file in self.files[1:])]

    def read_mask(self, file: Path, clip: Frames) -> Mask:
        """bool [T,H,W], of the clip's shape; a picture counts for all frames."""
        height, width = clip.shape[1:3]
        frames = read_clip(file, self.fps, lambda _: (width, height), self.fit)
        if len(frames) not in (1, len(clip)):
            raise UserError(f"the mask {file} has {len(frames)} frames, the clip {len(clip)}; make them equal")
        white = frames.max(axis=3) > 127
        if not white.any():
            raise UserError(f"the mask {file} is nowhere white, so nothing would be made")
        return np.broadcast_to(white, clip.shape[:3])

    def frames(self, seconds: float) -> int:
        return max(1, round(seconds * self.fps))

    def write(self, frames: int, canvas: int, make: Make, options: dict[str, Any] | None = None) -> None:
        """Makes a clip of `frames` frames, `canvas` of them at once."""
        _, height, width, _ = self.clips[0].shape
        request = dataclasses.replace(self.request, prompt=self.prompt or "", width=width, height=height, frames=canvas)
        settings = self.studio.check(request)  # before the captioner, which takes its time
        if self.prompt is None:
            request = dataclasses.replace(request, prompt=self._describe())
            settings = self.studio.check(request)
        inputs = [[str(file), digest(file)] for file in self.files]
        told = dataclasses.asdict(settings) | {"frames": frames, "fit": self.fit.value, "fps": float(self.fps)}
        recipe = Recipe.of(self.pipeline.bundle.key, self.command, {**told, **(options or {}), "clips": inputs})
        clip = Clip(self.path, (frames, height, width), lambda studio: make(studio, request), recipe)
        write_all(self.pipeline, [clip], float(self.fps), self.clock, self.run.as_json)


def _told(file: Path) -> str | None:
    """The prompt that made a file which could be decoded, if it says so; one of another kind than its name has none."""
    try:
        recipe = read_recipe(file)
    except UserError:
        return None
    return recipe.prompt if recipe else None
