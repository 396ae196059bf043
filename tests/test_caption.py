"""The captioner: cached decoding is decoding whole, in torch and in the engine; beam search finds what it should.

    pytest tests/test_caption.py

One small random model is exported once. Its vocabulary and its captions are so short that all captions can be listed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tubelet.export.captioner import Captioner as TorchCaptioner
from tubelet.export.captioner import CaptionerMemory
from tubelet.export.components import build_modules, components
from tubelet.export.demo.recipe import model_spec, tokenizer
from tubelet.export.demo.train_captioner import name
from tubelet.export.demo.train_denoiser import pack
from tubelet.export.demo.world import HELD_OUT, render
from tubelet.export.storage import read_header
from tubelet.export.trace import trace
from tubelet.runtime import Pipeline, Studio, UserError
from tubelet.runtime.bundle import TO_CAPTION, WEIGHTS
from tubelet.runtime.caption import Captioner, Step, decoder, search
from tubelet.runtime.engines import OnnxRuntimeEngine
from tubelet.runtime.geometry import coordinate_columns
from tubelet.runtime.spec import CaptionerSpec, ModelSpec
from tubelet.runtime.text import PromptTokenizer

SMALL = CaptionerSpec(
    token_values=32, vocabulary=4, width=24, encoder_depth=1, decoder_depth=2, heads=2, ffn_width=48, length=5, start=0,
    end=1,
)  # fmt: skip
SIZES = ((1, 2, 2), (3, 4, 6), (5, 8, 4), (9, 6, 10))  # latent frames, rows, columns


@dataclass(frozen=True)
class Model:
    """The small model: torch's modules, and its graphs on ONNX Runtime."""

    memory: CaptionerMemory
    captioner: TorchCaptioner
    runtime: Captioner

    @torch.no_grad()
    def cross(self, latent: np.ndarray) -> tuple[Tensor, Tensor]:
        t, h, w = latent.shape[1:]
        tokens = pack(torch.from_numpy(latent)[None], (1, 2, 2))
        places = torch.from_numpy(coordinate_columns((t, h // 2, w // 2)))[None]
        return self.memory(torch.cat([tokens, places], dim=2))

    @torch.no_grad()
    def log_probabilities(self, ids: list[int], cross: tuple[Tensor, Tensor]) -> Tensor:
        """Of each next word after start and these [1 + len(ids),vocabulary], all in one pass without a cache."""
        return self.captioner.whole(torch.tensor([[SMALL.start, *ids]]), *cross)[0].double().log_softmax(dim=1)

    def engine_step(self, latent: np.ndarray, beams: int) -> Step:
        cross = (x.numpy() for x in self.cross(latent))
        return decoder(SMALL, self.runtime.engines["captioner"], *cross, beams)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("captioner")
    spec = model_spec([0.0] * 8, [1.0] * 8)
    text = dataclasses.replace(spec.text_encoder, vocabulary=SMALL.vocabulary)
    spec = dataclasses.replace(spec, text_encoder=text, captioner=SMALL)
    modules = {part: module for part, module in build_modules(spec).items() if part in TO_CAPTION}
    for module in modules.values():
        randomise(module)
    weights = {f"{part}.{key}": value for part, module in modules.items() for key, value in module.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    with torch.device("meta"):
        on_meta = build_modules(spec)
    engines = {}
    for component in components(spec, on_meta):
        if component.name in TO_CAPTION:
            path = folder / f"{component.name}.onnx"
            ir.save(trace(component, read_header(folder / WEIGHTS)), path)
            engines[component.name] = OnnxRuntimeEngine(path, threads=1)
    runtime = Captioner(spec, engines, PromptTokenizer(tokenizer(), SMALL.length))
    memory, captioner = (modules[part] for part in TO_CAPTION)
    assert isinstance(memory, CaptionerMemory) and isinstance(captioner, TorchCaptioner)
    return Model(memory, captioner, runtime)


def randomise(module: nn.Module) -> None:
    """Every parameter random; with this seed greedy captions vary in length and are not always the best."""
    torch.manual_seed(6)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 3 * parameter.shape[-1] ** -0.5)


def latent(size: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((8, *size), np.float32)


@torch.no_grad()
def test_one_word_at_a_time_equals_the_whole_caption(model: Model) -> None:
    """The cache starts full of noise: what lies behind the position must not be read."""
    torch.manual_seed(1)
    ids = torch.randint(0, SMALL.vocabulary, (3, SMALL.length))
    cross_k, cross_v, past_k, past_v = torch.randn(4, SMALL.decoder_depth, 3, SMALL.heads, 7, SMALL.head_size)
    past_k, past_v = past_k[..., : SMALL.length, :], past_v[..., : SMALL.length, :]

    expected = model.captioner.whole(ids, cross_k, cross_v)
    for position in range(SMALL.length):
        step = torch.tensor([position])
        logits, past_k, past_v = model.captioner(ids[:, step], step, cross_k, cross_v, past_k, past_v)
        torch.testing.assert_close(logits, expected[:, position], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_word_sees_none_after_it(model: Model) -> None:
    cross = model.cross(latent((3, 4, 6)))
    before, after = ([1, 2, 3], [1, 2, 0])

    a, b = (model.log_probabilities(ids, cross) for ids in (before, after))

    torch.testing.assert_close(a[:3], b[:3], atol=1e-6, rtol=0)
    assert (a[3] - b[3]).abs().max() > 1e-2


@pytest.mark.parametrize("size", SIZES)
def test_the_engines_equal_torch_at_every_size(model: Model, size: tuple[int, int, int]) -> None:
    """Beams swap places on the way: the cache of each must follow its parent."""
    clip = latent(size)
    memory = model.runtime.engines["captioner_memory"]({"tokens": model.runtime._tokens(clip)})
    cross = model.cross(clip)
    for result, expected in zip((memory["cross_k"], memory["cross_v"]), cross, strict=True):
        np.testing.assert_allclose(result, expected.numpy(), atol=1e-5, rtol=0)

    rng, beams = np.random.default_rng(5), 3
    step = model.engine_step(clip, beams)
    captions: list[list[int]] = [[]] * beams
    parents, words = np.zeros(beams, np.int64), np.full(beams, SMALL.start)
    for position in range(SMALL.length):
        result = step(position, parents, words)
        for row, ids in zip(result, captions, strict=True):
            expected_row = model.log_probabilities(ids, cross)[-1]
            np.testing.assert_allclose(row, expected_row.numpy(), atol=1e-5, rtol=0)
        parents, words = rng.integers(beams, size=beams), rng.integers(SMALL.vocabulary, size=beams)
        captions = [[*captions[parent], int(word)] for parent, word in zip(parents, words, strict=True)]


def test_one_beam_is_greedy(model: Model) -> None:
    lengths = set()
    for seed, size in itertools.product(range(6), SIZES):
        clip, ids = latent(size, seed), []
        cross = model.cross(clip)
        while len(ids) < SMALL.length:
            ids.append(int(model.log_probabilities(ids, cross)[-1].argmax()))
            if ids[-1] == SMALL.end:
                ids.pop()
                break
        lengths.add(len(ids))
        assert search(model.engine_step(clip, 1), 1, SMALL.length, SMALL.start, SMALL.end)[0] == ids
        assert model.runtime.caption(clip) == model.runtime.tokenizer.text(ids)
    assert len(lengths) > 1  # some end early


def test_enough_beams_find_the_best_of_all_captions(model: Model) -> None:
    """The engine's search against every caption there is, scored by torch without a cache."""
    beams, better = SMALL.vocabulary ** (SMALL.length - 1), 0
    for seed in range(3):
        clip = latent((3, 4, 4), seed)
        cross = model.cross(clip)
        means = {}
        for ids in complete(SMALL.vocabulary, SMALL.length, SMALL.end):
            table = model.log_probabilities(list(ids[:-1]), cross)
            means[ids] = float(table[range(len(ids)), list(ids)].mean())
        expected = max(means, key=means.__getitem__)

        found, mean = search(model.engine_step(clip, beams), beams, SMALL.length, SMALL.start, SMALL.end)

        assert found == [word for word in expected if word != SMALL.end]
        assert mean == pytest.approx(means[expected], abs=1e-5)
        greedy = search(model.engine_step(clip, 1), 1, SMALL.length, SMALL.start, SMALL.end)
        better += mean > greedy[1] + 1e-6
    assert better  # or greedy would do


def complete(vocabulary: int, length: int, end: int) -> list[tuple[int, ...]]:
    """Every caption: those that end, and those of full length that do not."""
    others = [word for word in range(vocabulary) if word != end]
    ended = [(*ids, end) for n in range(length) for ids in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=length))


class Table:
    """A language with a random table of log-probabilities for every history."""

    def __init__(self, vocabulary: int, seed: int, sharpness: float):
        self.vocabulary, self.seed, self.sharpness = vocabulary, seed, sharpness
        self.histories: list[tuple[int, ...]] = []

    def next(self, history: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng((self.seed, len(history), *history))
        logits = self.sharpness * rng.normal(size=self.vocabulary)
        return logits - np.log(np.exp(logits).sum())

    def mean(self, ids: tuple[int, ...]) -> float:
        return sum(self.next(ids[:i])[word] for i, word in enumerate(ids)) / len(ids)

    def step(self, position: int, parents: np.ndarray, words: np.ndarray) -> np.ndarray:
        if position == 0:
            self.histories = [()] * len(words)
        else:
            self.histories = [(*self.histories[p], int(w)) for p, w in zip(parents, words, strict=True)]
        return np.stack([self.next(history) for history in self.histories])


@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 10**6), st.floats(0.1, 5))
@settings(deadline=None, max_examples=60)
def test_search_against_brute_force(vocabulary: int, length: int, seed: int, sharpness: float) -> None:
    """With room for all it finds the best; with less, what it returns has the mean that it says, and no better one."""
    table = Table(vocabulary, seed, sharpness)
    means = {ids: table.mean(ids) for ids in complete(vocabulary, length, end=1)}
    best = max(means, key=means.__getitem__)

    for beams in (1, 2, vocabulary**length):
        ids, mean = search(table.step, beams, length, start=0, end=1)
        whole = tuple(ids) if len(ids) == length else (*ids, 1)
        assert mean == pytest.approx(means[whole])
        if beams == vocabulary**length:
            assert mean == pytest.approx(means[best])


def test_two_beams_escape_a_trap() -> None:
    """The likeliest first word leads nowhere good; greedy takes it, two beams do not."""

    def step(position: int, parents: np.ndarray, words: np.ndarray) -> np.ndarray:
        if position == 0:
            odds = [[0.0, 0.0, 0.6, 0.4]] * len(words)
        else:
            odds = [[0.0, 0.9, 0.05, 0.05] if word == 3 else [0.0, 0.4, 0.3, 0.3] for word in words]
        with np.errstate(divide="ignore"):
            return np.log(np.array(odds))

    assert search(step, 1, 2, start=0, end=1) == ([2], pytest.approx(math.log(0.6 * 0.4) / 2))
    assert search(step, 2, 2, start=0, end=1) == ([3], pytest.approx(math.log(0.4 * 0.9) / 2))


def test_what_cannot_be_captioned_is_refused(model: Model) -> None:
    clip = latent((1, 2, 2))
    for beams in (0, 65):
        with pytest.raises(UserError, match=f"beams must be from 1 to 64, is {beams}"):
            model.runtime.caption(clip, beams)
    with pytest.raises(UserError, match="the clip is 4225 tokens, the model takes 4096"):
        model.runtime.caption(latent((1, 130, 130)))
    spec = dataclasses.replace(model_spec([0.0] * 8, [1.0] * 8), captioner=None)
    with pytest.raises(UserError, match="tubelet-demo has no captioner"):
        Captioner(spec, {}, model.runtime.tokenizer)


def test_a_model_without_a_captioner_has_null_in_its_spec() -> None:
    spec = dataclasses.replace(model_spec([0.0] * 8, [1.0] * 8), captioner=None)
    data = spec.to_json()
    assert data["captioner"] is None
    assert ModelSpec.from_json(data) == spec
    del data["captioner"]
    with pytest.raises(UserError, match=r"spec lacks \['captioner'\]"):
        ModelSpec.from_json(data)
    with pytest.raises(UserError, match=r"spec.captioner must be an object, is 5"):
        ModelSpec.from_json(data | {"captioner": 5})


def test_the_embedded_model_names_clips_of_scenes_never_trained(pipeline: Pipeline) -> None:
    """Three sizes, images among them, word for word in 10 cases of 12: by guessing one in 500 would be right."""
    studio, rng = Studio(pipeline), np.random.default_rng(8)
    right = {1: 0, 4: 0}
    sizes = ((48, 48, 17), (64, 80, 33), (64, 64, 1))
    for scene, (width, height, frames) in zip(HELD_OUT[:12], itertools.cycle(sizes), strict=False):
        clip = render(scene, width, height, frames, rng)
        for beams in right:
            right[beams] += studio.describe(clip, beams) == name(scene, frames == 1)
    assert min(right.values()) >= 10


def test_a_long_clip_is_named_by_its_beginning(pipeline: Pipeline) -> None:
    studio, clip = Studio(pipeline), render(HELD_OUT[0], 48, 48, 65, np.random.default_rng(1))
    noise = np.random.default_rng(2).integers(0, 256, (30, 48, 48, 3), np.uint8)
    assert studio.describe(np.concatenate([clip, noise])) == studio.describe(clip)
    assert studio.describe(clip[:35]) == studio.describe(clip[:33])
