"""A request on its way from noise to a clean sample; it can be saved and finished elsewhere.

Flows in: what `Pipeline.prepare` allocates. Flows out: a file, and the same generation read back. Knows nothing of how
a step is taken.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .atomic import temporary_beside
from .canvas import Canvas
from .engines import Binding
from .errors import UserError
from .geometry import Geometry
from .request import Request, Settings
from .schedule import Schedule
from .strict import read

if TYPE_CHECKING:
    from .pipeline import Pipeline

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Pinned:
    """The known tokens of a canvas: set again after every step."""

    known: Float32  # [N]: 0 or 1
    clean: Float32  # [N,P]
    noise: Float32 | None  # [N,P]: set to their place on the way from noise; None: clean, for a model of two levels


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
    canvas: Canvas | None
    pinned: Pinned | None  # the canvas's known tokens
    done: int = 0

    @property
    def finished(self) -> bool:
        return self.done == self.schedule.steps

    def pins(self) -> dict[str, Any]:
        """What `guided_step` is told of the known tokens that the sample has now."""
        if self.pinned is None:
            return {}
        sigma = float(self.schedule.sigmas[self.done])
        clean_scale, noise_scale = (1.0, 0.0) if self.pinned.noise is None else (1 - sigma, sigma)
        return {**vars(self.pinned), "clean_scale": clean_scale, "noise_scale": noise_scale}

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
        tensors = {"state": np.stack(self.state), **(self.canvas.tensors() if self.canvas else {})}
        try:
            partial.write_bytes(save(tensors, metadata))
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
                names = set(file.keys()) - {"state"}
                canvas = Canvas(**{name: file.get_tensor(name) for name in names}) if names else None
            if metadata["bundle"] != pipeline.bundle.key:
                raise UserError(
                    f"it was saved with another bundle than {pipeline.bundle.folder}; open the one it came from"
                )
            settings = read(Settings, json.loads(metadata["settings"]), "settings")
            generation = pipeline.prepare(Request(**vars(settings)), canvas)
            done = int(metadata["done"])
            shape = (len(generation.state), *generation.state[0].shape)
            if state.shape != shape or state.dtype != np.float32 or not 0 <= done <= generation.schedule.steps:
                raise UserError("its state does not fit its request; generate again")
        except FileNotFoundError as error:
            raise UserError(f"there is no saved generation {path}") from error
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"cannot resume {path}: {error}") from error
        for buffer, saved in zip(generation.state, state, strict=True):
            np.copyto(buffer, saved)
        generation.arrays["tokens"][:, :, : state.shape[2]] = state[0]
        generation.done = done
        return generation
