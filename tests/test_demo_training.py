"""What the embedded model's training promises: it resumes exactly, and its batches are what the recipe says.

pytest tests/test_demo_training.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tubelet.export.demo.recipe import model_spec
from tubelet.export.demo.train_denoiser import POOL, WIDE, WIDE_FROM, Batch, Batches, draw_known, flow_loss, pack
from tubelet.export.demo.training import Checkpoint, Muon, Optimizers, averaged, trapezoid
from tubelet.runtime import kernels
from tubelet.runtime.schedule import time_features

UNKNOWN_WORD = 2
SPEC = model_spec([0.1] * 8, [2.0] * 8)


def run(folder: Path, steps: int) -> nn.Module:
    """A small training in the way of the real ones, up to `steps` of 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    average, optimizers = averaged(model, 0.9), Optimizers(model, 1e-2, 1e-2)
    checkpoint = Checkpoint(folder / "t.pt", {"model": model, "average": average, "optimizers": optimizers}, every=2)
    for step in checkpoint.steps(steps, {}):
        torch.manual_seed(step)
        loss = model(torch.randn(4, 5)).square().mean()
        model.zero_grad()
        loss.backward()
        optimizers.step(trapezoid(step, 4, flat=0.5))
        average.update_parameters(model)
        checkpoint.log(loss=loss.item())
    return average.module


def test_a_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(tmp_path / "a", 4)
    run(tmp_path / "b", 2)
    resumed = run(tmp_path / "b", 4)

    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    lines = [json.loads(line) for line in (tmp_path / "b" / "t.log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]


def test_muon_moves_by_an_orthogonal_matrix() -> None:
    """All singular values of an update of rate 1 are near 0.2 sqrt(12), as five Newton-Schulz steps bring them."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(12, 5))
    weight.grad = torch.randn(12, 5)
    Muon([weight], lr=1.0).step()
    values = torch.linalg.svdvals(weight.detach()) / (0.2 * 12**0.5)
    assert values.min() > 0.6 and values.max() < 1.3


@given(st.tuples(*(st.integers(1, 6) for _ in range(3))), st.integers(0, 1000))
@settings(deadline=None)
def test_some_tokens_are_always_unknown(grid: tuple[int, int, int], seed: int) -> None:
    known = draw_known(grid, np.random.default_rng(seed))
    assert known.shape == grid and set(np.unique(known)) <= {0.0, 1.0} and not known.all()


def test_every_pattern_of_known_tokens_occurs() -> None:
    drawn = [draw_known((5, 3, 4), np.random.default_rng(seed)) for seed in range(400)]
    frames = [known.all(axis=(1, 2)) for known in drawn]
    assert 0.6 < np.mean([not known.any() for known in drawn]) < 0.8
    assert any(f[0] and not f[1:].any() for f in frames) and any(f[-1] and not f[:-1].any() for f in frames)
    assert any(f[0] and f[-1] and not f.all() for f in frames)
    assert any(known.any() and not f.any() for known, f in zip(drawn, frames, strict=True))  # a box in space


@given(st.data())
@settings(deadline=None)
def test_packing_is_the_runtimes(data: st.DataObject) -> None:
    b, c, t, h, w, p = (data.draw(st.integers(1, 3)) for _ in range(6))
    latents = torch.randn(b, c, t, h * p, w * p)
    tokens = pack(latents, (1, p, p))
    for one, latent in zip(tokens, latents, strict=True):
        np.testing.assert_array_equal(one.numpy(), kernels.pack(latent.numpy(), (1, p, p)))


def test_known_tokens_are_seen_clean_and_cost_nothing() -> None:
    torch.manual_seed(0)
    clean, known = torch.randn(2, 6, 4), torch.tensor([[1.0, 0, 0, 1, 0, 0], [0] * 6])
    table = torch.zeros(6, 3)
    batch = Batch(clean, known, torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(6, 17), (table, table))
    sigma, noise, seen = torch.tensor([0.25, 0.75]), torch.randn(2, 6, 4), {}

    def model(batch: Batch, noisy: Tensor, features: Tensor) -> Tensor:
        seen.update(noisy=noisy, features=features)
        return torch.where(batch.known[..., None] > 0, 1e6, noise - clean + sigma[:, None, None])

    loss = flow_loss(model, batch, sigma, noise, 8)  # type: ignore[arg-type]

    torch.testing.assert_close(loss, sigma**2)
    torch.testing.assert_close(seen["noisy"][0, [0, 3]], clean[0, [0, 3]])
    torch.testing.assert_close(seen["noisy"][1], 0.25 * clean[1] + 0.75 * noise[1])
    np.testing.assert_array_equal(seen["features"], time_features(np.array([[250.0, 0], [750, 0]]), 8))


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """Batches from a pool with the recipe's sizes, two clips each."""
    folder = tmp_path_factory.mktemp("pool")
    pool = [
        {"latents": torch.randn(2, 8, 1 + (f - 1) // 4, h // 8, w // 8).half(), "scenes": [n, n + 1], "size": (w, h, f)}
        for n, (w, h, f, _) in enumerate(POOL + WIDE)
    ]
    torch.save(pool, folder / "latents.pt")
    return Batches(SPEC, folder)


def test_batches_keep_to_the_recipe(batches: Batches) -> None:
    drawn = [batches(step) for step in (*range(150), *range(WIDE_FROM, WIDE_FROM + 150))]

    def frames(batch: Batch) -> int:
        return len(batch.coordinates[:, 0].unique())

    lengths = [frames(batch) for batch in drawn]
    assert 11 not in lengths  # 41 frames are for the test alone
    assert 1 in lengths and max(lengths[:150]) == 13
    widths = [int(16 * batch.coordinates[0, 14]) for batch in drawn]  # in tokens
    assert max(widths[:150]) == 6 and max(widths[150:]) == 8
    assert all(batch.clean.shape[0] * batch.clean.shape[1] <= 2400 for batch in drawn)
    assert not any((batch.ids == UNKNOWN_WORD).any() for batch in drawn)
    empty = np.mean([float((batch.mask.sum(dim=1) == 1).float().mean()) for batch in drawn])
    assert 0.05 < empty < 0.15
    again = batches(7)
    torch.testing.assert_close(again.clean, drawn[7].clean, rtol=0, atol=0)
    torch.testing.assert_close(again.ids, drawn[7].ids)
