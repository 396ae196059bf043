"""Prompt to frames: prepare -> step -> decode.

Flows in: a bundle and a Request. Flows out: uint8 frames, chunk by chunk. The three parts are public, so that a service
can interleave requests, report progress, cancel between steps, or save a generation and finish it elsewhere. Knows
nothing of files, codecs or how an engine runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from . import kernels, vae
from .bundle import TOKENIZER, Bundle
from .canvas import Canvas
from .errors import Cancelled, UserError
from .generation import Generation, Phase
from .geometry import Geometry, coordinate_columns, plan
from .image import prepare_pictures
from .loop import Pinned, Steps
from .request import Request, Settings
from .rope import rope_tables
from .schedule import LEVELS, Schedule, make_inversion, make_schedule, time_features
from .strict import require
from .targets import AUTO, Choice, Engines, open_engines
from .text import PromptTokenizer
from .vae import Frames

Float32 = NDArray[np.float32]


class Pipeline:
    """A loaded model. Engines are shared by all generations; a Generation belongs to one thread at a time."""

    def __init__(self, bundle: Bundle, engines: Engines, target: Choice):
        self.bundle, self.spec, self.engines, self.target = bundle, bundle.spec, engines, target
        self.tokenizer = PromptTokenizer.from_file(
            bundle.path(TOKENIZER), self.spec.text_encoder, "export the bundle again"
        )

    @classmethod
    def open(cls, bundle: str | Path | Bundle, target: str = AUTO, threads: int | None = None) -> Pipeline:
        """Verifies a bundle and loads its engines on a target, one of `targets.TARGETS`.

        "auto" takes the first that works here; `pipeline.target` says which, and why not those before it. `threads`
        limits the threads of each engine on the CPU, and of the extension in the whole process; None: all cores. Raises
        UserError when the bundle is damaged or not for the target, or an engine cannot be loaded, and DeviceError when
        a GPU fails.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        engines, choice = open_engines(opened, target, threads)
        kernels.set_threads(threads)
        return cls(opened, engines, choice)

    def warm_up(self) -> None:
        """Runs every engine at every size that its plan was made for, so that no request has to wait for kernels.

        For services. TensorRT-RTX compiles kernels the first time, and finds them again in a file later.
        """
        self.engines.warm_up()

    def close(self) -> None:
        """Frees what the engines hold; generations that are not finished cannot go on."""
        self.engines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def check(self, request: Request) -> tuple[Settings, Geometry, Schedule]:
        """What a request means for this model. Raises UserError, in no time, when it cannot be served."""
        settings = request.complete(self.spec)
        geometry = plan(self.spec, settings.width, settings.height, settings.frames)
        schedule = make_schedule(settings.sampler, settings.steps, settings.shift, settings.strength)
        self.tokenizer(self._prompts(settings))
        self.engines.check(geometry, len(self._prompts(settings)))
        return settings, geometry, schedule

    def generate(
        self,
        request: Request,
        canvas: Canvas | None = None,
        on_step: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> Frames:
        """The whole clip, uint8 [T,H,W,3]; with a canvas, of its size and around what it knows.

        `on_step(done, steps)` is called after every step; `cancel()` is asked before every step and, when true, ends
        the generation with Cancelled. Raises UserError for a request that the model cannot serve.
        """
        generation = self.prepare(request, canvas)
        self.finish(generation, on_step, cancel)
        return np.concatenate(list(self.decode(generation)))

    def finish(
        self,
        generation: Generation,
        on_step: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> None:
        """Takes all steps that are left, reporting and cancelling as `generate` does."""
        while not generation.finished:
            if cancel is not None and cancel():
                raise Cancelled(f"cancelled after {generation.done} of {generation.schedule.steps} steps")
            self.step(generation)
            if on_step is not None:
                on_step(generation.done, generation.schedule.steps)

    def prepare(self, request: Request, canvas: Canvas | None = None) -> Generation:
        """Checks a request, encodes its text and allocates all that its steps need.

        The size of the clip is the canvas's, if there is one. Raises UserError as `check`.
        """
        if canvas is not None:
            request = self._sized(request, canvas.latents)
        settings, geometry, schedule = self.check(request)
        if canvas is not None and canvas.noise is not None:
            sample = self._pack(canvas.noise)
        else:
            sample = self._pack(starting_noise(geometry, self.spec.denoiser.latent_channels, settings.seed))
        if canvas is None:
            require(settings.strength == 1, f"strength {settings.strength} needs a canvas to start from; leave it at 1")
            return self._allocate(settings, geometry, schedule, sample)
        if canvas.known.shape != geometry.grid:
            raise UserError(f"a canvas of this size has known {list(geometry.grid)}, not {list(canvas.known.shape)}")
        known, clean = canvas.known.ravel(), self._pack(canvas.latents)
        sigma = np.float32(schedule.sigmas[0])
        mixed = (1 - sigma) * clean + sigma * sample
        start = mixed if settings.strength < 1 else sample.copy()
        if self.spec.denoiser.route == "channels":
            return self._allocate(settings, geometry, schedule, start, canvas)
        pinned = Pinned(known.astype(np.float32), clean, None if self.spec.denoiser.two_levels else sample)
        start[known] = (clean if pinned.noise is None else mixed)[known]
        return self._allocate(settings, geometry, schedule, start, canvas, pinned)

    def prepare_inversion(self, request: Request, latents: Float32) -> Generation:
        """The way back: prepares the steps from a clip's latents [C,T',H',W'] to the noise that makes it.

        `latent` gives that noise in the end, for the sampler `euler` with the request's prompt, steps, shift and
        guidance. Raises UserError as `check`.
        """
        settings, geometry, _ = self.check(self._sized(request, latents))
        return self._allocate(settings, geometry, make_inversion(settings.steps, settings.shift), self._pack(latents))

    def _sized(self, request: Request, latents: Float32) -> Request:
        """A request for a clip of these latents [C,T',H',W']."""
        sizes = self.spec.vae
        _, frames, height, width = latents.shape
        return dataclasses.replace(
            request,
            frames=1 + (frames - 1) * sizes.temporal_factor,
            height=height * sizes.spatial_factor,
            width=width * sizes.spatial_factor,
        )

    def _pack(self, latents: Float32) -> Float32:
        return kernels.pack(np.ascontiguousarray(latents), self.spec.denoiser.patch)

    def _allocate(
        self,
        settings: Settings,
        geometry: Geometry,
        schedule: Schedule,
        sample: Float32,
        canvas: Canvas | None = None,
        pinned: Pinned | None = None,
    ) -> Generation:
        denoiser = self.spec.denoiser
        batch = len(self._prompts(settings))
        rope_cos, rope_sin = rope_tables(self.spec, geometry)
        state = _zeros((schedule.buffers, geometry.tokens, denoiser.token_values))
        state[0] = sample
        inputs = {
            "tokens": _zeros((batch, geometry.tokens, denoiser.token_inputs)),
            "time_features": _zeros((batch, 2, denoiser.time_features)),
            "rope_cos": rope_cos,
            "rope_sin": rope_sin,
        }
        if denoiser.two_levels:
            inputs["known"] = _zeros((batch, geometry.tokens))
            if pinned is not None:
                inputs["known"][:] = pinned.known
        inputs["tokens"][:, :, : denoiser.token_values] = sample
        columns = self._columns(geometry, canvas)
        inputs["tokens"][:, :, denoiser.token_values :] = columns
        levels = np.stack([schedule.timesteps, np.zeros(schedule.steps)], axis=1)  # [steps,2]: unknown, known
        condition = self._conditions(settings, canvas)

        def prepare(expert: str, guidance: float) -> Steps:
            return Steps(
                denoiser=f"denoiser{expert}",
                inputs={**inputs, **condition(expert)},
                state=state,
                matrices=schedule.matrices.astype(np.float32),
                time_table=time_features(levels, denoiser.time_features),
                sigmas=schedule.sigmas,
                guidance=guidance,
                pinned=pinned,
            )

        low = settings.guidance if settings.guidance_low is None else settings.guidance_low
        phases = [
            Phase(first, functools.partial(prepare, expert, guidance))
            for first, expert, guidance in zip(
                self._first_steps(schedule), self.spec.experts, (settings.guidance, low), strict=False
            )
        ]
        return Generation(settings, geometry, schedule, phases, self.engines.loop, self.bundle.key, canvas)

    def _first_steps(self, schedule: Schedule) -> list[int]:
        """The step at which each expert takes over, from high noise to low."""
        if self.spec.boundary is None:
            return [0]
        return [0, int((schedule.timesteps >= LEVELS * self.spec.boundary).sum())]

    def _columns(self, geometry: Geometry, canvas: Canvas | None) -> Float32:
        """What stands in every token after its latent values, [N,*]: what is given, and coordinates."""
        denoiser, parts = self.spec.denoiser, []
        if denoiser.shown_channels:
            if canvas is None or canvas.shown is None or len(canvas.shown) != denoiser.shown_channels:
                raise UserError(
                    f"{self.spec.name} makes clips of pictures or of other clips; give one, as with --image"
                )
            parts.append(self._pack(canvas.shown))
        if denoiser.coordinates:
            parts.append(coordinate_columns(geometry.grid))
        return np.concatenate(parts, axis=1) if parts else np.zeros((geometry.tokens, 0), np.float32)

    def step(self, generation: Generation) -> None:
        """One denoising step: the engine, then guidance and the sampler's update in one pass.

        Raises UserError when all steps are done.
        """
        if generation.finished:
            raise UserError(f"all {generation.done} steps are done; decode the generation")
        generation.step()

    def latent(self, generation: Generation) -> Float32:
        """The sample as a normalised latent [C,T',H',W']: clean after the last step, noise after an inversion's."""
        denoiser = self.spec.denoiser
        return kernels.unpack(generation.state[0], denoiser.latent_channels, generation.geometry.grid, denoiser.patch)

    def decode(self, generation: Generation) -> Iterator[Frames]:
        """Yields the clip's frames in order, uint8 [T,H,W,3], a few at a time.

        Beyond the latent, memory does not grow with duration. Before the last step the frames are a noisy preview.
        """
        return self.decode_latent(self.latent(generation))

    def decode_latent(self, latent: Float32) -> Iterator[Frames]:
        """Yields the frames of a normalised latent [C,T',H',W'], a few at a time."""
        return vae.decode(self.spec.vae, self.engines, latent)

    def encode(self, frames: Frames, known: NDArray[np.bool_] | None = None) -> Float32:
        """Frames uint8 [1 + 4k,H,W,3] (for the embedded model) -> normalised latent [C,T',H',W'], a few at a time.

        With `known` [1 + 4k,H,W] all other pixels are taken to be grey, exactly between black and white.
        Raises UserError as `geometry.plan` for a size that the model does not have.
        """
        plan(self.spec, frames.shape[2], frames.shape[1], len(frames))
        if known is None:
            return vae.encode(self.spec.vae, self.engines, frames)
        pixels = frames.astype(np.float32) / np.float32(127.5) - 1
        return vae.encode(self.spec.vae, self.engines, pixels * known[..., None])

    def _conditions(self, settings: Settings, canvas: Canvas | None) -> Callable[[str], dict[str, Any]]:
        """What an expert's denoiser reads of the prompt, the negative prompt if guided, and the canvas's pictures.

        Keys and values of every block [blocks,B,heads,*,D], and the mask of the text's padding [B,L] where the denoiser
        has one; the encoders run now, an expert's conditioners when asked.
        """
        ids, mask = self.tokenizer(self._prompts(settings))
        masks = {}
        if self.spec.denoiser.text_mask:
            masks["text_mask"], mask = mask.astype(np.float32), np.ones_like(mask)
        embeddings = self.engines["text_encoder"]({"ids": ids, "mask": mask})["embeddings"]
        image = None if self.spec.image_encoder is None else self._image_embeddings(canvas)

        def condition(expert: str) -> dict[str, Any]:
            found = masks | self.engines[f"conditioner{expert}"]({"embeddings": embeddings})
            if image is not None:
                rows = {"image_embeddings": np.repeat(image, len(ids), axis=0)}
                found |= self.engines[f"image_conditioner{expert}"](rows)
            return found

        return condition

    def _image_embeddings(self, canvas: Canvas | None) -> Float32:
        """The tokens of a canvas's pictures, one after the other: [1,M,width]."""
        assert self.spec.image_encoder is not None
        if canvas is None or canvas.pictures is None or len(canvas.pictures) != self.spec.pictures:
            given = 0 if canvas is None or canvas.pictures is None else len(canvas.pictures)
            raise UserError(f"{self.spec.name} makes clips of {self.spec.pictures} pictures, as --image; {given} given")
        pixels = prepare_pictures(canvas.pictures, self.spec.image_encoder.size)
        tokens = self.engines["image_encoder"]({"pixels": pixels})["image_embeddings"]
        return np.ascontiguousarray(tokens).reshape(1, -1, tokens.shape[-1])

    @staticmethod
    def _prompts(settings: Settings) -> list[str]:
        return [settings.prompt, settings.negative_prompt] if settings.guided else [settings.prompt]


def starting_noise(geometry: Geometry, channels: int, seed: int) -> Float32:
    """Standard normal noise [C,T',H',W'] from Philox keyed by the seed: the same on every machine."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    return generator.standard_normal((channels, *geometry.latent), np.float32)


def _zeros(shape: tuple[int, ...]) -> Float32:
    """Zeros on the boundary that the kernels like."""
    array = kernels.empty(shape, np.float32)
    array.fill(0)
    return array
