"""Prompt to frames: prepare -> step -> decode.

Flows in: a bundle and a Request. Flows out: uint8 frames, chunk by chunk. The three parts are public, so that a service
can interleave requests, report progress, cancel between steps, or save a generation and finish it elsewhere. Knows
nothing of files, codecs or how an engine runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import kernels
from .atomic import temporary_beside
from .bundle import TO_GENERATE, TOKENIZER, Bundle
from .engines import Binding, Engine, OnnxRuntimeEngine
from .errors import Cancelled, UserError
from .geometry import Geometry, coordinate_columns, plan
from .request import Request, Settings
from .schedule import Schedule, make_schedule, time_features
from .strict import read
from .text import PromptTokenizer

Float32 = NDArray[np.float32]
Frames = NDArray[np.uint8]  # [T,H,W,3]

DECODE_CHUNK = 4  # latent frames decoded at a time


@dataclass
class Generation:
    """A request on its way: the sampler's state, the denoiser's bound arrays, and how many steps are done.

    Everything is allocated by `Pipeline.prepare` and reused by every step.
    """

    settings: Settings
    geometry: Geometry
    schedule: Schedule
    matrices: Float32  # the schedule's, in the kernel's type
    time_table: Float32  # [steps,2,F]: features of the level of unknown tokens, and of known ones
    state: list[Float32]  # the sample x and the sampler's history, [N,P] each
    arrays: dict[str, NDArray[Any]]  # the denoiser's inputs and its output, by name
    binding: Binding
    bundle_key: str
    done: int = 0

    @property
    def finished(self) -> bool:
        return self.done == self.schedule.steps

    def save(self, path: str | Path) -> None:
        """Writes the sampler's state and the request as safetensors; `load` goes on from there bit for bit.

        Raises UserError when the file cannot be written; an older file is kept then.
        """
        from safetensors.numpy import save

        path = Path(path)
        if path.is_dir() or not path.name:
            raise UserError(f"cannot write {path}: it is a folder; give a file name inside it")
        partial = temporary_beside(path)
        settings = json.dumps(dataclasses.asdict(self.settings))
        metadata = {"settings": settings, "done": str(self.done), "bundle": self.bundle_key}
        try:
            partial.write_bytes(save({"state": np.stack(self.state)}, metadata))
            os.replace(partial, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose a writable folder") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, pipeline: Pipeline) -> Generation:
        """Goes on from a saved generation. Raises UserError when the file is damaged or of another bundle."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                metadata, state = file.metadata() or {}, file.get_tensor("state")
            if metadata["bundle"] != pipeline.bundle.key:
                raise UserError(
                    f"it was saved with another bundle than {pipeline.bundle.folder}; open the one it came from"
                )
            settings = read(Settings, json.loads(metadata["settings"]), "settings")
            generation = pipeline.prepare(Request(**vars(settings)))
            done = int(metadata["done"])
            shape = (len(generation.state), *generation.state[0].shape)
            if state.shape != shape or state.dtype != np.float32 or not 0 <= done <= generation.schedule.steps:
                raise UserError("its state does not fit its request; generate again")
        except FileNotFoundError as error:
            raise UserError(f"there is no saved generation {path}") from error
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"cannot resume {path}: {error}") from error
        for buffer, saved in zip(generation.state, state, strict=True):
            np.copyto(buffer, saved)
        generation.arrays["tokens"][:, :, : state.shape[2]] = state[0]
        generation.done = done
        return generation


class Pipeline:
    """A loaded model. Engines are shared by all generations; a Generation belongs to one thread at a time."""

    def __init__(self, bundle: Bundle, engines: dict[str, Engine]):
        self.bundle, self.spec, self.engines = bundle, bundle.spec, engines
        self.tokenizer = PromptTokenizer.from_file(bundle.path(TOKENIZER), self.spec.text_encoder.length)

    @classmethod
    def open(cls, bundle: str | Path | Bundle, threads: int | None = None) -> Pipeline:
        """Verifies a bundle and loads its engines on the CPU.

        `threads` limits the threads of each engine, and of the extension in the whole process; None: all cores. Raises
        UserError when the bundle is damaged or not for the CPU, or an engine cannot be loaded.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if "cpu" not in opened.manifest.targets:
            targets = ", ".join(opened.manifest.targets) or "nothing"
            raise UserError(f"{opened.folder} runs on {targets}, this version of tubelet runs cpu; export it again")
        engines: dict[str, Engine] = {n: OnnxRuntimeEngine(opened.graph(n), threads) for n in TO_GENERATE}
        kernels.set_threads(threads)
        return cls(opened, engines)

    def check(self, request: Request) -> tuple[Settings, Geometry, Schedule]:
        """What a request means for this model. Raises UserError, in no time, when it cannot be served."""
        settings = request.complete(self.spec)
        geometry = plan(self.spec, settings.width, settings.height, settings.frames)
        schedule = make_schedule(settings.sampler, settings.steps, settings.shift)
        self.tokenizer(self._prompts(settings))
        return settings, geometry, schedule

    def generate(
        self,
        request: Request,
        on_step: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> Frames:
        """The whole clip, uint8 [T,H,W,3].

        `on_step(done, steps)` is called after every step; `cancel()` is asked before every step and, when true, ends
        the generation with Cancelled. Raises UserError for a request that the model cannot serve.
        """
        generation = self.prepare(request)
        while not generation.finished:
            if cancel is not None and cancel():
                raise Cancelled(f"cancelled after {generation.done} of {generation.schedule.steps} steps")
            self.step(generation)
            if on_step is not None:
                on_step(generation.done, generation.schedule.steps)
        return np.concatenate(list(self.decode(generation)))

    def prepare(self, request: Request) -> Generation:
        """Checks a request, encodes its text and allocates all that its steps need. Raises UserError as `check`."""
        settings, geometry, schedule = self.check(request)
        denoiser = self.spec.denoiser
        cross_k, cross_v = self._condition(settings)
        batch = cross_k.shape[1]
        rope_cos, rope_sin = kernels.rope3d(geometry.grid, denoiser.head_size, theta=denoiser.theta)
        shape = (geometry.tokens, denoiser.token_values)
        state = [_zeros(shape) for _ in range(schedule.buffers)]
        kernels.pack(starting_noise(geometry, denoiser.latent_channels, settings.seed), denoiser.patch, out=state[0])
        inputs = {
            "tokens": _zeros((batch, geometry.tokens, denoiser.token_inputs)),
            "time_features": _zeros((batch, 2, denoiser.time_features)),
            "rope_cos": rope_cos,
            "rope_sin": rope_sin,
            "cross_k": cross_k,
            "cross_v": cross_v,
        }
        if denoiser.two_levels:
            inputs["known"] = _zeros((batch, geometry.tokens))
        inputs["tokens"][:, :, : shape[1]] = state[0]
        if denoiser.coordinates:
            inputs["tokens"][:, :, shape[1] :] = coordinate_columns(geometry.grid)
        velocity = {"velocity": _zeros((batch, *shape))}
        levels = np.stack([schedule.timesteps, np.zeros(schedule.steps)], axis=1)  # [steps,2]: unknown, known
        return Generation(
            settings=settings,
            geometry=geometry,
            schedule=schedule,
            matrices=schedule.matrices.astype(np.float32),
            time_table=time_features(levels, denoiser.time_features),
            state=state,
            arrays=inputs | velocity,
            binding=self.engines["denoiser"].bind(inputs, velocity),
            bundle_key=self.bundle.key,
        )

    def step(self, generation: Generation) -> None:
        """One denoising step: the engine, then guidance and the sampler's update in one pass.

        Raises UserError when all steps are done.
        """
        if generation.finished:
            raise UserError(f"all {generation.done} steps are done; decode the generation")
        arrays = generation.arrays
        np.copyto(arrays["time_features"], generation.time_table[generation.done])
        generation.binding.run()
        kernels.guided_step(
            generation.state,
            arrays["velocity"],
            arrays["tokens"],
            generation.matrices[generation.done],
            guidance=generation.settings.guidance,
        )
        generation.done += 1

    def decode(self, generation: Generation) -> Iterator[Frames]:
        """Yields the clip's frames in order, uint8 [T,H,W,3], a few at a time.

        Beyond the latent, memory does not grow with duration. Before the last step the frames are a noisy preview.
        """
        grid, patch = generation.geometry.grid, self.spec.denoiser.patch
        latent = kernels.unpack(generation.state[0], self.spec.denoiser.latent_channels, grid, patch)
        return self.decode_latent(latent)

    def decode_latent(self, latent: Float32) -> Iterator[Frames]:
        """Yields the frames of a normalised latent [C,T',H',W'], a few at a time."""
        results = self.engines["vae_decoder_first"]({"latents": latent[None, :, :1]})
        yield _to_frames(results.pop("pixels"))
        for start in range(1, latent.shape[1], DECODE_CHUNK):
            caches = {name.removeprefix("next_"): cache for name, cache in results.items()}
            chunk = latent[None, :, start : start + DECODE_CHUNK]
            results = self.engines["vae_decoder"]({"latents": chunk, **caches})
            yield _to_frames(results.pop("pixels"))

    def _condition(self, settings: Settings) -> tuple[Float32, Float32]:
        """Every block's text keys and values [blocks,B,heads,L,D]: the prompt, then the negative prompt if guided."""
        ids, mask = self.tokenizer(self._prompts(settings))
        embeddings = self.engines["text_encoder"]({"ids": ids, "mask": mask})["embeddings"]
        results = self.engines["conditioner"]({"embeddings": embeddings})
        return results["cross_k"], results["cross_v"]

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


def _to_frames(pixels: Float32) -> Frames:
    """Float [1,3,T,H,W] in [-1,1] -> uint8 [T,H,W,3]."""
    scaled = np.clip((pixels[0] + 1) * 127.5, 0, 255)
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8).transpose(1, 2, 3, 0))
