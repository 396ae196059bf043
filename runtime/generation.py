"""A request on its way from noise to a clean sample; it can be saved and finished elsewhere.

Flows in: what `Pipeline.prepare` allocates. Flows out: a file, and the same generation read back. Knows nothing of how
a step is taken.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .atomic import temporary_beside
from .canvas import Canvas
from .errors import UserError
from .geometry import Geometry
from .loop import Loop, Steps
from .request import Request, Settings
from .schedule import Schedule
from .strict import read

if TYPE_CHECKING:
    from .pipeline import Pipeline

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Phase:
    """The steps that one denoiser takes, from `first` on until the next phase's."""

    first: int
    prepare: Callable[[], Steps]  # conditions the denoiser; all phases share the sampler's state


@dataclass
class Generation:
    """A request on its way: who takes its steps, with what they read and write, and how many are done.

    Everything is allocated by `Pipeline.prepare`, but for what another denoiser needs that takes over on the way, and
    reused by every step.
    """

    settings: Settings
    geometry: Geometry
    schedule: Schedule
    phases: Sequence[Phase]
    make_loop: Callable[[Steps], Loop]
    bundle_key: str
    canvas: Canvas | None
    done: int = 0

    def __post_init__(self) -> None:
        self._enter(self._phase)

    @property
    def finished(self) -> bool:
        return self.done == self.schedule.steps

    @property
    def state(self) -> Float32:
        """The sample x and the sampler's history, [S,N,P], as they are now."""
        self.loop.read()
        return self.loop.steps.state

    def step(self) -> None:
        """Takes the next step."""
        if self._phase is not self._entered:
            self.loop.read()
            self._enter(self._phase)
            self.loop.write()
        self.loop.step(self.done)
        self.done += 1

    @property
    def _phase(self) -> Phase:
        """Whose turn it is."""
        return next(phase for phase in reversed(self.phases) if phase.first <= self.done)

    def _enter(self, phase: Phase) -> None:
        self._entered, self.loop = phase, self.make_loop(phase.prepare())

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
        tensors = {"state": self.state, **(self.canvas.tensors() if self.canvas else {})}
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
            fits = state.shape == generation.loop.steps.state.shape and state.dtype == np.float32
            if not fits or not 0 <= done <= generation.schedule.steps:
                raise UserError("its state does not fit its request; generate again")
        except FileNotFoundError as error:
            raise UserError(f"there is no saved generation {path}") from error
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"cannot resume {path}: {error}") from error
        np.copyto(generation.loop.steps.state, state)
        generation.loop.write()
        generation.done = done
        return generation
