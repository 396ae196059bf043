"""Proves that our samplers are diffusers' schedulers as matrices, and that they solve the flow ODE they claim to.

Run: pytest tests/test_schedule.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tubelet.runtime.errors import UserError
from tubelet.runtime.kernels import guided_step
from tubelet.runtime.schedule import SAMPLERS, Schedule, make_inversion, make_schedule

Model = Callable[[np.ndarray, float], np.ndarray]

steps_and_shifts = given(steps=st.integers(1, 50), shift=st.sampled_from([1.0, 3.0, 5.0, 8.0]))
samplers = pytest.mark.parametrize("sampler", sorted(SAMPLERS))


def sample(schedule: Schedule, model: Model, noise: np.ndarray) -> list[np.ndarray]:
    """Every x of the trajectory: noise first, the clean sample last. `model` maps (x, timestep) to velocity."""
    state = np.zeros((schedule.buffers, *noise.shape))
    state[0] = noise
    trajectory = [noise]
    for timestep, matrix in zip(schedule.timesteps, schedule.matrices, strict=True):
        state = np.einsum("st,t...->s...", matrix, np.stack([*state, model(state[0], timestep)]))
        trajectory.append(state[0])
    return trajectory


def sample_by_kernel(schedule: Schedule, model: Model, noise: np.ndarray) -> list[np.ndarray]:
    """The same as the runtime's loop takes it, of noise [N,P]: in float32, by the fused kernel."""
    state = [noise.astype(np.float32), *np.zeros((schedule.buffers - 1, *noise.shape), np.float32)]
    tokens = np.empty((1, *noise.shape), np.float32)
    trajectory = [state[0].copy()]
    for timestep, matrix in zip(schedule.timesteps, schedule.matrices, strict=True):
        guided_step(state, model(state[0], timestep).astype(np.float32)[None], tokens, matrix)
        trajectory.append(state[0].copy())
    return trajectory


def mlp(x: np.ndarray, timestep: float) -> np.ndarray:
    """A fixed random network: nonlinear in x, smooth in time. [..., 16] -> [..., 16]"""
    rng = np.random.default_rng(0)
    inner, outer, clock = rng.normal(size=(16, 32)) / 4, rng.normal(size=(32, 16)) / 4, rng.normal(size=32)
    return x + np.tanh(x @ inner + clock * timestep / 1000) @ outer


def gaussian(x: np.ndarray, timestep: float) -> np.ndarray:
    """The exact velocity where the data are normal with deviation 0.5: smooth, with x0 far from constant."""
    sigma, variance = timestep / 1000, 0.25
    total = (1 - sigma) ** 2 * variance + sigma**2
    return x * (sigma - (1 - sigma) * variance) / total


def diffusers_scheduler(sampler: str, steps: int, shift: float) -> Any:
    diffusers = pytest.importorskip("diffusers")
    scheduler = {
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
        ),
        "stretched": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
    }[sampler]()
    levels = {"stretched": {"sigmas": np.linspace(1, 1 / steps, steps), "mu": np.log(shift)}}
    scheduler.set_timesteps(steps, **levels.get(sampler, {}))
    return scheduler


@samplers
@given(steps=st.integers(1, 100), shift=st.floats(0.1, 20))
@settings(deadline=None)
def test_levels_are_those_of_diffusers_bit_for_bit(sampler: str, steps: int, shift: float) -> None:
    assume(steps > 1 or sampler != "stretched")  # of a single level diffusers divides 0 by 0
    scheduler = diffusers_scheduler(sampler, steps, shift)

    schedule = make_schedule(sampler, steps, shift)

    np.testing.assert_array_equal(schedule.sigmas, scheduler.sigmas.double().numpy())
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.double().numpy())


@samplers
@pytest.mark.parametrize("precision", [np.float64, np.float32])
@given(run=st.integers(1, 50).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), shift=st.floats(0.5, 12))
@settings(max_examples=30, deadline=None)
def test_every_step_of_a_trajectory_equals_diffusers(
    sampler: str, precision: type, run: tuple[int, int], shift: float
) -> None:
    """Of `run`, (steps, the last so many that are taken): a clip that is edited starts in the middle of the levels.

    Float64 proves the formulas; in float32, which pipelines compute in, 1e-5 is some 100 roundings in up to 50 steps.
    """
    steps, left = run
    assume(steps > 1 or sampler != "stretched")
    torch = pytest.importorskip("torch")
    scheduler = diffusers_scheduler(sampler, steps, shift)
    if precision is np.float64:
        scheduler.sigmas = scheduler.sigmas.double()  # its UniPC then computes in float64; its Euler stays in float32
    tolerance = 1e-12 if (sampler, precision) == ("unipc", np.float64) else 1e-5
    clean, noise = np.random.default_rng(steps).normal(size=(2, 2, 16)).astype(precision)
    scheduler.set_begin_index(steps - left)  # without, it looks for the first timestep; rounded ones may be equal
    timesteps = scheduler.timesteps[steps - left :]
    start = torch.from_numpy(clean), torch.from_numpy(noise)

    schedule = make_schedule(sampler, steps, shift, left / steps)
    sigma = schedule.sigmas[0]
    ours = (sample if precision is np.float64 else sample_by_kernel)(schedule, mlp, (1 - sigma) * clean + sigma * noise)

    if sampler == "unipc":
        theirs = [scheduler.add_noise(*start, timesteps[:1])]
    else:
        theirs = [scheduler.scale_noise(start[0], timesteps[:1], start[1])]
    for timestep in timesteps:
        velocity = torch.from_numpy(mlp(theirs[-1].numpy(), float(timestep)).astype(precision))
        theirs.append(scheduler.step(velocity, timestep, theirs[-1]).prev_sample)
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        error = np.linalg.norm(our - their.numpy()) / np.linalg.norm(their)
        assert error < tolerance, f"step {step}: relative error {error:.2e}"


@samplers
@given(steps=st.integers(1, 100), shift=st.floats(0.1, 20))
@settings(deadline=None)
def test_levels_fall_from_noise_to_exactly_zero(sampler: str, steps: int, shift: float) -> None:
    schedule = make_schedule(sampler, steps, shift)

    assert (np.diff(schedule.sigmas) < 0).all()
    assert schedule.sigmas[0] == pytest.approx(1, abs=1e-5) and schedule.sigmas[-1] == 0
    assert np.isfinite(schedule.matrices).all()
    assert schedule.matrices.shape == (steps, schedule.buffers, schedule.buffers + 1)


@samplers
@steps_and_shifts
@settings(deadline=None)
def test_a_straight_path_is_followed_exactly(sampler: str, steps: int, shift: float) -> None:
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 8))
    schedule = make_schedule(sampler, steps, shift)
    points = [(1 - sigma) * clean + sigma * noise for sigma in schedule.sigmas]

    trajectory = sample(schedule, lambda x, timestep: noise - clean, points[0])

    np.testing.assert_allclose(trajectory, points, rtol=0, atol=1e-11)


def test_unipc_converges_at_a_higher_order_than_euler() -> None:
    def order(sampler: str) -> float:
        """The slope of log error over log steps, from 16 to 64 steps, away from the ends of the path."""
        return float(np.log2(error(sampler, 16) / error(sampler, 64)) / 2)

    def error(sampler: str, steps: int) -> float:
        schedule = make_schedule(sampler, steps, 1.0)
        exact_timesteps = Schedule(schedule.sigmas, schedule.sigmas[:-1] * 1000, schedule.matrices)
        end = sample(exact_timesteps, gaussian, np.ones(1))[-1]
        return float(np.abs(end - 0.5).item())  # the flow maps noise of deviation 1 to data of deviation 0.5

    assert order("euler") == pytest.approx(1, abs=0.3)
    assert order("unipc") > 1.6
    assert error("unipc", 16) < error("euler", 64)


@steps_and_shifts
@settings(deadline=None)
def test_unipc_leaves_the_newer_prediction_in_place_and_keeps_no_history_at_the_end(steps: int, shift: float) -> None:
    schedule = make_schedule("unipc", steps, shift)
    identity = np.eye(schedule.buffers, schedule.buffers + 1)

    for step, matrix in enumerate(schedule.matrices):
        untouched = {3 - step % 2} if step < steps - 1 else {1, 2, 3}
        rows = {row for row in range(schedule.buffers) if (matrix[row] == identity[row]).all()}
        assert rows == untouched


@samplers
@given(steps=st.integers(1, 60), shift=st.floats(0.1, 20), strength=st.floats(0, 1))
@settings(deadline=None)
def test_below_strength_1_the_last_levels_are_left(sampler: str, steps: int, shift: float, strength: float) -> None:
    whole, part = make_schedule(sampler, steps, shift), make_schedule(sampler, steps, shift, strength)
    left = round(steps * strength)

    assert part.steps == left
    np.testing.assert_array_equal(part.sigmas, whole.sigmas[steps - left :])
    np.testing.assert_array_equal(part.timesteps, whole.timesteps[steps - left :])
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 8))
    points = [(1 - sigma) * clean + sigma * noise for sigma in part.sigmas]
    np.testing.assert_allclose(sample(part, lambda x, t: noise - clean, points[0]), points, rtol=0, atol=1e-11)


@given(steps=st.integers(12, 60), shift=st.floats(1, 6))
@settings(deadline=None)
def test_inversion_finds_the_noise_that_euler_makes_the_sample_of(steps: int, shift: float) -> None:
    noise = np.random.default_rng(0).normal(size=16)
    clean = sample(make_schedule("euler", steps, shift), mlp, noise)[-1]

    def error(passes: int) -> float:
        way_back = make_inversion(steps, shift, passes)
        assert way_back.steps == passes * steps and way_back.sigmas[0] == 0
        found = sample(way_back, mlp, clean)[-1]
        again = sample(make_schedule("euler", steps, shift), mlp, found)[-1]
        return float(np.abs(again - clean).max())

    assert error(3) < 0.3 * error(1) and error(12) < 1e-3


@samplers
def test_a_schedule_cannot_be_changed(sampler: str) -> None:
    schedule = make_schedule(sampler, 4, 3.0)

    with pytest.raises(ValueError, match="read-only"):
        schedule.matrices[0] = 0


@pytest.mark.parametrize(
    ("sampler", "steps", "shift", "message"),
    [
        ("ddim", 20, 3.0, "'ddim'.*euler, unipc, stretched"),
        ("euler", 0, 3.0, "steps .* is 0"),
        ("euler", 2.0, 3.0, "steps .* is 2.0"),
        ("euler", True, 3.0, "steps .* is True"),
        ("euler", 1001, 3.0, "from 1 to 1000, is 1001"),
        ("unipc", 20, 0.0, "shift .* is 0.0"),
        ("unipc", 20, float("nan"), "shift .* is nan"),
        ("unipc", 20, 1e7, "shift 1e[+]07 .*nearer to 1"),
    ],
)
def test_a_bad_request_is_refused_with_its_value(sampler: str, steps: Any, shift: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_schedule(sampler, steps, shift)
