"""Every task of the model: each is a few canvases, painted one after the other.

Flows in: a Pipeline, a Request, and clips or pictures as uint8 frames of one size. Flows out: uint8 frames in order, a
few at a time. Clips longer than a window are made window by window, each beginning with frames of the one before, so
memory does not grow with duration (backward it does: what is made last comes first). Knows nothing of files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .canvas import Canvas, Frames, Mask, fill, known_tokens, shown_mask, slerp
from .caption import Captioner
from .errors import UserError
from .geometry import frames_step
from .pipeline import Pipeline
from .request import Request, Settings

CONTEXT = 9  # frames of a clip that the model sees of it when it goes on
REPAINTS, REPAINT_STRENGTH = 2, 0.6  # where known tokens follow unknown ones: see `Studio._paint`
SEED_STRIDE = 0x9E3779B97F4A7C15  # between the seeds of windows: 2^64 over the golden ratio


@dataclass(frozen=True)
class Scene:
    """From this frame on the clip shows this prompt."""

    start: int
    prompt: str


class Studio:
    """A pipeline that makes clips from other clips.

    `on_step(done, steps)` is called after every denoising step; `cancel()` is asked before every one and, when true,
    ends the task with Cancelled. All methods raise UserError for what the model cannot serve.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        on_step: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
        stage: Callable[[str], AbstractContextManager[None]] = nullcontext,  # type: ignore[assignment]
    ):
        self.pipeline, self.spec = pipeline, pipeline.spec
        self.on_step, self.cancel, self.stage = on_step, cancel, stage
        self.window = self.spec.defaults.frames
        self.longest = self._ceil(2 * self.window - frames_step(self.spec))  # frames that are made at once at most

    def check(self, request: Request, scenes: Sequence[Scene] = (), keyframes: Collection[int] = ()) -> Settings:
        """A request with nothing left open. Raises UserError, in no time, when it cannot be served."""
        settings = request.complete(self.spec)
        starts = [scene.start for scene in scenes]
        if scenes and (starts != sorted({0, *starts}) or starts[-1] >= settings.frames):
            raise UserError(
                f"scenes must start at frame 0 and each later than the one before, below {settings.frames} frames; "
                f"they start at {', '.join(map(str, starts))}"
            )
        prompts = [scene.prompt for scene in scenes] or [request.prompt]
        at_once = self._at_once(settings.frames, len(prompts))
        for prompt in prompts:
            self.pipeline.check(dataclasses.replace(request, prompt=prompt, frames=at_once))
        first = min(at_once, settings.frames, *starts[1:])
        if out := [number for number in keyframes if not 0 <= number < first]:
            scene = " of the first scene" if len(scenes) > 1 else ""
            raise UserError(
                f"keyframe {out[0]} is outside the frames 0 to {first - 1}{scene} that are made at once; move it"
            )
        return settings

    def _at_once(self, frames: int, scenes: int) -> int:
        """How many frames are made first: all, up to twice a window and for one scene."""
        return frames if scenes == 1 and frames < 2 * self.window else self._ceil(self.window)

    def generate(
        self, request: Request, keyframes: Mapping[int, Frames] | None = None, scenes: Sequence[Scene] = ()
    ) -> Iterator[Frames]:
        """Text to video or image; with pictures [H,W,3] at frame numbers, around these; with scenes, one after another.

        Pictures go to the output as they are; they must be in the first window and scene. Up to twice a window is made
        at once, as far as there is one prompt.
        """
        settings = self.check(request, scenes, keyframes or ())
        scenes = scenes or [Scene(0, request.prompt)]
        stops = [*(scene.start for scene in scenes[1:]), settings.frames]
        at_once = self._at_once(settings.frames, len(scenes))
        if at_once == settings.frames and not keyframes:
            yield from self._stream(request, None)
            return
        past = np.zeros((0, settings.height, settings.width, 3), np.uint8)
        done = 0
        if keyframes:
            first = dataclasses.replace(request, prompt=scenes[0].prompt)
            past = self._paint_around(first, keyframes, at_once)
            for number, picture in keyframes.items():
                past[number] = picture
            past = past[: stops[0]]
            done = len(past)
            yield past
        for number, (scene, stop) in enumerate(zip(scenes, stops, strict=True)):
            seeded = self._seeded(dataclasses.replace(request, prompt=scene.prompt), 1000 * number)
            past = yield from self._sweep(seeded, stop - done, past[-CONTEXT if done > scene.start else -1 :])
            done = stop

    def extend(
        self, clip: Frames, request: Request, frames: int, backward: bool = False, context: int = CONTEXT
    ) -> Iterator[Frames]:
        """The clip [T,H,W,3] and `frames` more after it, or before it; the clip itself stays as it is.

        The model sees `context` frames of the clip: more keep its motion, one leaves the motion to the prompt. What is
        before the clip is made at once, up to twice a window: in windows motion often came to rest too soon.
        """
        self.check_context(context)
        if not backward:
            yield clip
            yield from self._sweep(request, frames, clip[-context:])
            return
        made: list[Frames] = []
        future, left = clip[:context], frames
        while left > 0:
            length = self.extended(left, True, len(future))
            shown = dict(enumerate(future, length - len(future)))
            window = self._paint_around(self._seeded(request, len(made)), shown, length)
            made.insert(0, window[: -len(future)][-left:])
            future, left = np.concatenate([made[0], future])[:context], left - len(made[0])
        yield from made
        yield clip

    def extended(self, frames: int, backward: bool, context: int = CONTEXT) -> int:
        """The frames of the longest canvas of `extend`, for a clip of at least `context` frames."""
        return self._ceil(min(frames + context, self.longest if backward else self.window))

    def check_context(self, context: int) -> None:
        """Raises UserError for a context of `extend` that is empty, or leaves no room in a window."""
        if not 1 <= context < self.window:
            raise UserError(f"context must be from 1 to {self.window - 1} frames, is {context}")

    def connect(self, first: Frames, second: Frames, request: Request, frames: int) -> Iterator[Frames]:
        """Two clips [T,H,W,3] with about `frames` frames between them, so that latent frames are not divided."""
        yield first
        yield self.bridge(first[-1], second[0], request, frames)
        yield second

    def loop(self, clip: Frames, request: Request, frames: int) -> Iterator[Frames]:
        """The clip [T,H,W,3] and about `frames` frames that lead from its end to its start."""
        yield clip
        yield self.bridge(clip[-1], clip[0], request, frames)

    def bridge(self, first: Frames, last: Frames, request: Request, frames: int) -> Frames:
        """What happens between two pictures [H,W,3], without these: as many frames as `bridged` says."""
        length = self.bridged(frames) + 2
        return self._paint_around(request, {0: first, length - 1: last}, length)[1:-1]

    def bridged(self, frames: int) -> int:
        """The frames that a bridge of about `frames` frames has. Raises UserError for more than are made at once."""
        if frames + 2 > self.longest:
            most = self.longest - 2
            raise UserError(
                f"{frames} frames from one clip to the next are over the {most} that are made at once, "
                f"{float(most / self.spec.fps):.2f} seconds; make fewer, or `extend` the clip first"
            )
        return self._ceil(frames + 2) - 2

    def windowed(self, frames: int) -> int:
        """The frames of the longest canvas by which a clip of `frames` frames is made window by window."""
        return self._ceil(min(frames, self.window))

    def blended(self, frames: int) -> int:
        """The frames of the canvas of a blend of `frames` frames. Raises UserError for more than are made at once."""
        if frames > self.longest:
            raise UserError(
                f"a blend of {frames} frames is over the {self.longest} that are made at once, "
                f"{float(self.longest / self.spec.fps):.2f} seconds; cut the clips"
            )
        return self._ceil(frames)

    @staticmethod
    def inverted(request: Request) -> Request:
        """What a blend by inversion asks for. Raises UserError where the request names other steps."""
        settled = dataclasses.replace(request, sampler="euler", guidance=1.0, guidance_low=None, strength=1.0)
        for name, value in vars(request).items():
            if value not in (None, getattr(settled, name)):
                raise UserError(
                    f"inversion is by euler, without guidance, at strength 1, not with {name} {value}; "
                    f"leave it out, or blend latents"
                )
        return settled

    def edit(self, clip: Frames, request: Request) -> Iterator[Frames]:
        """SDEdit (Meng et al. 2022): the clip [T,H,W,3] with as much noise as `request.strength` says, denoised.

        At strength 0 it is the clip; at 1 only its size and duration are left.
        """
        if request.strength == 0:
            frames, height, width = clip.shape[:3]
            self.pipeline.check(dataclasses.replace(request, width=width, height=height, frames=self.windowed(frames)))
            yield clip
            return
        yield from self._sweep(request, len(clip), clip[:0], (clip, np.zeros(clip.shape[:3], np.bool_)))

    def inpaint(self, clip: Frames, mask: Mask, request: Request) -> Iterator[Frames]:
        """The clip [T,H,W,3] made anew where the mask [T,H,W] is true; elsewhere it stays as it is."""
        start = 0
        for made in self._sweep(request, len(clip), clip[:0], (clip, ~mask)):
            part = slice(start, start + len(made))
            yield np.where(mask[part, ..., None], made, clip[part])
            start += len(made)

    def blend(self, first: Frames, second: Frames, request: Request, weight: float, inversion: bool) -> Frames:
        """A clip between two [T,H,W,3] of one shape: `first` at weight 0, `second` at 1.

        With `inversion` the noises that make the two clips (by `euler`, without guidance) are interpolated, else their
        latents, which are then denoised from `request.strength`.
        """
        self.blended(len(first))
        latents = [self._encode(self._padded(clip)) for clip in (first, second)]
        noise = None
        if inversion:
            request = self.inverted(request)
            noises = []
            for latent in latents:
                generation = self.pipeline.prepare_inversion(request, latent)
                with self.stage("denoise"):
                    self.pipeline.finish(generation, self.on_step, self.cancel)
                noises.append(self.pipeline.latent(generation))
            noise = slerp(noises[0], noises[1], weight)
        mixed = slerp(latents[0], latents[1], weight)
        grid = known_tokens(self.spec, np.zeros(self._padded(first).shape[:3], np.bool_))
        return np.concatenate(list(self._stream(request, Canvas(mixed, grid, noise))))[: len(first)]

    def describe(self, clip: Frames, beams: int = 1) -> str:
        """What the first frames of a clip [T,H,W,3] show, as many as are made at once.

        Raises UserError as `Captioner`, for a model that has none too.
        """
        step = frames_step(self.spec)
        captioner = Captioner(self.spec, self.pipeline.engines, self.pipeline.tokenizer)
        frames = min(len(clip), self.longest)
        return captioner.caption(self._encode(clip[: 1 + (frames - 1) // step * step]), beams)

    def _stream(self, request: Request, canvas: Canvas | None) -> Iterator[Frames]:
        with self.stage("text"):
            generation = self.pipeline.prepare(request, canvas)
        with self.stage("denoise"):
            self.pipeline.finish(generation, self.on_step, self.cancel)
        chunks = self.pipeline.decode(generation)
        while True:
            with self.stage("decode"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def _encode(self, frames: Frames, known: Mask | None = None) -> NDArray[np.float32]:
        with self.stage("encode"):
            return self.pipeline.encode(frames, known)

    def _paint(self, request: Request, pixels: Frames, known: Mask, given: Mask | None = None) -> Frames:
        """Makes the unknown part of a clip [T,H,W,3]; `given` are the known pixels that are not guesses (all if None).

        A latent frame depends on all frames before it. Where known tokens follow unknown ones, their latents were
        encoded with a guessed past, so the clip is painted again: the given pixels over what was made, encoded with
        that past.
        """
        tokens = known_tokens(self.spec, known)
        whole = tokens.all(axis=(1, 2))
        prefix = bool((tokens.any(axis=(1, 2)) == whole).all() and (np.diff(whole.astype(int)) <= 0).all())
        if self.spec.denoiser.route == "channels":
            canvas = self._shown_canvas(request, pixels, known if given is None else given, tokens)
            return np.concatenate(list(self._stream(request, canvas)))
        canvas = Canvas(self._encode(pixels), tokens)
        made = np.concatenate(list(self._stream(request, canvas)))
        weaker = dataclasses.replace(request, strength=min(request.strength, REPAINT_STRENGTH))
        for _ in range(0 if prefix else REPAINTS):
            pixels = np.where((known if given is None else given)[..., None], pixels, made)
            made = np.concatenate(list(self._stream(weaker, Canvas(self._encode(pixels), tokens))))
        return made

    def _shown_canvas(self, request: Request, pixels: Frames, given: Mask, tokens: Mask) -> Canvas:
        """For a model with channels for what is given; the image encoder sees the first given frames and the last."""
        encoded = self._encode(pixels, given)
        whole = np.flatnonzero(given.all(axis=(1, 2)))
        count = self.spec.pictures
        places = whole[:1] if count == 1 else sorted({*whole[: count - 1], *whole[-1:]})
        pictures = pixels[places] if count else None
        latents = self._encode(pixels) if request.strength < 1 else encoded
        return Canvas(latents, tokens, None, np.concatenate([shown_mask(self.spec, given), encoded]), pictures)

    def _paint_around(self, request: Request, shown: Mapping[int, Frames], frames: int) -> Frames:
        """A clip of `frames` frames that has these [H,W,3] at these places.

        A latent frame is known when one of its frames is; the others are first taken to look like that one.
        """
        shape = next(iter(shown.values())).shape[:2]
        pixels, given = np.zeros((frames, *shape, 3), np.uint8), np.zeros((frames, *shape), np.bool_)
        for number, image in shown.items():
            pixels[number], given[number] = image, True
        latent = -(-np.arange(frames) // frames_step(self.spec))  # the latent frame of each frame
        known = np.isin(latent, latent[list(shown)])[:, None, None] & np.ones(shape, np.bool_)
        return self._paint(request, fill(pixels, given), known, given)

    def _sweep(
        self, request: Request, frames: int, past: Frames, source: tuple[Frames, Mask] | None = None
    ) -> Generator[Frames, None, Frames]:
        """`frames` frames that go on from `past` [T,H,W,3], window by window; returns the last ones made.

        `source` is what they start from below strength 1, and which of its pixels are known.
        """
        at = number = 0
        while at < frames:
            new = min(self.window - len(past), frames - at)
            length, seeded = self._ceil(len(past) + new), self._seeded(request, number)
            if source is not None:
                later = np.minimum(np.arange(length) - len(past) + at, frames - 1)
                pixels, known = source[0][later], source[1][later]
                pixels[: len(past)], known[: len(past)] = past, True
                made = self._paint(seeded, pixels, known)
            elif len(past):
                made = self._paint_around(seeded, dict(enumerate(past)), length)
            else:
                size = dataclasses.replace(seeded, frames=length, height=past.shape[1], width=past.shape[2])
                made = np.concatenate(list(self._stream(size, None)))
            made = made[len(past) : len(past) + new]
            yield made
            past = np.concatenate([past, made])[-CONTEXT:]
            at, number = at + new, number + 1
        return past

    def _padded(self, clip: Frames) -> Frames:
        """The clip with its last frame repeated up to a legal count."""
        return clip[np.minimum(np.arange(self._ceil(len(clip))), len(clip) - 1)]

    def _ceil(self, frames: int) -> int:
        """The least legal count of at least this many frames."""
        step = frames_step(self.spec)
        return 1 + -(-(frames - 1) // step) * step

    @staticmethod
    def _seeded(request: Request, window: int) -> Request:
        """Another seed for every window; the request's own for the first."""
        return dataclasses.replace(request, seed=(request.seed + window * SEED_STRIDE) % 2**64)
