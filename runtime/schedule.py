"""Flow-matching samplers as tables of numbers: the noise levels, and one small matrix per step.

Flows in: a sampler's name, a number of steps and a shift. Flows out: a `Schedule`, all in float64.
Knows nothing of models, guidance, tensors' shapes or devices: `kernels.guided_step` applies the matrices.

Conventions: x_sigma = (1 - sigma) x0 + sigma noise; the model predicts the velocity v = noise - x0 at x_sigma, so
x0 = x_sigma - sigma v. Sampling goes from sigma near 1 (noise) to 0 (clean).

Noise levels and timesteps equal those of diffusers (0.42) bit for bit, float32 rounding included, because published
models were tuned with them. With s(u) = shift u / (1 + (shift - 1) u):

* `euler`, as FlowMatchEulerDiscreteScheduler: s(u) for `steps` values u from 1 down to s(0.001), both included: the
  smallest level is shifted twice. timestep = 1000 sigma.
* `unipc`, as UniPCMultistepScheduler with flow sigmas: s(u) for the first `steps` of `steps` + 1 values u from 1 down
  to 0.001, and 1 - 1e-6 in place of 1, where log-SNR is infinite. timestep = floor(1000 sigma).
* `stretched`, as FlowMatchEulerDiscreteScheduler with dynamic shift and a terminal, which LTX-Video has: s(u) for
  `steps` values u from 1 down to 1 / steps, moved away from 1 in proportion, the last to 0.1. timestep = 1000 sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError

Array = NDArray[np.float64]

LEVELS = 1000  # noise levels of training: timestep 1000 is sigma 1
TERMINAL = 0.1  # the last noise level of `stretched`


@dataclass(frozen=True)
class Schedule:
    """A whole sampling run as linear maps; every array is read-only float64.

    The state is S buffers shaped like the sample. Buffer 0 is the sample x that the model sees next: it starts as noise
    (sigma near 1) and ends clean, or the other way round. The others are the sampler's history and start as zeros.
    Step i is

        v = guided velocity at buffer 0 and timesteps[i];    state = matrices[i] @ [state[0], ..., state[S-1], v]

    where all of the right side is read before any of the left is written. A row that is exactly a row of the identity
    leaves its buffer as it is, so no kernel needs to write it.
    """

    sigmas: Array  # [steps + 1], the sample's noise level before each step and at the end
    timesteps: Array  # [steps], what the model is told
    matrices: Array  # [steps, S, S + 1]

    def __post_init__(self) -> None:
        for array in (self.sigmas, self.timesteps, self.matrices):
            array.setflags(write=False)

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def buffers(self) -> int:
        """S: the sample and its history."""
        return int(self.matrices.shape[1])


def make_schedule(sampler: str, steps: int, shift: float, strength: float = 1.0) -> Schedule:
    """Returns the schedule of `sampler`, a name in `SAMPLERS`, for `steps` model evaluations.

    `shift` moves noise levels towards 1 (Esser et al. 2024, arXiv:2403.03206, eq. 23); 1 spaces them evenly. Below
    `strength` 1 only the last round(steps * strength) evaluations are left, as SDEdit has it (Meng et al. 2022,
    arXiv:2108.01073): the sample starts at `sigmas[0]`, which is 0 when none is left.
    Raises UserError for an unknown sampler, steps outside 1..1000, a strength outside 0..1, or a shift that is not a
    finite positive number or so large or small that neighbouring noise levels coincide.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if type(steps) is not int or not 1 <= steps <= LEVELS:
        raise UserError(f"steps must be a whole number from 1 to {LEVELS}, is {steps!r}")
    if not 0 < shift < float("inf"):
        raise UserError(f"shift must be a finite number above 0, is {shift!r}")
    if not 0 <= strength <= 1:
        raise UserError(f"strength must be from 0 to 1, is {strength!r}")
    return SAMPLERS[sampler](steps, float(shift), steps - round(steps * strength))


def _euler(steps: int, shift: float, skipped: int) -> Schedule:
    highest, lowest = _shifted(np.array([1, 1 / LEVELS], np.float32), shift).astype(np.float64) * LEVELS
    return _straight(_sigmas(_shifted(np.linspace(highest, lowest, steps) / LEVELS, shift), shift)[skipped:])


def _stretched(steps: int, shift: float, skipped: int) -> Schedule:
    clean = 1 - shift / (shift + (1 / np.linspace(1, 1 / steps, steps).astype(np.float32) - 1))
    scale = clean[-1] / (1 - TERMINAL) if steps > 1 else 1  # a single level is 1 and stays there
    return _straight(_sigmas(1 - clean / scale, shift)[skipped:])


def _straight(sigmas: Array) -> Schedule:
    """Euler's steps, with one buffer: x + (sigma' - sigma) v."""
    matrices = np.stack([np.ones(len(sigmas) - 1), np.diff(sigmas)], axis=-1)[:, None]  # [steps, 1, 2]
    return Schedule(sigmas, (sigmas[:-1].astype(np.float32) * LEVELS).astype(np.float64), matrices)


def make_inversion(steps: int, shift: float, passes: int = 3) -> Schedule:
    """The way back: from a clean sample to the noise that `euler` with the same steps and shift makes it of.

    Euler's step x' = x + (sigma' - sigma) v(x, sigma) is undone by solving for x, as the fixed point of
    x = x' - (sigma' - sigma) v(x, sigma): `passes` evaluations a step, from x = x' on. Two buffers: x, and x'.
    Raises UserError as `make_schedule`.
    """
    forward = make_schedule("euler", steps, shift)
    rise = -np.diff(forward.sigmas)[::-1]
    first = np.stack([[[1, 0, h], [1, 0, 0]] for h in rise])  # x = x' + h v, and x' becomes the anchor
    again = np.stack([[[0, 1, h], [0, 1, 0]] for h in rise])
    matrices = np.stack([first, *[again] * (passes - 1)], axis=1).reshape(-1, 2, 3)
    sigmas = np.append(0, np.repeat(forward.sigmas[-2::-1], passes))
    return Schedule(sigmas, np.repeat(forward.timesteps[::-1], passes), matrices)


def _unipc(steps: int, shift: float, skipped: int) -> Schedule:
    """UniPC of order 2, B(h) = e^h - 1, predicting x0, corrector included (Zhao et al. 2023, arXiv:2302.04867).

    Four buffers: x, the corrected sample of the step before, the x0-predictions of even steps and those of odd steps.
    A step replaces the older prediction, so the newer one's row is the identity. The corrector of sigma_i and the
    predictor of sigma_{i+1} see the same v, so one matrix does both. The first and the last step are of order 1, and
    what the last step would keep has no reader, so its history rows are the identity too.
    """
    levels = _shifted(np.linspace(1, 1 / LEVELS, steps + 1)[:-1], shift)
    levels[0] = 1 - 1e-6  # at 1 the log-SNR is infinite
    sigmas, levels, steps = _sigmas(levels, shift)[skipped:], levels[skipped:], steps - skipped
    with np.errstate(divide="ignore"):  # the last log-SNR is +inf: the step to it returns x0
        h = np.diff(np.log(1 - sigmas) - np.log(sigmas))
    keep, gain = sigmas[1:] / sigmas[:-1], (sigmas[1:] - 1) * np.expm1(-h)  # exact where x0 is constant over the step

    identity = np.eye(5)  # in the loop, every quantity is its coefficients over x, corrected, even, odd, v
    x, corrected, _, _, v = identity
    matrices = np.tile(identity[:4], (steps, 1, 1))
    for i in range(steps):
        older, newer = identity[2 + i % 2], identity[3 - i % 2]
        x0 = x - sigmas[i] * v
        sample = x
        if i > 0:
            weights = np.array([0, 0.5, 0.5]) if i == 1 else _corrector(h[i - 2], h[i - 1])
            sample = keep[i - 1] * corrected + gain[i - 1] * weights @ [older, newer, x0]
        last = i == steps - 1
        weights = np.array([0, 1]) if i == 0 or last else _predictor(h[i - 1], h[i])
        matrices[i, 0] = keep[i] * sample + gain[i] * weights @ [newer, x0]
        if not last:
            matrices[i, 1], matrices[i, 2 + i % 2] = sample, x0
    return Schedule(sigmas, np.floor(levels * LEVELS), matrices)


def _predictor(before: float, h: float) -> Array:
    """UniP-2's weights of the x0-predictions at the start of the previous step and of this one.

    `before` and `h` are the widths of those two steps in log-SNR.
    """
    weight = -0.5 * h / before
    return np.array([weight, 1 - weight])


def _corrector(before: float, h: float) -> Array:
    """UniC-2's weights of the x0-predictions at the previous step's start, this one's start and this one's end."""
    phi_1 = np.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    ratio = -before / h
    order = np.array([[1, 1], [ratio, 1]])
    first, second = np.linalg.solve(order, np.array([phi_2, 2 * phi_3]) / phi_1)
    return np.array([first / ratio, 1 - first / ratio - second, second])


def _shifted(levels: NDArray[Any], shift: float) -> NDArray[Any]:
    """s(u) in the precision of `levels`; the order of operations is diffusers', so that roundings agree."""
    return shift * levels / (1 + (shift - 1) * levels)


def _sigmas(levels: NDArray[Any], shift: float) -> Array:
    """Appends 0 to levels [steps], rounded to float32 as diffusers does: it moves the first log-SNR by 0.013."""
    sigmas = np.append(levels, 0).astype(np.float32).astype(np.float64)
    if not (np.diff(sigmas) < 0).all():
        raise UserError(f"shift {shift:g} makes noise levels of {len(levels)} steps coincide; bring it nearer to 1")
    return sigmas


SAMPLERS: Mapping[str, Callable[[int, float, int], Schedule]] = MappingProxyType(
    {"euler": _euler, "unipc": _unipc, "stretched": _stretched}
)


def time_features(timesteps: NDArray[Any], features: int) -> NDArray[np.float32]:
    """Sinusoidal features of timesteps, [...] -> float32 [..., features]: cosines, then sines.

    Frequencies fall from 1 to almost 1/10000 (Ho et al. 2020). Computed here in float64, because low precision inside
    a graph ruins them.
    """
    half = features // 2
    angles = np.asarray(timesteps, np.float64)[..., None] * 10000.0 ** (-np.arange(half) / half)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
