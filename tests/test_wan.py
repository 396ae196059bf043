"""Wan's published models: both layouts read alike, damage is listed, and diffusers' pipelines are reproduced.

    pytest tests/test_wan.py

The reference models run in torch here, in the place of engines: what is proved is names, shapes, conditioning and the
loop; `test_wan_graphs.py` proves the graphs. 1e-4 of a latent after eight steps: float32 in another order of summation,
through eight evaluations and guidance.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from published import KINDS, TEXTS, pipeline, randomise, renamed, rewrite, write_diffusers, write_original
from safetensors.torch import load_file, save, save_file
from torch_engines import TorchEngines, painted

from tubelet.export.checkpoint import Checkpoint
from tubelet.export.dit import Conditioner, Denoiser
from tubelet.export.estimate import KINDS as KINDS_OF_COMPONENTS
from tubelet.export.lora import Lora, merged
from tubelet.export.names import Layout
from tubelet.export.profiles import choose
from tubelet.export.storage import digest, read_pth
from tubelet.export.traffic import Shape
from tubelet.export.wan import open_wan
from tubelet.export.wan_names import TRANSFORMER
from tubelet.runtime import Pipeline, Request, UserError
from tubelet.runtime.bundle import required
from tubelet.runtime.canvas import Canvas
from tubelet.runtime.kernels import pack, rope3d, unpack
from tubelet.runtime.residency import PARTS
from tubelet.runtime.schedule import time_features
from tubelet.runtime.spec import DenoiserSpec
from tubelet.runtime.targets import Choice
from tubelet.runtime.text import clean

STEPS, SHIFT = 8, 3.0
DENOISING = ("denoiser", "conditioner")


@dataclasses.dataclass(frozen=True)
class Published:
    """One model: diffusers' pipeline, its folders, and ours."""

    theirs: Any
    diffusers: Path
    original: Path
    checkpoint: Checkpoint
    ours: Pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Published]:
    return _Models(tmp_path_factory.mktemp("wan"))  # type: ignore[return-value]


class _Models(dict[str, Published]):
    """Made when first asked for."""

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def __missing__(self, name: str) -> Published:
        theirs = pipeline(name)
        theirs.set_progress_bar_config(disable=True)
        folder = write_diffusers(theirs, self._folder / name)
        original = write_original(theirs, name, self._folder / f"{name}-original")
        made = self._folder / f"{name}-made"
        made.mkdir()
        checkpoint = open_wan(folder).materialised(made)
        bundle = SimpleNamespace(spec=checkpoint.spec, key=name, path=lambda _: checkpoint.tokenizer)
        ours = Pipeline(bundle, TorchEngines(checkpoint), Choice("cpu", "torch", ()))  # type: ignore[arg-type]
        self[name] = Published(theirs, folder, original, checkpoint, ours)
        return self[name]


@pytest.mark.parametrize("name", KINDS)
def test_both_layouts_are_the_same_model(models: Mapping[str, Published], name: str) -> None:
    ours, other = models[name].checkpoint, open_wan(models[name].original)

    assert ours.spec == other.spec
    assert ours.spec.name == name
    assert other.tensors.keys() | other.made.keys() == ours.tensors.keys()
    for key, stored in other.tensors.items():
        mine = ours.tensors[key]
        assert (stored.dtype, stored.shape) == (mine.dtype, mine.shape)
        assert digest(other.files[stored.file], stored) == digest(ours.files[mine.file], mine), key


def test_the_image_encoder_of_older_releases_is_the_same(models: Mapping[str, Published], tmp_path: Path) -> None:
    """transformers as it was when Wan was published began each name with vision_model."""
    model = models["wan2.1-i2v"]
    folder = Path(shutil.copytree(model.diffusers, tmp_path / "wan"))
    weights = {n: t for path in (folder / "image_encoder").glob("*.safetensors") for n, t in load_file(path).items()}
    rewrite(folder / "image_encoder", dict.fromkeys(weights) | {f"vision_model.{n}": t for n, t in weights.items()})

    other = open_wan(folder)

    assert other.spec == model.checkpoint.spec
    for name in (name for name in other.tensors if name.startswith("image_encoder.")):
        assert torch.equal(other.read(name), model.checkpoint.read(name)), name


@pytest.mark.parametrize("name", KINDS)
def test_every_component_can_be_planned(models: Mapping[str, Published], name: str) -> None:
    spec = models[name].checkpoint.spec
    profiles = choose(spec, (Shape(256, 256, 9, 1.0),), 2).profiles
    assert set(profiles) == set(required(spec)) <= set(KINDS_OF_COMPONENTS)
    assert set(required(spec)) <= {component for part in PARTS.values() for component in part}


@pytest.mark.parametrize(
    ("name", "width", "height", "frames"),
    [
        ("wan2.1-t2v", 48, 80, 9),  # portrait, an odd grid
        ("wan2.1-t2v", 64, 32, 1),
        ("wan2.2-t2v-a14b", 80, 48, 5),
    ],
)
def test_text_to_video_is_diffusers(
    models: Mapping[str, Published], name: str, width: int, height: int, frames: int
) -> None:
    model = models[name]
    low = 2.0 if KINDS[name].boundary else None
    noise, canvas = _noise(model, width, height, frames)

    request = _request(width, height, frames, low)
    found = _finished(model.ours, request, canvas)
    wanted = model.theirs(**_arguments(width, height, frames, low, noise)).frames[0].numpy()

    _assert_close(found, wanted)
    used = [name for name in model.ours.engines.used if name.startswith("denoiser")]
    assert set(used) == ({"denoiser", "denoiser_low"} if low else {"denoiser"})


@pytest.mark.parametrize(
    ("name", "width", "height", "frames"),
    [
        ("wan2.1-i2v", 48, 80, 9),
        ("wan2.1-flf2v", 64, 48, 9),
        ("wan2.2-i2v-a14b", 80, 48, 5),
        ("wan2.2-ti2v", 96, 64, 9),
    ],
)
def test_image_to_video_is_diffusers(
    models: Mapping[str, Published], name: str, width: int, height: int, frames: int
) -> None:
    """Canvases made by the studio from pictures, as the command line makes them."""
    model, kind = models[name], KINDS[name]
    low = 2.0 if kind.boundary else None
    rng = np.random.default_rng(1)
    first, last = rng.integers(0, 256, (2, height, width, 3), np.uint8)
    noise, _ = _noise(model, width, height, frames)
    shown = {0: first, frames - 1: last} if kind.pictures == 2 else {0: first}

    request = _request(width, height, frames, low)
    canvas = dataclasses.replace(painted(model.ours, request, shown, frames), noise=noise)
    found = _finished(model.ours, request, canvas)
    pictures = {"image": Image.fromarray(first)}
    if kind.pictures == 2:
        pictures["last_image"] = Image.fromarray(last)
    wanted = model.theirs(**_arguments(width, height, frames, low, noise), **pictures).frames[0].numpy()

    _assert_close(found, wanted)


def test_the_settings_of_distilled_adapters_run(models: Mapping[str, Published]) -> None:
    """Few steps without guidance, at another shift, by diffusers' Euler too."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    model = models["wan2.1-t2v"]
    noise, canvas = _noise(model, 48, 48, 5)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    schedulers = {"unipc": UniPCMultistepScheduler(**flow), "euler": FlowMatchEulerDiscreteScheduler(shift=5.0)}
    usual = model.theirs.scheduler
    for sampler, scheduler in schedulers.items():
        model.theirs.scheduler = scheduler
        request = dataclasses.replace(
            _request(48, 48, 5, None), steps=4, guidance=1.0, guidance_low=None, shift=5.0, sampler=sampler
        )

        found = _finished(model.ours, request, canvas)
        arguments = _arguments(48, 48, 5, None, noise) | {"num_inference_steps": 4, "guidance_scale": 1.0}
        wanted = model.theirs(**arguments).frames[0].numpy()

        _assert_close(found, wanted)
    model.theirs.scheduler = usual


@torch.no_grad()
def test_a_block_at_real_width_is_diffusers() -> None:
    """The 1.3B model's width with one block: 1e-5 relative, float32 in another order of summation."""
    from diffusers import WanTransformer3DModel

    theirs = randomise(WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=1), 0)
    spec = DenoiserSpec(
        latent_channels=16, patch=(1, 2, 2), width=1536, depth=1, heads=12, ffn_width=8960, text_width=4096,
        time_features=256, theta=10000.0, coordinates=False, pooled_text=False, two_levels=False, mask_channels=0,
        image=None, channels_last=True,
    )  # fmt: skip
    ours = {"denoiser": Denoiser(spec), "conditioner": Conditioner(spec)}
    stored = theirs.state_dict()
    for prefix, module in ours.items():
        names = {f"{prefix}.{name}": tensor.shape for name, tensor in module.state_dict().items()}
        sources = TRANSFORMER.sources(names, Layout.DIFFUSERS, 1)
        state = {name.removeprefix(f"{prefix}."): stored[sources[name]].reshape(names[name]) for name in names}
        module.load_state_dict(state, assign=True)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 6, 10, generator=generator)
    text = torch.randn(1, 512, 4096, generator=generator)

    wanted = theirs(latents, torch.tensor([700.0]), text, return_dict=False)[0]
    cross_k, cross_v = ours["conditioner"](text)
    features = torch.from_numpy(time_features(np.array([[700.0, 0.0]]), 256))
    cos, sin = map(torch.from_numpy, rope3d((2, 3, 5), 128))
    tokens = torch.from_numpy(pack(latents[0].numpy(), (1, 2, 2)))[None]
    velocity = ours["denoiser"](tokens, features, cos, sin, cross_k, cross_v)

    found = torch.from_numpy(unpack(velocity[0].numpy(), 16, (2, 3, 5), (1, 2, 2)))
    assert torch.linalg.norm(found - wanted[0]) < 1e-5 * torch.linalg.norm(wanted)


def _noise(model: Published, width: int, height: int, frames: int) -> tuple[NDArray[np.float32], Canvas]:
    """Noise, and a canvas on which nothing is known but it."""
    vae = model.checkpoint.spec.vae
    side = vae.spatial_factor
    shape = (vae.latent_channels, 1 + (frames - 1) // 4, height // side, width // side)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    grid = (shape[1], shape[2] // 2, shape[3] // 2)
    return noise, Canvas(np.zeros_like(noise), np.zeros(grid, np.bool_), noise)


def _request(width: int, height: int, frames: int, low: float | None) -> Request:
    return Request(
        TEXTS[2], negative_prompt="blurry,  &amp; dark", width=width, height=height, frames=frames, steps=STEPS,
        guidance=3.0, guidance_low=low, sampler="unipc", shift=SHIFT,
    )  # fmt: skip


def _arguments(width: int, height: int, frames: int, low: float | None, noise: NDArray[np.float32]) -> dict[str, Any]:
    return {
        "prompt": TEXTS[2], "negative_prompt": "blurry,  &amp; dark", "width": width, "height": height,
        "num_frames": frames, "num_inference_steps": STEPS, "guidance_scale": 3.0, "guidance_scale_2": low,
        "latents": torch.from_numpy(noise)[None], "output_type": "latent",
    }  # fmt: skip


def _finished(ours: Pipeline, request: Request, canvas: Canvas) -> NDArray[np.float32]:
    generation = ours.prepare(request, canvas)
    ours.finish(generation)
    return ours.latent(generation)


def _assert_close(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    assert found.shape == wanted.shape
    assert error < 1e-4, error
    assert np.abs(wanted).max() > 0.5


def lora_of(weights: Mapping[str, torch.Tensor], style: str) -> dict[str, torch.Tensor]:
    """A random adapter of all attentions and FFNs, whose alpha is half its rank where the style has one."""
    generator = torch.Generator().manual_seed(7)
    layers = [name for name in weights if ".attn" in name or ".ffn" in name]
    linear = [name.removesuffix(".weight") for name in layers if name.endswith(".weight") and weights[name].ndim == 2]
    found: dict[str, torch.Tensor] = {}
    for layer in linear:
        rows, columns = weights[f"{layer}.weight"].shape
        down = torch.randn(4, columns, generator=generator) / 8
        up = torch.randn(rows, 4, generator=generator) / 8
        if style == "diffusers":
            found |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
            continue
        (original,) = renamed(TRANSFORMER, {f"{layer}.weight": up}, 2)
        original = original.removesuffix(".weight")
        called = f"lora_unet_{original.replace('.', '_')}" if style == "kohya" else f"diffusion_model.{original}"
        found |= {f"{called}.lora_down.weight": down, f"{called}.lora_up.weight": up}
        found[f"{called}.alpha"] = torch.tensor(2.0)
    return found


@pytest.mark.parametrize("style", ["diffusers", "original", "kohya"])
def test_adapters_are_merged_as_diffusers_fuses_them(
    models: Mapping[str, Published], tmp_path: Path, style: str
) -> None:
    """1e-6: one product of rank 4 in float32, added in another order."""
    model = models["wan2.1-t2v"]
    file = tmp_path / "style.safetensors"
    save_file(lora_of(model.theirs.transformer.state_dict(), style), file)
    fused = pipeline("wan2.1-t2v")
    fused.load_lora_weights(str(file), adapter_name="style")
    fused.fuse_lora(lora_scale=0.8)
    fused.unload_lora_weights()
    wanted = renamed(TRANSFORMER, fused.transformer.state_dict(), 2)

    ours = merged(open_wan(model.diffusers), [Lora.parse(f"{file}:0.8")]).materialised(tmp_path)

    sources = TRANSFORMER.sources((n for n in ours.tensors if n.split(".")[0] in DENOISING), Layout.ORIGINAL, 2)
    changed = 0
    for name, theirs in sources.items():
        expected = wanted[theirs].reshape(ours.tensors[name].shape)
        torch.testing.assert_close(ours.read(name), expected, atol=1e-6, rtol=1e-6)
        changed += ours.tensors[name].file == "made.safetensors"
    assert changed == 2 * 10  # q, k, v, o twice and the FFN's two, in two blocks


def test_several_adapters_add_up_and_differences_are_whole(models: Mapping[str, Published], tmp_path: Path) -> None:
    checkpoint, file = open_wan(models["wan2.2-t2v-a14b"].diffusers), tmp_path / "diff.safetensors"
    name = "blocks.0.self_attn.q"
    shape = checkpoint.tensors["denoiser.blocks.0.self_attention.q.weight"].shape
    save_file(
        {f"diffusion_model.{name}.diff": torch.ones(shape), f"diffusion_model.{name}.diff_b": torch.ones(shape[0])},
        file,
    )

    loras = [Lora.parse(str(file)), Lora.parse(f"{file}:-0.25"), Lora.parse(f"{file}:0.5:low")]
    ours = merged(checkpoint, loras).materialised(tmp_path)

    for expert, added in (("", 0.75), ("_low", 1.25)):
        for parameter in ("weight", "bias"):
            key = f"denoiser{expert}.blocks.0.self_attention.q.{parameter}"
            torch.testing.assert_close(ours.read(key) - checkpoint.read(key), torch.full_like(ours.read(key), added))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (
            "transformer.blocks.9.attn1.to_q.lora_A.weight",
            (4, 48),
            r"not its parameters: transformer.blocks.9.attn1.to_q",
        ),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", (4, 48), r"to_q.lora_A.weight; of another shape: none"),
        ("lora_unet_blocks_0_ffn_0.diff_b", (3,), r"of another shape: denoiser.blocks.0.ffn.0.bias"),
    ],
)
def test_adapters_must_fit(
    models: Mapping[str, Published], tmp_path: Path, key: str, shape: tuple[int, ...], message: str
) -> None:
    save_file({key: torch.zeros(shape)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        merged(open_wan(models["wan2.1-t2v"].diffusers), [Lora.parse(f"{tmp_path / 'a.safetensors'}:1")])


def written(metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> bytes:
    return save({f"transformer.blocks.0.attn1.to_q.{part}": tensor for part, tensor in tensors.items()}, metadata)


PAIR = {"lora_A.weight": torch.zeros(4, 48), "lora_B.weight": torch.zeros(48, 4)}
UNFIT = r"not its parameters: none; of another shape: denoiser.blocks.0.self_attention.q.weight$"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"This is not an adapter.", r"is not a usable safetensors file \(its header is truncated\); copy it again"),
        (written(**PAIR)[:-1], r"is not a usable safetensors file \(the bytes of .* are truncated\)"),
        (save({}), "holds no tensors; give a file with an adapter"),
        (written(**PAIR | {"lora_A.weight": torch.zeros(0, 48), "lora_B.weight": torch.zeros(48, 0)}), UNFIT),
        (written(**PAIR | {"lora_A.weight": torch.zeros(())}), UNFIT),
        (written(**PAIR | {"lora_B.weight": torch.zeros(())}), UNFIT),
        (written(**PAIR | {"lora_B.weight": torch.zeros(48)}), UNFIT),
        (written(**PAIR, alpha=torch.ones(2)), UNFIT),
        (
            written({"lora_adapter_metadata": '{"transformer.lora_alpha": "x"}'}, **PAIR),
            r"the metadata of .*: transformer.lora_alpha must be float or NoneType, is 'x'",
        ),
    ],
)
def test_damaged_adapters_are_refused(
    models: Mapping[str, Published], tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        merged(models["wan2.1-t2v"].checkpoint, [Lora.parse(str(tmp_path / "a.safetensors"))])


def test_adapters_are_named_with_a_scale() -> None:
    assert Lora.parse("a.safetensors") == Lora(Path("a.safetensors"), 1.0, None)
    assert Lora.parse("b:c.safetensors:0.5:low") == Lora(Path("b:c.safetensors"), 0.5, "low")
    for text in ("a:b", "a:nan", ":1"):
        with pytest.raises(UserError, match="--lora"):
            Lora.parse(text)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("lost", ["blocks.0.self_attention.q", "blocks.1.self_attention.q", "blocks.0.ffn.0"])
def test_damaged_folders_are_refused(
    models: Mapping[str, Published], tmp_path: Path, layout: Layout, lost: str
) -> None:
    """One message names what is missing, unknown and wrongly shaped, where sizes are read from it too."""
    folder = Path(shutil.copytree(getattr(models["wan2.1-i2v"], layout.name.lower()), tmp_path / "wan"))
    ours = [f"denoiser.{lost}.weight", "denoiser.blocks.0.offset"]
    missing, reshaped = TRANSFORMER.sources(ours, layout, 2).values()
    inside = folder / "transformer" if layout == Layout.DIFFUSERS else folder
    rewrite(inside, {missing: None, reshaped: torch.zeros(3, 3), "extra.weight": torch.zeros(2)})

    with pytest.raises(UserError) as error:
        open_wan(folder)
    assert f"; missing: {missing}; unknown: extra.weight; wrong shape: {reshaped} is [3, 3], must" in str(error.value)


@pytest.mark.parametrize(
    ("part", "name", "shape", "rank"),
    [
        ("transformer", "patch_embedding.weight", (48, 36, 1, 0, 2), 5),
        ("transformer", "proj_out.weight", (), 2),
        ("text_encoder", "shared.weight", (4,), 2),
        ("image_encoder", "embeddings.patch_embedding.weight", (4,), 4),
        ("image_encoder", "embeddings.position_embedding.weight", (0, 160), 2),
    ],
)
def test_sizes_are_those_of_tensors_with_axes(
    models: Mapping[str, Published], tmp_path: Path, part: str, name: str, shape: tuple[int, ...], rank: int
) -> None:
    folder = Path(shutil.copytree(models["wan2.1-i2v"].diffusers, tmp_path / "wan"))
    rewrite(folder / part, {name: torch.zeros(shape)})
    message = re.escape(f"{name} in {folder / part / 'model.safetensors'} has the shape {list(shape)}; it must have ")
    with pytest.raises(UserError, match=f"{message}{rank} axes, none of them empty; download it again"):
        open_wan(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is damaged, or torch did not write it of tensors alone"),
        (b"PK\x03\x04cut", "it is damaged, or torch did not write it of tensors alone"),
        (b"This is text.\n", "it is damaged, or torch did not write it of tensors alone"),
        ({"weight": Path("/")}, "it is damaged, or torch did not write it of tensors alone"),
        ([torch.ones(2)], "it holds more than named tensors"),
        ({1: torch.ones(2)}, "it holds more than named tensors"),
        ({"a": torch.ones(2).to_sparse()}, "a is torch.float32, must be dense and one of F32, F16, BF16"),
    ],
)
def test_pickled_weights_are_tensors_alone(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        read_pth(path, path.name)
    assert str(error.value) == f"{path} is not a usable file of weights ({reason}); copy it again"


@pytest.mark.parametrize(
    ("pattern", "copies", "found"),
    [
        ("models_t5_*.pth", 0, "none"),
        ("models_clip_*.pth", 2, "models_clip_2.pth, models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
        ("Wan2.*_VAE.pth", 2, "Wan2.1_VAE.pth, Wan2.2_VAE.pth"),
    ],
)
def test_an_original_release_has_each_file_once(
    models: Mapping[str, Published], tmp_path: Path, pattern: str, copies: int, found: str
) -> None:
    folder = Path(shutil.copytree(models["wan2.1-i2v"].original, tmp_path / "wan"))
    (file,) = folder.glob(pattern)
    if copies:
        shutil.copyfile(file, folder / pattern.replace("*", "2"))
    else:
        file.unlink()
    with pytest.raises(UserError, match=re.escape(f"must have one file {pattern}, has {found}; download the whole")):
        open_wan(folder)


@pytest.mark.parametrize("kind", ["vace", None, ["t2v"]])
def test_an_original_release_is_of_a_known_kind(models: Mapping[str, Published], tmp_path: Path, kind: Any) -> None:
    folder = Path(shutil.copytree(models["wan2.1-i2v"].original, tmp_path / "wan"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    message = f"config.json has model_type {kind!r}; known of Wan are t2v, i2v, flf2v, ti2v"
    with pytest.raises(UserError, match=re.escape(message)):
        open_wan(folder)


def test_ids_are_those_of_transformers(models: Mapping[str, Published]) -> None:
    """In many languages, after diffusers' own clean-up, padded to 512."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    model = models["wan2.1-t2v"]
    odd = [
        "  two  spaces\u3000and\ttabs\n",
        "a &amp;amp; b &lt;i&gt;",
        "\u201ccurly\u201d \u2018quotes\u2019 \ufb01ne",
        "schÃ¶n",
        "",
        "e\u0301",
    ]
    prompts = [*TEXTS, *odd]
    assert [clean(p) for p in prompts] == [prompt_clean(p) for p in prompts]

    wanted = model.theirs.tokenizer(
        [prompt_clean(p) for p in prompts], padding="max_length", max_length=512, return_tensors="np"
    )
    ids, mask = model.ours.tokenizer(prompts)

    np.testing.assert_array_equal(ids, wanted["input_ids"])
    np.testing.assert_array_equal(mask, wanted["attention_mask"])


def test_a_model_for_pictures_needs_one(models: Mapping[str, Published]) -> None:
    request = _request(48, 48, 5, None)
    with pytest.raises(UserError, match=r"wan2\.1-i2v makes clips of pictures or of other clips; give one"):
        models["wan2.1-i2v"].ours.prepare(request)
    with pytest.raises(UserError, match="has one denoiser; guidance_low is for models of two"):
        models["wan2.1-t2v"].ours.prepare(dataclasses.replace(request, guidance_low=2.0))
