"""The denoising steps of one request: what they read and write, and who takes them.

Flows in: `Steps`, all that a request's steps need, in host memory. Flows out: the sampler's state, in place. Knows
nothing of prompts, canvases and files. `HostLoop` works on that memory; `device_loop.py` on a GPU's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import kernels
from .engines import Engine

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Pinned:
    """The known tokens of a canvas: set again after every step."""

    known: Float32  # [N]: 0 or 1
    clean: Float32  # [N,P]
    noise: Float32 | None  # [N,P]: set to their place on the way from noise; None: clean, for a model of two levels


@dataclass(frozen=True)
class Steps:
    """The steps of one denoiser; whoever takes them writes into `state` and `inputs`."""

    denoiser: str  # the component
    inputs: Mapping[str, Any]  # the denoiser's by name: arrays of the host, or what an engine left on its device
    state: Float32  # [S,N,P]: the sample x and the sampler's history
    matrices: Float32  # [steps,S,S+1]
    time_table: Float32  # [steps,2,F]: features of the level of unknown tokens, and of known ones
    sigmas: NDArray[np.float64]  # [steps+1]
    guidance: float
    pinned: Pinned | None

    def update(self, index: int) -> dict[str, Any]:
        """What `guided_step` is told after the denoiser's run of a step, beside its buffers and the known tokens."""
        told = {"matrix": self.matrices[index], "guidance": self.guidance}
        if self.pinned is None or self.pinned.noise is None:
            return told
        sigma = float(self.sigmas[index + 1])
        return {**told, "clean_scale": 1 - sigma, "noise_scale": sigma}

    @property
    def batch(self) -> int:
        return int(self.inputs["tokens"].shape[0])


class Loop(Protocol):
    @property
    def steps(self) -> Steps:
        """What it takes, as far as that is in host memory."""
        ...

    def step(self, index: int) -> None:
        """Takes a step, and returns when it is done."""
        ...

    def read(self) -> None:
        """Brings the sampler's state to the host's."""
        ...

    def write(self) -> None:
        """Goes on from the host's state instead."""
        ...


class HostLoop:
    """Steps on the host's arrays, bound once."""

    def __init__(self, engine: Engine, steps: Steps):
        self.steps, self._state = steps, list(steps.state)
        self._tokens, self._time = steps.inputs["tokens"], steps.inputs["time_features"]
        self._velocity = kernels.empty((steps.batch, *steps.state.shape[1:]), np.float32)
        self._pins = {} if steps.pinned is None else vars(steps.pinned)
        self._binding = engine.bind(steps.inputs, {"velocity": self._velocity})

    def step(self, index: int) -> None:
        np.copyto(self._time, self.steps.time_table[index])
        self._binding.run()
        update = self.steps.update(index)
        kernels.guided_step(self._state, self._velocity, self._tokens, **self._pins, **update)

    def read(self) -> None:
        """The state is the host's."""

    def write(self) -> None:
        values = self.steps.state.shape[2]
        self._tokens[:, :, :values] = self._state[0]
