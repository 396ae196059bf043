"""What the embedded model's training promises: it resumes exactly, and its batches are what the recipe says.

pytest tests/test_demo_training.py
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tubelet.export.causal import ChannelNorm
from tubelet.export.demo import train_captioner, train_denoiser, train_vae
from tubelet.export.demo.recipe import END, PAD, model_spec, tokenizer
from tubelet.export.demo.score import track
from tubelet.export.demo.train_denoiser import (
    CLIPS,
    DESCENTS,
    PATTERN_ODDS,
    POOLS,
    WIDE_FROM,
    Batch,
    Batches,
    draw_clip,
    draw_known,
    draw_sigmas,
    flow_loss,
    noise_shift,
    pack,
)
from tubelet.export.demo.training import Checkpoint, Muon, Optimizers, averaged, mixed, trapezoid
from tubelet.export.demo.world import SCENES, Scene, vocabulary
from tubelet.export.vae import Vae
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


@pytest.mark.parametrize("of", [train_vae, train_denoiser])
def test_no_descent_of_the_learning_rate_is_higher_than_the_one_before(of: Any) -> None:
    steps = of.STEPS
    rates = [of.rate(step) for step in range(steps)]
    starts = [0, *(i for i in range(2, steps) if rates[i - 2] > rates[i - 1] and rates[i] > rates[i - 1])]
    peaks = [max(rates[a:b]) for a, b in itertools.pairwise([*starts, steps])]
    assert len(peaks) >= 2 and all(a >= b for a, b in itertools.pairwise(peaks)) and 0 < rates[-1] < 0.01


def test_sharpening_sees_clips_with_and_without_history() -> None:
    drawn = [train_vae.sharpening_batch(step) for step in range(60)]
    assert {history % 4 for _, history in drawn} == {0, 1} and any(history == 0 for _, history in drawn)
    assert {pixels.shape[2] - history for pixels, history in drawn} <= {1, 5, 8, 9, 17}
    assert 0.4 < np.mean([len(pixels) == 1 for pixels, _ in drawn]) < 0.7  # of wide and fast clips one at a time
    assert 0.05 < np.mean([len(pixels) == 6 for pixels, _ in drawn]) < 0.3  # of pictures six


def test_refining_sees_a_whole_motion_in_few_frames() -> None:
    drawn = [train_vae.refining_batch(step) for step in range(40)]
    assert {(pixels.shape[2], history) for pixels, history in drawn} <= {(9, 0), (9, 1), (13, 5)}
    assert any(history == 5 for _, history in drawn) and all(len(pixels) == 2 for pixels, _ in drawn)


def test_ghosts_are_errors_away_from_the_object() -> None:
    pixels = torch.full((1, 3, 2, 16, 20), 0.5)
    pixels[:, :, :, 6:9, 6:9] = -1.0
    for (y, x), counts in {(7, 7): False, (3, 7): False, (2, 7): True, (7, 12): True, (15, 19): True}.items():
        error = torch.zeros_like(pixels)
        error[:, :, 1, y, x] = 2.0
        assert train_vae.ghosts(pixels, error.square()).item() == pytest.approx(4 / (2 * 16 * 20) if counts else 0)


def test_rescaling_keeps_the_function_and_bounds_what_norms_read() -> None:
    torch.manual_seed(0)
    vae = Vae(dataclasses.replace(SPEC.vae, widths=(8, 16, 16), decoder_blocks=1))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(3.0 if parameter.ndim > 4 else 1.0)
        for half in (vae.encoder, vae.decoder):
            half.conv_in.weight.mul_(1e4)
    clip = np.random.default_rng(1).integers(0, 256, (9, 16, 16, 3), np.uint8)
    before = [train_vae.whole(vae.encoder, train_vae.to_pixels(clip[None])), train_vae.reconstruct(vae, clip)]

    train_vae.rescale(vae, [clip], most=64.0)

    seen: list[float] = []
    norms = [module for module in vae.modules() if isinstance(module, ChannelNorm)]
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().max().item()))
    after = [train_vae.whole(vae.encoder, train_vae.to_pixels(clip[None])), train_vae.reconstruct(vae, clip)]
    assert len(seen) > 2 * len(norms) and max(seen) <= 64.0
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-4)  # norms add 1e-12 to a mean of squares
    assert np.abs(after[1].astype(int) - before[1]).max() <= 1


@given(st.tuples(*(st.integers(1, 6) for _ in range(3))), st.integers(0, 1000), st.sampled_from(PATTERN_ODDS))
@settings(deadline=None)
def test_some_tokens_are_always_unknown(grid: tuple[int, int, int], seed: int, odds: tuple[float, ...]) -> None:
    known = draw_known(grid, np.random.default_rng(seed), odds)
    assert known.shape == grid and set(np.unique(known)) <= {0.0, 1.0} and not known.all()


def test_every_pattern_of_known_tokens_occurs() -> None:
    drawn = [draw_known((5, 3, 4), np.random.default_rng(seed), PATTERN_ODDS[1]) for seed in range(400)]
    frames = [known.all(axis=(1, 2)) for known in drawn]
    assert 0.5 < np.mean([not known.any() for known in drawn]) < 0.7
    assert any(f[0] and not f[1:].any() for f in frames) and any(f[-1] and not f[:-1].any() for f in frames)
    assert any(f[0] and f[-1] and not f.all() for f in frames)
    assert any(f[1:-1].sum() == 1 and not f[0] and not f[-1] for f in frames)
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool with the recipe's sizes, two clips each."""
    folder = tmp_path_factory.mktemp("pool")
    pool = [
        {"kind": kind, "latents": torch.randn(2, 8, 1 + (f - 1) // 4, h // 8, w // 8).half(), "scenes": [n, n + 1]}
        for n, (kind, w, h, f, _) in enumerate(CLIPS)
    ]
    torch.save(pool, folder / "latents.pt")
    return folder


@pytest.fixture(scope="module")
def batches(folder: Path) -> Batches:
    return Batches(SPEC, folder)


def test_batches_keep_to_the_recipe(batches: Batches) -> None:
    starts = (0, WIDE_FROM, *itertools.accumulate(DESCENTS[:-1]))
    drawn = [batches(step) for start in starts for step in range(start, start + 150)]

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
    first, last = ([float((batch.known[:, i] > 0).float().mean()) for batch in drawn] for i in (0, -1))
    assert max(first[:300]) < 1 and sum(share == 1 for share in first[300:]) > 5  # clips that stop: known beginnings
    assert max(last[:450]) < 1 and sum(share == 1 for share in last[450:]) > 3  # clips that start: known ends
    again = batches(7)
    torch.testing.assert_close(again.clean, drawn[7].clean, rtol=0, atol=0)
    torch.testing.assert_close(again.ids, drawn[7].ids)


def test_noise_is_shifted_by_the_number_of_tokens_in_the_last_descent() -> None:
    before, after = sum(DESCENTS[:-1]) - 1, sum(DESCENTS[:-1])
    assert [noise_shift(before, tokens) for tokens in (45, 576)] == [3, 3]
    assert [noise_shift(after, tokens) for tokens in (45, 144, 576)] == [4, 4, 8]
    torch.manual_seed(0)
    low, high = (draw_sigmas(1000, shift).sort().values for shift in (3, 8))
    assert ((low > 0) & (high < 1)).all() and high.median() > low.median() + 0.1


def test_the_mean_of_weights_is_each_tensors() -> None:
    found = mixed([{"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}, {"a": torch.zeros(2), "b": torch.ones(())}])
    assert found["a"].tolist() == [0.5, 1.0] and found["b"].item() == 2


@pytest.mark.parametrize("step", range(6))
def test_remade_latents_are_compared_with_their_own_frames(step: int) -> None:
    """The decoder's window of latents has as many frames as the pixels beside it, with and without history."""
    remade = [
        {"pixels": torch.zeros(2, 17, 32, 32, 3, dtype=torch.uint8), "latents": torch.zeros(2, 8, 5, 4, 4).half()}
    ]
    pixels, error = train_vae._decode_remade(Vae(SPEC.vae), remade, step)
    assert pixels.shape == error.shape and pixels.shape[2] in (8, 9)


@pytest.mark.parametrize("kind", POOLS)
def test_every_kind_of_clip_has_the_length_asked_for(kind: str) -> None:
    scene = Scene("circle", "red", "white", "right")
    clip = draw_clip(kind, scene, 64, 48, 33, np.random.default_rng(5))
    assert clip.shape == (33, 48, 64, 3) and clip.dtype == np.uint8
    travel = track(clip)[-1, 0] - track(clip)[0, 0]
    assert 5 < travel < (20 if kind == "slow" else 40)
    still = np.linalg.norm(np.diff(track(clip), axis=0), axis=1) < 0.01
    assert not still[1:-1].any() or kind in ("stopping", "starting")
    assert not still[0] or kind == "starting"


def test_every_scene_has_one_name_of_known_words() -> None:
    clips, images = ({train_captioner.name(scene, image) for scene in SCENES} for image in (False, True))
    assert len(clips) == len(SCENES) and len(images) == len(SCENES) // 7  # an image shows none of the 7 motions
    assert {word for text in clips | images for word in text.split()} <= set(vocabulary())
    scene = Scene("square", "orange", "cyan", "up")
    assert train_captioner.name(scene, image=False) == "an orange square moves up on a cyan background"
    assert train_captioner.name(scene, image=True) == "an orange square on a cyan background"


def test_the_captioners_batches_keep_to_the_recipe(folder: Path) -> None:
    batches = train_captioner.Batches(SPEC, folder)
    names = {train_captioner.name(scene, image) for scene in SCENES for image in (False, True)}
    lengths = []
    for step in range(100):
        batch = batches(step)
        tokens, words = batch.tokens.numpy(), batch.words
        lengths.append(len(np.unique(tokens[0, :, 32])))  # places in time
        texts = {tokenizer().decode([word for word in row if word not in (PAD, END)]) for row in words.tolist()}
        assert texts <= names
        verbs = {"moves", "stays", "grows", "shrinks"}
        assert all(bool(verbs & set(text.split())) == (lengths[-1] > 1) for text in texts)
        assert (words == END).sum(dim=1).eq(1).all()
        torch.testing.assert_close(batch.before[:, 1:], words[:, :-1])
        assert (batch.before[:, 0] == SPEC.captioner.start).all()
        assert batch.tokens.shape[0] * batch.tokens.shape[1] <= 2400
    assert 11 not in lengths and 0.1 < np.mean([n == 1 for n in lengths]) < 0.3
    again = batches(99)
    torch.testing.assert_close(again.tokens, batch.tokens, rtol=0, atol=0)
