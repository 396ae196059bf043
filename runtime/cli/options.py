"""Options that several commands share, as dataclasses whose fields are options: see `app.command`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..bundle import EMBEDDED
from ..chat import KEY_VARIABLE, Endpoint
from ..errors import UserError
from ..fit import Fit
from ..geometry import nearest_size, plan
from ..pipeline import Pipeline
from ..plans import FOLDER
from ..request import Request
from ..spec import ModelSpec
from .app import err

Output = Annotated[Path, typer.Option("--output", "-o", help="File to write: .mp4, .webp, .gif, or .png.")]
Prompt = Annotated[str | None, typer.Argument(help="What the video shows; what made the clip, if not given.")]
ClipFile = Annotated[Path, typer.Argument(help="Video or image file.", show_default=False)]
Strength = Annotated[float, typer.Option(help="0 returns the clip, 1 ignores it.")]

MAX_SECONDS = 86400


@dataclass(frozen=True)
class Sampling:
    """How a clip is denoised; None is the model's default."""

    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off and halves the work.")] = (
        None
    )
    guidance_low: Annotated[
        float | None,
        typer.Option(help="Guidance at low noise, of a model with two denoisers; --guidance if not given."),
    ] = None
    sampler: Annotated[str | None, typer.Option(help="euler, unipc or stretched.")] = None
    shift: Annotated[float | None, typer.Option(help="Moves noise levels towards noise.")] = None
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same video; 0 if not given.")] = None

    def request(self, prompt: str = "", strength: float = 1.0) -> Request:
        return Request(
            prompt,
            negative_prompt=self.negative_prompt,
            steps=self.steps,
            guidance=self.guidance,
            guidance_low=self.guidance_low,
            sampler=self.sampler,
            shift=self.shift,
            seed=self.seed or 0,
            strength=strength,
        )


@dataclass(frozen=True)
class Run:
    """Which model, on what, and how it reports."""

    bundle: Annotated[Path, typer.Option("--bundle", help="Bundle folder; the embedded model if not given.")] = EMBEDDED
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engines; all cores if not given.")] = (
        None
    )
    target: Annotated[str, typer.Option(help="auto, tensorrt, rtx, cuda or cpu.")] = "auto"
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False

    def open(self) -> Pipeline:
        """The model on its target; says on which, where there was a choice."""
        pipeline = Pipeline.open(self.bundle, self.target, self.threads)
        if pipeline.target.target != "cpu" or (pipeline.bundle.folder / FOLDER).is_dir():
            err.print(f"target: {pipeline.target}", markup=False)
        return pipeline


@dataclass(frozen=True)
class Size:
    """The size that given media are brought to."""

    width: Annotated[
        int | None, typer.Option(help="Pixels; as near to the input's as the model can, if not given.")
    ] = None
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None
    fit: Annotated[Fit | None, typer.Option(help="How a picture gets another aspect ratio; crop if not given.")] = None

    def of(self, spec: ModelSpec) -> Callable[[tuple[int, int]], tuple[int, int]]:
        """From a file's size to the size wanted. Raises UserError for one that no picture can have."""
        if (self.width is None) != (self.height is None):
            raise UserError("give both --width and --height, or neither")
        if self.width is not None and self.height is not None:
            size = (self.width, self.height)
            plan(spec, *size, frames=1)
            return lambda _: size
        return lambda size: nearest_size(spec, *size)


@dataclass(frozen=True)
class Chat:
    """A language model that is asked; its key comes from the environment alone."""

    chat_url: Annotated[
        str | None, typer.Option(help=f"OpenAI-compatible endpoint, as http://host/v1; its key: {KEY_VARIABLE}.")
    ] = None
    chat_model: Annotated[str | None, typer.Option(help="Name of the endpoint's model.")] = None

    def endpoint(self) -> Endpoint | None:
        """The endpoint that is named, None where none is."""
        if (self.chat_url is None) != (self.chat_model is None):
            raise UserError("give both --chat-url and --chat-model, or neither")
        if self.chat_url is None or self.chat_model is None:
            return None
        return Endpoint(self.chat_url, self.chat_model, os.environ.get(KEY_VARIABLE))


def check_seconds(seconds: float | None) -> float | None:
    """A typer callback. Raises UserError for a duration that is not above 0 or longer than a day."""
    if seconds is not None and not 0 < seconds <= MAX_SECONDS:
        raise UserError(f"--seconds must be above 0 and at most {MAX_SECONDS}, is {seconds:g}")
    return seconds
