"""From tasks to files: what every command that makes clips does.

Flows in: Clips, each with the frames of a task. Flows out: files, each whole or not at all, and a record of each. Shows
progress on the way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..bundle import record
from ..comment import get
from ..errors import UserError
from ..pipeline import Pipeline
from ..recipe import Recipe
from ..sheet import MAX_ROWS, contact_sheet, sheet_size, shown_frames
from ..studio import Studio
from ..vae import Frames
from ..video import MAX_SIZE, VideoWriter, check_length, codec_for
from .app import err, out

MAX_CLIPS = 10_000


@dataclass(frozen=True)
class Clip:
    """One file to make."""

    path: Path
    shape: tuple[int, int, int]  # frames, height, width
    make: Callable[[Studio], Iterator[Frames]]
    recipe: Recipe  # goes into the file's comment
    label: str = ""  # on a contact sheet


def output_paths(path: Path, count: int, sheet: Path | None) -> list[Path]:
    """out.mp4 for one clip; out-1.mp4, out-2.mp4, ... for several. Raises UserError for one that cannot be written."""

    codec_for(path)
    if count > MAX_CLIPS:
        raise UserError(
            f"{count} clips are more than the {MAX_CLIPS} of one command; give fewer prompts or a lower --count"
        )
    digits = len(str(count))
    paths = [path] if count == 1 else [path.with_stem(f"{path.stem}-{i:0{digits}}") for i in range(1, count + 1)]
    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise UserError(f"--sheet writes a PNG, so its name must end in .png, is {str(sheet)!r}")
        if sheet in paths:
            raise UserError(f"--sheet {sheet} is also the name of a clip; choose another")
        if count > MAX_ROWS:
            raise UserError(
                f"--sheet holds up to {MAX_ROWS} clips, these are {count}; leave it out or make fewer clips"
            )
    for target in paths + ([sheet] if sheet else []):
        check_writable(target)
    return paths


def check_writable(path: Path) -> None:
    try:
        if path.exists() and path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; give a file name inside it")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another name") from error
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UserError(f"cannot write {path}: {path.parent} is not a writable folder; create it or choose another")


def write_all(
    pipeline: Pipeline, clips: Sequence[Clip], fps: float, clock: Clock, as_json: bool, sheet: Path | None = None
) -> None:
    """Makes every clip and says so. What can be seen to fail, fails before the first one is made."""
    _check(clips, sheet)
    made, rows = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        for number, clip in enumerate(clips, start=1):
            thumbnails = Thumbnails(clip.shape[0]) if sheet else None
            label = f"[{number}/{len(clips)}] " if len(clips) > 1 else ""
            _write(pipeline, clip, fps, clock, progress, label, thumbnails)
            if thumbnails is not None:
                rows.append((thumbnails, clip.label))
            frames, height, width = clip.shape
            size = {"width": width, "height": height, "frames": frames, "fps": fps}
            made.append({"path": str(clip.path), **clip.recipe.options, **size, "seconds": clock.take()})
    if sheet is not None:
        _write_sheet(sheet, rows)
    if as_json:
        out.print_json(data={"clips": made, "sheet": str(sheet) if sheet else None})
        return
    for told in made:
        _say(told)
    if sheet:
        out.print(f"wrote {sheet}: {len(made)} rows", markup=False)


def _say(record: dict[str, Any]) -> None:
    stages = ", ".join(f"{name} {value:.2f} s" for name, value in record["seconds"].items())
    out.print(
        f"wrote {record['path']}: {record['frames']} frames of {record['width']}x{record['height']}, "
        f"{record['frames'] / record['fps']:.2f} s at {record['fps']:g} fps, seed {record['seed']} ({stages})",
        markup=False,
    )


def _check(clips: Sequence[Clip], sheet: Path | None) -> None:

    for clip in clips:
        check_length(clip.path, clip.shape[0])
    if sheet is not None:
        width, height = sheet_size([clip.shape for clip in clips])
        if max(width, height) > MAX_SIZE:
            raise UserError(
                f"--sheet would be {width}x{height} pixels, over {MAX_SIZE} a side; "
                f"leave it out or make fewer or smaller clips"
            )


def _write(
    pipeline: Pipeline,
    clip: Clip,
    fps: float,
    clock: Clock,
    progress: Progress,
    label: str,
    thumbnails: Thumbnails | None,
) -> None:

    frames, height, width = clip.shape
    steps: TaskID = progress.add_task(f"{label}denoise", total=None)
    whole: TaskID = progress.add_task(f"{label}frames", total=frames)

    def on_step(done: int, of: int) -> None:
        progress.update(steps, completed=done, total=of)

    with VideoWriter(clip.path, width, height, fps, clip.recipe.text()) as writer:
        for chunk in clip.make(Studio(pipeline, on_step, stage=clock)):
            with clock("write"):
                writer.write(chunk)
            if thumbnails is not None:
                thumbnails.add(chunk)
            progress.advance(whole, len(chunk))
        with clock("write"):
            writer.close()
    progress.remove_task(steps)
    progress.remove_task(whole)


class Thumbnails:
    """Picks a contact sheet's frames out of a stream of chunks."""

    def __init__(self, frames: int):

        self.wanted = set(shown_frames(frames))
        self.seen = 0
        self.kept: list[Frames] = []

    def add(self, chunk: Frames) -> None:
        self.kept += [chunk[i : i + 1].copy() for i in range(len(chunk)) if self.seen + i in self.wanted]
        self.seen += len(chunk)


def read_recipe(path: Path) -> Recipe | None:
    """How a file was made, or None when it does not say. Raises UserError when it cannot be read."""

    return Recipe.parse(get(path))


def digest(path: Path) -> str:
    """SHA-256 of a file. Raises UserError when it cannot be read."""
    try:
        return record(path).sha256
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give the path of a video or an image on this machine, not a URL"
        ) from error


def _write_sheet(path: Path, rows: list[tuple[Thumbnails, str]]) -> None:
    import numpy as np

    clips = [np.concatenate(thumbnails.kept) for thumbnails, _ in rows]
    image = contact_sheet(clips, [label for _, label in rows])
    with VideoWriter(path, image.shape[1], image.shape[0], 1) as writer:
        writer.write(image[None])


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """What was measured since the last take."""
        taken, self.seconds = self.seconds, {}
        return taken
