"""`tubelet generate`: text to video or image, around pictures, along a storyboard."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..chat import Endpoint
from ..enhance import by_chat, by_rules
from ..errors import UserError
from ..fit import Fit
from ..geometry import frames_for
from ..media import read_clip
from ..pipeline import Pipeline
from ..recipe import Recipe
from ..request import Request, Settings
from ..strict import read, require
from ..studio import Scene, Studio
from ..vae import Frames
from .app import command, err
from .options import Chat, Output, Run, Sampling, Size, check_seconds
from .output import Clip, Clock, digest, output_paths, read_recipe, write_all


@dataclass(frozen=True)
class Beside:
    """What a recipe of `generate` holds beside Settings."""

    fps: float
    fit: str | None
    keyframes: Mapping[str, tuple[str, str]]  # by frame: the file and its SHA-256
    scenes: tuple[tuple[int, str], ...]  # from which frame on, and the prompt

    def __post_init__(self) -> None:
        require(self.fit in (None, *Fit), f"fit must be one of {', '.join(Fit)}, is {self.fit!r}")
        for number in self.keyframes:
            require(number.isdecimal(), f"a keyframe must be at the number of a frame, is at {number!r}")


MIN_FPS, MAX_FPS = 0.01, 1000.0
EMBEDDED_NAME = "tubelet-demo"  # its spec's


@command
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
    *,
    output: Output = Path("out.mp4"),
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line, instead of PROMPT.")] = None,
    storyboard: Annotated[
        Path | None, typer.Option(help="Text file of `SECONDS: PROMPT` lines, instead of PROMPT: what shows from when.")
    ] = None,
    like: Annotated[Path | None, typer.Option(help="Make what made this file; other options change it.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to begin with.")] = None,
    keyframe: Annotated[list[str] | None, typer.Option(help="FRAME:FILE, a picture at a frame; repeatable.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames, 1 + 4k for the embedded model.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Duration, instead of --frames.", callback=check_seconds)
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of the file; the model's if not given.")] = None,
    enhance: Annotated[
        bool, typer.Option("--enhance", help="Let a language model, or rules, detail the prompt.")
    ] = False,
    count: Annotated[int, typer.Option(min=1, help="Clips a prompt, with seeds SEED, SEED+1, ...")] = 1,
    sheet: Annotated[Path | None, typer.Option(help="Also write a contact sheet PNG of all clips.")] = None,
    size: Size,
    sampling: Sampling,
    chat: Chat,
    run: Run,
) -> None:
    """Make a video or an image from a prompt."""
    if not enhance and chat != Chat():
        raise UserError("--chat-url and --chat-model name what --enhance asks; give --enhance too, or leave them out")
    endpoint = chat.endpoint()
    if seconds is not None and frames is not None:
        raise UserError("--seconds and --frames exclude each other; give one")
    texts = _texts(prompt, prompts, storyboard, like)
    paths = output_paths(output, len(texts or [""]) * count, sheet)
    clock = Clock()
    with clock("load"):
        pipeline = run.open()
    given = {**dataclasses.asdict(size), **dataclasses.asdict(sampling), "frames": frames, "fps": fps}
    options = _complete(given, pipeline, like, seconds)
    if storyboard is not None:
        options["scenes"] = _read_storyboard(storyboard, options["fps"])
    if image is not None or keyframe:
        options["keyframes"] = _parse_keyframes(image, keyframe or [])
    if texts:
        options["scenes"] = ()
    if enhance and options["scenes"]:
        raise UserError("--enhance works on PROMPT and --prompts, not on scenes; leave it out, or give a PROMPT")
    if size.fit is not None and not options["keyframes"]:
        raise UserError(
            f"--fit {size.fit} is for pictures, and there is none; give --image or --keyframe, or leave it out"
        )
    texts = texts or [options.get("prompt", "")]
    shown = _read_keyframes(options, pipeline, size)
    if enhance:
        _clips(pipeline, options, shown, [""] * len(texts), count, paths)  # fails before a language model is asked
        texts = [_enhanced(text, endpoint, pipeline.spec.name) for text in texts]
    clips = _clips(pipeline, options, shown, texts, count, paths)
    write_all(pipeline, clips, options["fps"], clock, run.as_json, sheet)


def _complete(given: Mapping[str, Any], pipeline: Pipeline, like: Path | None, seconds: float | None) -> dict[str, Any]:
    """The options that are given, over those that made the file `like`."""
    options = _options(like, pipeline) if like else vars(Beside(float(pipeline.spec.fps), None, {}, ())).copy()
    options |= {name: value for name, value in given.items() if value is not None}
    fps = options["fps"] = float(options["fps"])
    if not MIN_FPS <= fps <= MAX_FPS:
        raise UserError(f"--fps must be from {MIN_FPS:g} to {MAX_FPS:g}, is {fps:g}")
    if seconds is not None:
        options["frames"] = frames_for(pipeline.spec, seconds, fps)
    return options


def _clips(
    pipeline: Pipeline,
    options: dict[str, Any],
    shown: Mapping[int, Frames],
    texts: Sequence[str],
    count: int,
    paths: Sequence[Path],
) -> list[Clip]:
    """What is to be made: `count` clips of every text, with seeds that follow each other, or of the scenes."""
    scenes = [Scene(start, text) for start, text in options["scenes"]]
    studio, clips = Studio(pipeline), []
    wanted: dict[str, Any] = {field.name: options.get(field.name) for field in dataclasses.fields(Request)}
    first = int(wanted["seed"] or 0)
    for path, (text, seed) in zip(paths, itertools.product(texts, range(first, first + count)), strict=True):
        prompt = scenes[0].prompt if scenes else text
        request = Request(**wanted | {"prompt": prompt, "seed": seed, "strength": 1.0})
        settings = studio.check(request, scenes, shown)
        recipe = Recipe.of(pipeline.bundle.key, "generate", options | dataclasses.asdict(settings))
        shape = (settings.frames, settings.height, settings.width)
        make = functools.partial(Studio.generate, request=request, keyframes=shown, scenes=scenes)
        clips.append(Clip(path, shape, make, recipe, f"{prompt} (seed {seed})"))
    return clips


def _texts(prompt: str | None, file: Path | None, storyboard: Path | None, like: Path | None) -> list[str]:
    """The prompts that are given, none of which may be what --like or --storyboard brings."""
    given = [name for name in (prompt, file, storyboard) if name is not None]
    if len(given) > 1 or not (given or like):
        raise UserError("give either a PROMPT or --prompts FILE, or --storyboard FILE, or --like FILE")
    if file is None:
        return [prompt] if prompt is not None else []
    texts = [line for line in _lines(file) if line]
    if not texts:
        raise UserError(f"{file} holds no prompt; write one a line")
    return texts


def _enhanced(prompt: str, endpoint: Endpoint | None, model: str) -> str:
    """A more detailed prompt, by a language model if there is one, else by the embedded model's rules."""
    if endpoint is None and model != EMBEDDED_NAME:
        raise UserError(f"to --enhance prompts for {model}, name a language model with --chat-url and --chat-model")
    enhanced = by_rules(prompt) if endpoint is None else by_chat(prompt, endpoint)
    err.print(f"prompt: {enhanced}", markup=False)
    return enhanced


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give the path of a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _read_storyboard(file: Path, fps: float) -> tuple[tuple[int, str], ...]:
    """Lines `SECONDS: PROMPT` -> the frame from which each prompt shows."""
    scenes = []
    for number, line in enumerate(_lines(file), start=1):
        if not line:
            continue
        start, colon, prompt = line.partition(":")
        try:
            scenes.append((round(float(start) * fps), prompt.strip()))
        except (ValueError, OverflowError):
            colon = ""
        if not colon or not prompt.strip() or re.match(r"\s*[\d.]+\s*:", prompt):
            raise UserError(f"line {number} of {file} is {line!r}; write SECONDS: PROMPT, as in 90.5: a red circle")
    if not scenes:
        raise UserError(f"{file} holds no scene; write lines such as 0: a red circle moves right")
    return tuple(scenes)


def _options(file: Path, pipeline: Pipeline) -> dict[str, Any]:
    """The options that made a file. Raises UserError unless `tubelet generate` did, with this bundle."""
    recipe = read_recipe(file)
    if recipe is None:
        raise UserError(f"{file} does not say how it was made; --like needs a file that tubelet wrote")
    if recipe.command != "generate":
        raise UserError(f"{file} was made by `tubelet {recipe.command}`; --like repeats what `tubelet generate` made")
    if recipe.bundle != pipeline.bundle.key:
        raise UserError(
            f"{file} was made by another model (key {recipe.bundle[:16]}) than {pipeline.bundle.folder} "
            f"({pipeline.bundle.key[:16]}); give its bundle with --bundle"
        )
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = {name: value for name, value in recipe.options.items() if name in names}
    beside = {name: value for name, value in recipe.options.items() if name not in names}
    return vars(read(Settings, settings, str(file))) | vars(read(Beside, beside, str(file)))


def _parse_keyframes(image: Path | None, keyframes: list[str]) -> dict[str, tuple[str, str]]:
    """Frame number -> file and its SHA-256, as a recipe keeps them."""
    files = {} if image is None else {0: image}
    for text in keyframes:
        number, colon, name = text.partition(":")
        if not colon or not name or not number.isdecimal():
            raise UserError(f"--keyframe {text!r} must be FRAME:FILE, as in 16:picture.png")
        if int(number) in files:
            raise UserError(f"frame {int(number)} is given two pictures; leave one out")
        files[int(number)] = Path(name)
    return {str(number): (str(file), digest(file)) for number, file in sorted(files.items())}


def _fit(name: str | None) -> Fit:
    return Fit.CROP if name is None else Fit(name)


def _read_keyframes(options: dict[str, Any], pipeline: Pipeline, size: Size) -> Mapping[int, Frames]:
    """The pictures that a recipe names, of one size, which goes into `options`."""
    shown = {}
    for number, (file, hashed) in options["keyframes"].items():
        if digest(Path(file)) != hashed:
            raise UserError(f"{file} is not the picture that was used; it was changed since")
        fit = _fit(options["fit"])
        wanted = Size(options.get("width"), options.get("height"), fit).of(pipeline.spec)
        shown[int(number)] = read_clip(Path(file), pipeline.spec.fps, wanted, fit)[0]
        options["height"], options["width"] = shown[int(number)].shape[:2]
    return shown
