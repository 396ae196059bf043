"""LTX-Video behind the interfaces that Wan has: diffusers' folder is read, its pipelines are reproduced.

    pytest tests/test_ltx.py

The reference models run in torch here, in the place of engines; `test_ltx_graphs.py` proves the graphs. 1e-4 of a
latent after eight steps: float32 in another order of summation, through eight evaluations and guidance; 1e-5 of a
component.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ltx_published import DEPTH, HEAD, HEADS, TEXT, arguments, finished, noise_of, pipeline, request
from published import TEXTS, randomise, relative, rewrite
from safetensors.torch import load_file, save_file
from torch_engines import TorchEngines, painted

from tubelet.export.build import open_checkpoint
from tubelet.export.checkpoint import Checkpoint, parameters
from tubelet.export.dit import Conditioner, Denoiser
from tubelet.export.estimate import KINDS
from tubelet.export.lora import Lora, merged
from tubelet.export.ltx_names import TRANSFORMER, vae_sources
from tubelet.export.names import Layout
from tubelet.export.profiles import choose
from tubelet.export.published import INDEX
from tubelet.export.traffic import Shape
from tubelet.runtime import Pipeline, UserError, vae
from tubelet.runtime.bundle import required
from tubelet.runtime.canvas import Canvas
from tubelet.runtime.geometry import plan
from tubelet.runtime.kernels import pack
from tubelet.runtime.residency import PARTS
from tubelet.runtime.rope import rope_tables
from tubelet.runtime.schedule import time_features
from tubelet.runtime.targets import Choice

TOLERANCE = 1e-5
CLIPS = {"portrait, an odd grid": (96, 160, 17), "one frame": (96, 64, 1), "wide": (224, 32, 9)}


@dataclasses.dataclass(frozen=True)
class Published:
    """diffusers' pipeline, its folder, and ours."""

    theirs: Any
    folder: Path
    checkpoint: Checkpoint
    ours: Pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Published:
    theirs, folder = pipeline(), tmp_path_factory.mktemp("ltx") / "ltx"
    theirs.save_pretrained(folder, max_shard_size="60KB")
    checkpoint = open_checkpoint(folder)
    bundle = SimpleNamespace(spec=checkpoint.spec, key="ltx", path=lambda _: checkpoint.tokenizer)
    ours = Pipeline(bundle, TorchEngines(checkpoint), Choice("cpu", "torch", ()))  # type: ignore[arg-type]
    return Published(theirs, folder, checkpoint, ours)


@pytest.mark.parametrize("clip", CLIPS)
def test_text_to_video_is_diffusers(model: Published, clip: str) -> None:
    noise = noise_of(model.checkpoint.spec, *CLIPS[clip])
    canvas = Canvas(np.zeros_like(noise), np.zeros(noise.shape[1:], np.bool_), noise)

    found = finished(model.ours, request(*CLIPS[clip]), canvas)
    wanted = model.theirs(**arguments(*CLIPS[clip], noise)).frames[0].numpy()

    assert relative(pack(found, (1, 1, 1)), wanted) < 1e-4
    assert np.abs(wanted).max() > 0.5


def test_image_to_video_is_diffusers(model: Published) -> None:
    """diffusers draws the picture's latent from the encoder's distribution; here it is given the mean, as ours is."""
    from diffusers import LTXImageToVideoPipeline

    width, height, frames = 96, 64, 17
    theirs, coder = LTXImageToVideoPipeline(**model.theirs.components), model.theirs.vae
    theirs.set_progress_bar_config(disable=True)
    picture = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    noise = noise_of(model.checkpoint.spec, width, height, frames)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.no_grad():
        mode = coder.encode(pixels).latent_dist.mode()
    mean, std = (value[:, None, None, None] for value in (coder.latents_mean, coder.latents_std))
    start = noise.copy()
    start[:, :1] = ((mode[0] - mean) / std).numpy()

    canvas = painted(model.ours, request(width, height, frames), {0: picture}, frames)
    found = finished(model.ours, request(width, height, frames), dataclasses.replace(canvas, noise=noise))
    wanted = theirs(**arguments(width, height, frames, start)).frames[0].numpy()

    assert relative(canvas.latents[:, :1], start[:, :1]) < TOLERANCE
    assert relative(pack(found, (1, 1, 1)), wanted) < 1e-4


@pytest.mark.parametrize("clip", CLIPS)
@torch.no_grad()
def test_the_vae_is_diffusers(model: Published, clip: str) -> None:
    """Frames in chunks where the encoder streams; the decoder takes the clip whole. To a level of 255 of each frame."""
    width, height, frames = CLIPS[clip]
    theirs, ours = model.theirs.vae, model.ours.engines
    mean, std = (value[None, :, None, None, None] for value in (theirs.latents_mean, theirs.latents_std))
    latents = torch.from_numpy(noise_of(model.checkpoint.spec, width, height, frames))[None]
    pixels = torch.rand(1, 3, frames, height, width) * 2 - 1

    decoded = ours["vae_decoder"]({"latents": latents.numpy()})["pixels"]
    encoded = vae.encode(model.checkpoint.spec.vae, ours, pixels[0].permute(1, 2, 3, 0).numpy())
    shown = np.concatenate(list(model.ours.decode_latent(latents[0].numpy())))

    wanted = theirs.decode(latents * std + mean).sample
    assert relative(decoded, wanted) < TOLERANCE
    assert relative(encoded, (theirs.encode(pixels).latent_dist.mode() - mean)[0] / std[0]) < TOLERANCE
    assert shown.shape == (frames, height, width, 3)
    levels = ((wanted[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert np.abs(shown - levels).max() <= 1


@torch.no_grad()
def test_the_text_encoder_is_transformers(model: Published) -> None:
    """It sees the padding; the denoiser does not."""
    words = dict(padding="max_length", max_length=128, return_tensors="np")
    ids, mask = model.ours.tokenizer(list(TEXTS))
    wanted = model.theirs.tokenizer(list(TEXTS), **words)
    np.testing.assert_array_equal(ids, wanted["input_ids"])
    np.testing.assert_array_equal(mask, wanted["attention_mask"])

    found = model.ours.engines["text_encoder"]({"ids": ids, "mask": np.ones_like(mask)})["embeddings"]
    assert relative(found, model.theirs.text_encoder(torch.from_numpy(ids))[0]) < TOLERANCE


@torch.no_grad()
def test_a_block_at_real_width_is_diffusers(model: Published) -> None:
    """2048 wide, with padding in the text and a known frame. Of 341 frequencies some are a rounding from torch's."""
    from diffusers import LTXVideoTransformer3DModel

    theirs = randomise(LTXVideoTransformer3DModel(num_layers=1, caption_channels=TEXT), 0)
    spec = dataclasses.replace(
        model.checkpoint.spec.denoiser, latent_channels=128, width=2048, depth=1, heads=32, ffn_width=8192
    )
    whole = dataclasses.replace(
        model.checkpoint.spec,
        denoiser=spec,
        vae=dataclasses.replace(
            model.checkpoint.spec.vae, latent_channels=128, latent_mean=(0.0,) * 128, latent_std=(1.0,) * 128
        ),
    )
    ours, stored = {"denoiser": Denoiser(spec), "conditioner": Conditioner(spec)}, theirs.state_dict()
    for prefix, module in ours.items():
        sources = TRANSFORMER.sources((f"{prefix}.{name}" for name in module.state_dict()), Layout.DIFFUSERS, 1)
        module.load_state_dict({n.removeprefix(f"{prefix}."): stored[t] for n, t in sources.items()}, assign=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 30, 128, generator=generator)
    text, mask = torch.randn(1, 128, TEXT, generator=generator), (torch.arange(128) < 20).float()[None]
    known = (torch.arange(30) < 15).float()[None]

    wanted = theirs(
        tokens, text, 700.0 * (1 - known), mask, num_frames=2, height=3, width=5,
        rope_interpolation_scale=(8 / 25, 32, 32), return_dict=False,
    )[0]  # fmt: skip
    cos, sin = map(torch.from_numpy, rope_tables(whole, plan(whole, 160, 96, 9)))
    features = torch.from_numpy(time_features(np.array([[700.0, 0.0]]), 256))
    found = ours["denoiser"](tokens, features, cos, sin, *ours["conditioner"](text), known, text_mask=mask)

    assert relative(found, wanted) < TOLERANCE


def test_the_published_sizes_fit(model: Published) -> None:
    """diffusers' defaults are those of the published model; every parameter has its place and size, without values."""
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    small, widths, layers = model.checkpoint.spec, (128, 256, 512, 512), (4, 3, 3, 3, 4)
    spec = dataclasses.replace(
        small,
        text_encoder=dataclasses.replace(small.text_encoder, width=4096),
        denoiser=dataclasses.replace(
            small.denoiser, latent_channels=128, width=2048, depth=28, heads=32, ffn_width=8192, text_width=4096
        ),
        vae=dataclasses.replace(
            small.vae, latent_channels=128, widths=widths, decoder_widths=widths, encoder_blocks=layers,
            decoder_blocks=layers, latent_mean=(0.0,) * 128, latent_std=(1.0,) * 128,
        ),
    )  # fmt: skip
    with torch.device("meta"):
        ours, theirs = parameters(spec), (LTXVideoTransformer3DModel(), AutoencoderKLLTXVideo())
    denoising = [name for name in ours if name.split(".")[0] in ("denoiser", "conditioner")]
    places = TRANSFORMER.sources(denoising, Layout.DIFFUSERS, 28), vae_sources(n for n in ours if n.startswith("vae."))
    for place, module in zip(places, theirs, strict=True):
        wanted = {name: tensor.numel() for name, tensor in module.state_dict().items()}
        assert {name: math.prod(ours[mine]) for mine, name in place.items()} == wanted


@pytest.mark.parametrize("clip", CLIPS)
def test_rotary_tables_are_diffusers(model: Published, clip: str) -> None:
    geometry = plan(model.checkpoint.spec, *CLIPS[clip])
    rope = model.theirs.transformer.rope(torch.zeros(1, 1), *geometry.grid, (8 / 25, 32, 32))
    for ours, theirs in zip(rope_tables(model.checkpoint.spec, geometry), rope, strict=True):
        wanted = theirs[0, :, ::2].unflatten(-1, (HEADS, -1)).transpose(0, 1)  # every value stands for a pair, twice
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-6)


def test_the_shift_grows_with_the_clip(model: Published) -> None:
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    spec = model.checkpoint.spec
    for size in ((704, 512, 161), (32, 32, 1), (1280, 704, 257)):
        tokens = plan(spec, *size).tokens
        wanted = np.exp(calculate_shift(tokens, 1024, 4096, 0.95, 2.05))
        assert request(*size).complete(spec).shift == pytest.approx(wanted, rel=1e-12)
    longest = request(1280, 704, 257).complete(spec)
    assert request(1280, 704, 8001).complete(spec).shift == longest.shift  # is made in parts
    assert dataclasses.replace(request(32, 32, 1), shift=3.0).complete(spec).shift == 3.0


def test_every_component_can_be_planned(model: Published) -> None:
    spec = model.checkpoint.spec
    profiles = choose(spec, (Shape(256, 256, 9, 1.0), Shape(512, 256, 25, 1.0)), 2).profiles
    assert set(profiles) == set(required(spec)) <= set(KINDS)
    assert "vae_decoder_first" not in profiles
    assert set(required(spec)) <= {component for part in PARTS.values() for component in part}
    assert {(box["t"].min, box["t"].max) for box in profiles["vae_decoder"]} == {(2, 4)}


def test_adapters_are_merged_as_diffusers_fuses_them(model: Published, tmp_path: Path) -> None:
    """1e-6: one product of rank 4 in float32, added in another order."""
    layers = [name for name in model.theirs.transformer.state_dict() if ".attn" in name and ".to_" in name]
    linear = [name.removesuffix(".weight") for name in layers if name.endswith(".weight")]
    generator, width, lora = torch.Generator().manual_seed(7), HEADS * HEAD, {}
    for layer in linear:
        lora[f"transformer.{layer}.lora_A.weight"] = torch.randn(4, width, generator=generator) / 8
        lora[f"transformer.{layer}.lora_B.weight"] = torch.randn(width, 4, generator=generator) / 8
    save_file(lora, tmp_path / "style.safetensors")
    fused = pipeline()
    fused.load_lora_weights(str(tmp_path / "style.safetensors"), adapter_name="style")
    fused.fuse_lora(lora_scale=0.8)
    fused.unload_lora_weights()
    wanted = fused.transformer.state_dict()

    ours = merged(model.checkpoint, [Lora.parse(f"{tmp_path / 'style.safetensors'}:0.8")]).materialised(tmp_path)

    denoising = [name for name in ours.tensors if name.split(".")[0] in ("denoiser", "conditioner")]
    for name, theirs in TRANSFORMER.sources(denoising, Layout.DIFFUSERS, DEPTH).items():
        torch.testing.assert_close(ours.read(name), wanted[theirs], atol=1e-6, rtol=1e-6)
    assert sum(tensor.file == "made.safetensors" for tensor in ours.tensors.values()) == len(linear)


def damage_weights(folder: Path) -> None:
    """Parameters of the VAE less, more, and of another shape."""
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    for file in (folder / "vae").glob("*.safetensors"):
        weights = load_file(file)
        for name in ("encoder.conv_in.conv.bias", "encoder.conv_out.conv.bias"):
            if name in weights:
                weights |= {name: torch.zeros(3), "extra." + name: torch.zeros(1)}
        weights.pop("decoder.conv_in.conv.weight", None)
        save_file(weights, file)


def lose_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()


def damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")


def damage_sizes(folder: Path) -> None:
    rewrite(folder / "transformer", {"proj_in.weight": torch.zeros(())})


def lose_depth(folder: Path) -> None:
    rewrite(folder / "transformer", {"transformer_blocks.0.attn1.to_q.weight": None})


def edit(file: str, **values: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | values))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            damage_weights,
            "missing: decoder.conv_in.conv.weight; unknown: extra.enc.*; wrong shape: encoder.conv_in",
        ),
        (damage_tokenizer, "tokenizer.json is not a readable tokenizer file .*; download it again"),
        (damage_sizes, r"proj_in.weight in .*model.safetensors has the shape \[\]; it must have 2 axes, none of them"),
        (lose_depth, "transformer does not fit its spec; missing: transformer_blocks.0.attn1.to_q.weight$"),
        (edit(INDEX, vae=[]), r"has no vae, or model_index.json does not name it as \[library, class\]; download"),
        (edit(INDEX, boundary_ratio="x"), "model_index.json.boundary_ratio must be float or NoneType, is 'x'"),
        (edit(INDEX, _class_name="FooPipeline"), "ltx is of FooPipeline; known are WanPipeline, WanImageToVideoPipe"),
        (edit(INDEX, _class_name=[]), r"_class_name in .*model_index.json must be str, is \[\]"),
        (
            edit("vae/diffusion_pytorch_model.safetensors.index.json", weight_map={"a": ["b"]}),
            r"index.json.weight_map.a must be str, is \['b'\]",
        ),
        (lose_tokenizer, "tokenizer.json is missing; .*only spiece.model, write it with transformers"),
        (edit("vae/config.json", timestep_conditioning=True), "conditioned on a noise level.*only the VAE of 0.9.0"),
        (edit("vae/config.json", decoder_causal=True), "has decoder_causal True; only False is supported"),
        (edit("vae/config.json", patch_size="4"), "patch_size must be int, is '4'"),
        (edit("transformer/config.json", qk_norm="rms_norm"), "has qk_norm 'rms_norm'; only 'rms_norm_across_heads'"),
        (edit("scheduler/scheduler_config.json", shift_terminal=None), "has shift_terminal None; only 0.1"),
        (edit("scheduler/scheduler_config.json", max_shift=None), "max_shift must be float, is None"),
    ],
)
def test_what_does_not_fit_is_named(model: Published, tmp_path: Path, change: Any, message: str) -> None:
    folder = Path(shutil.copytree(model.folder, tmp_path / "ltx"))
    change(folder)
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)
