"""Wan's VAEs against diffusers' AutoencoderKLWan, and the two layouts in which they are published.

    pytest tests/test_wan_vae.py

Weights are random. Errors are L2 of the difference over L2 of what diffusers computes, in float32: 1e-5 is some 100
roundings, of which a path through the decoder has about 150.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from published import relative
from torch import Tensor, nn

from tubelet.export.causal import CausalConv3d, History, NarrowCausalConv3d
from tubelet.export.checkpoint import check_parameters
from tubelet.export.storage import read_pth, read_values
from tubelet.export.vae import Vae
from tubelet.export.wan_vae_names import RELEASES, published, release_spec, vae_spec
from tubelet.runtime.errors import UserError
from tubelet.runtime.spec import WanVaeSpec

TOLERANCE = 1e-5
WAN21 = dict(base_dim=8, z_dim=16)
WAN22 = dict(
    base_dim=8, decoder_base_dim=12, z_dim=48, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
    scale_factor_spatial=16, latents_mean=list(RELEASES[48].mean), latents_std=list(RELEASES[48].std),
)  # fmt: skip
MODELS = {"wan21": WAN21, "wan22": WAN22}
SHAPES = {"one frame": (1, 3, 5), "odd grid": (2, 3, 5), "portrait": (3, 4, 2), "longer": (6, 1, 1)}


def randomise(module: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.squeeze().ndim < 2 else parameter[0].numel() ** -0.5)


def make(**config: Any) -> AutoencoderKLWan:
    theirs = AutoencoderKLWan(**config).eval()
    randomise(theirs)
    return theirs


def load(spec: WanVaeSpec, layout: str, tensors: dict[str, Tensor]) -> Vae:
    """Our VAE with a file's tensors, which must be exactly those that the layout has."""
    table = published(spec, layout)
    check_parameters(
        "it does not fit",
        {each.name: each.shape for each in table.values()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
    )
    vae = Vae(spec).eval()
    for name, parameter in vae.named_parameters():
        parameter.data = tensors[table[name].name].reshape(parameter.shape)
    return vae


def normalisation(vae: Vae) -> tuple[Tensor, Tensor]:
    return vae.latent_mean, vae.latent_std


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[AutoencoderKLWan, Vae]:
    theirs = make(**MODELS[request.param])
    return theirs, load(vae_spec(theirs.config), "diffusers", theirs.state_dict())


def stream(half: Any, x: Tensor, frames: int) -> Tensor:
    """The first frame, then chunks of so many."""
    y, caches = half(x[:, :, :1])
    results = [y]
    for chunk in x[:, :, 1:].split(frames, dim=2) if x.shape[2] > 1 else ():
        y, caches = half(chunk, caches)
        results.append(y)
    return torch.cat(results, dim=2)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_decoding_equals_diffusers(pair: tuple[AutoencoderKLWan, Vae], shape: str) -> None:
    theirs, ours = pair
    t, h, w = SHAPES[shape]
    latents = torch.randn(2, theirs.config.z_dim, t, h, w)
    mean, std = normalisation(ours)

    expected = theirs.decode(latents * std + mean).sample
    chunks, whole = stream(ours.decode, latents, 1), stream(ours.decode, latents, t)

    assert relative(chunks.clamp(-1, 1), expected) <= TOLERANCE
    assert relative(whole, chunks) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_encoding_equals_diffusers(pair: tuple[AutoencoderKLWan, Vae], shape: str) -> None:
    theirs, ours = pair
    t, h, w = SHAPES[shape]
    side = theirs.config.scale_factor_spatial
    pixels = torch.rand(2, 3, 4 * t - 3, side * h, side * w) * 2 - 1
    mean, std = normalisation(ours)

    expected = (theirs.encode(pixels).latent_dist.mode() - mean) / std
    chunks, whole = stream(ours.encode, pixels, 4), stream(ours.encode, pixels, 4 * t)

    assert relative(chunks, expected) <= TOLERANCE
    assert relative(whole, chunks) <= TOLERANCE


@torch.no_grad()
@settings(deadline=None, max_examples=25)
@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_sums_that_the_past_has_begun_are_the_convolution_over_it(chunks: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    plain, narrow = CausalConv3d(5, 2, 3), NarrowCausalConv3d(5, 2, 3)
    narrow.load_state_dict(plain.state_dict())
    x = torch.randn(1, 5, sum(chunks), 3, 4)
    caches, results = None, []
    for chunk in x.split(chunks, dim=2):
        history = History(caches)
        results.append(narrow(chunk, history))
        caches = history.next
        assert [cache.shape for cache in caches] == [(1, 2, 2, 3, 4)]
    torch.testing.assert_close(torch.cat(results, dim=2), plain(x, History(None)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_real_width_equals_diffusers() -> None:
    theirs = make()
    ours = load(vae_spec(theirs.config), "diffusers", theirs.state_dict())
    mean, std = normalisation(ours)
    latents, pixels = torch.randn(1, 16, 2, 2, 3), torch.rand(1, 3, 5, 16, 24) * 2 - 1
    assert (
        relative(stream(ours.decode, latents, 1).clamp(-1, 1), theirs.decode(latents * std + mean).sample) <= TOLERANCE
    )
    encoded = (theirs.encode(pixels).latent_dist.mode() - mean) / std
    assert relative(stream(ours.encode, pixels, 4), encoded) <= TOLERANCE


# Of Wan 2.2, whose converter is no part of diffusers' package: one parameter of each kind that 2.1 names otherwise.
RELEASED22 = {
    "encoder.downsamples.1.downsamples.0.shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
    "encoder.downsamples.1.downsamples.2.time_conv.weight": "encoder.down_blocks.1.downsampler.time_conv.weight",
    "encoder.middle.1.proj.bias": "encoder.mid_block.attentions.0.proj.bias",
    "decoder.upsamples.0.upsamples.2.residual.2.weight": "decoder.up_blocks.0.resnets.2.conv1.weight",
    "decoder.upsamples.0.upsamples.3.resample.1.weight": "decoder.up_blocks.0.upsampler.resample.1.weight",
    "decoder.upsamples.3.upsamples.2.residual.6.bias": "decoder.up_blocks.3.resnets.2.conv2.bias",
}


def released(theirs: AutoencoderKLWan) -> dict[str, Tensor]:
    """The same weights under the names of the original release."""
    spec = vae_spec(theirs.config)
    diffusers, release = published(spec, "diffusers"), published(spec, "release")
    return {release[name].name: theirs.state_dict()[diffusers[name].name].clone() for name in release}


def test_names_of_wan21_are_those_that_diffusers_converts() -> None:
    theirs = make(**WAN21)
    converted, expected = convert_wan_vae_to_diffusers(released(theirs)), theirs.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_names_of_wan22_are_those_of_the_release() -> None:
    spec = vae_spec(AutoencoderKLWan(**WAN22).config)
    diffusers, release = published(spec, "diffusers"), published(spec, "release")
    pairs = {release[name].name: diffusers[name].name for name in release}
    assert len(pairs) == len(diffusers)
    assert pairs.items() >= RELEASED22.items()


@pytest.mark.parametrize("model", MODELS)
def test_both_layouts_give_the_same_tensors(model: str, tmp_path: Path) -> None:
    theirs = make(**MODELS[model])
    path = tmp_path / "Wan_VAE.pth"
    torch.save(released(theirs), path)

    stored = read_pth(path, path.name)
    tensors = {name: read_values(path, each) for name, each in stored.items()}
    spec = release_spec({name: each.shape for name, each in stored.items()}, path.name)

    assert spec == vae_spec(theirs.config)
    first, second = load(spec, "release", tensors), load(spec, "diffusers", theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_what_does_not_fit_is_listed() -> None:
    theirs = make(**WAN21)
    spec, tensors = vae_spec(theirs.config), theirs.state_dict()
    tensors["decoder.extra.weight"] = tensors.pop("decoder.conv_in.weight")
    tensors["quant_conv.bias"] = torch.zeros(3)
    with pytest.raises(UserError) as error:
        load(spec, "diffusers", tensors)
    for part in ("missing: decoder.conv_in.weight", "unknown: decoder.extra.weight", "quant_conv.bias is [3], must be"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_scales": [0.5]}, "attn_scales must be empty, is [0.5]"),
        ({"dim_mult": [2, 4]}, "dim_mult must begin with 1, is [2, 4]"),
        ({"in_channels": 12}, "in_channels is 12, the rest of it makes 3"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial is 16, the rest of it makes 8"),
        ({"novel": 1}, "has unknown ['novel']"),
        ({"_class_name": "AutoencoderKL"}, "is of AutoencoderKL, must be of AutoencoderKLWan"),
        ({"latents_mean": [0.0]}, "vae.latent_mean needs 16 entries"),
    ],
)
def test_a_config_of_another_vae_is_named(change: dict[str, Any], message: str) -> None:
    config = dict(AutoencoderKLWan(**WAN21).config)
    with pytest.raises(UserError) as error:
        vae_spec(config | change)
    assert message in str(error.value)


def test_the_first_releases_configs_are_read() -> None:
    config = dict(AutoencoderKLWan(**WAN21).config)
    later = ("is_residual", "patch_size", "in_channels", "out_channels", "scale_factor_temporal", "decoder_base_dim")
    assert vae_spec({name: value for name, value in config.items() if name not in later}) == vae_spec(config)


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("run by unpickling",)


@pytest.mark.parametrize("content", [{"conv1.bias": Harmful()}, [torch.zeros(1)], {"conv1.bias": 3}])
def test_a_file_of_other_things_is_refused(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "vae.pth")
    with pytest.raises(UserError, match=r"vae\.pth"):
        read_pth(tmp_path / "vae.pth", "vae.pth")
    assert "run by unpickling" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["truncated", "absent", "text"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "vae.pth"
    torch.save({"conv1.bias": torch.zeros(1000)}, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "absent":
        path.unlink()
    else:
        path.write_text("not a checkpoint")
    with pytest.raises(UserError, match=r"vae\.pth"):
        read_pth(path, path.name)


def test_a_release_of_another_size_is_named() -> None:
    shapes = {"encoder.conv1.bias": (96,), "decoder.head.0.gamma": (96, 1, 1, 1), "conv2.bias": (4,)}
    with pytest.raises(UserError, match=r"has 4 latent channels, known are 16, 48"):
        release_spec(shapes, "other.pth")
    with pytest.raises(UserError, match=r"other.pth is not a VAE of Wan: it lacks encoder.conv1.bias"):
        release_spec({"a": (1,)}, "other.pth")
