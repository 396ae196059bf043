# ruff: noqa: RUF001  prompts in many languages
"""Small Wan models as diffusers has them, written in both of the layouts in which Wan is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from tubelet.export.names import Layout, Names
from tubelet.export.wan_names import IMAGE_ENCODER, TEXT_ENCODER, TRANSFORMER
from tubelet.export.wan_vae_names import RELEASES, published, vae_spec

TEXTS = (
    "a red circle moves left on a white background",
    "A cat and a dog baking a cake together in a kitchen.",
    "一只戴着红色帽子的猫在雪地里跳舞。",
    "夕焼けの海辺を歩く二人、静かな波。",
    "Ein Fuchs läuft durch den nebligen Wald – früh am Morgen.",
    "Кошка медленно идёт по клавиатуре.",
    "قطة تمشي ببطء على الشاطئ",
    "देर रात शहर की सड़क पर बारिश",
    "Une danseuse à l’opéra, éclairée d’un seul projecteur.",
    "어두운 숲 속의 작은 집",
)


@dataclass(frozen=True)
class Kind:
    """What makes one of the published models."""

    inputs: int = 16
    channels: int = 16
    pictures: int = 0
    positions: bool = False
    boundary: float | None = None
    per_token: bool = False
    model_type: str = "t2v"


KINDS = {
    "wan2.1-t2v": Kind(),
    "wan2.1-i2v": Kind(inputs=36, pictures=1, model_type="i2v"),
    "wan2.1-flf2v": Kind(inputs=36, pictures=2, positions=True, model_type="flf2v"),
    "wan2.2-t2v-a14b": Kind(boundary=0.875),
    "wan2.2-i2v-a14b": Kind(inputs=36, boundary=0.9, model_type="i2v"),
    "wan2.2-ti2v": Kind(inputs=48, channels=48, per_token=True, model_type="ti2v"),
}
HEADS, HEAD, DEPTH, FFN, TEXT, FREQUENCIES = 2, 24, 2, 96, 32, 16
CLIP_WIDTH, CLIP_SIZE, CLIP_PATCH = 160, 28, 14


def randomise(module: nn.Module, seed: int) -> Any:
    """Every parameter random, so that none hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        std = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, std=std, generator=generator)
    return module.eval()


def relative(found: Any, wanted: Any) -> float:
    """The distance of two arrays of one shape, in the length of the second."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def tokenizer() -> Tokenizer:
    """A unigram model in the form of UMT5's: words begin with a mark, an end token follows."""
    result = Tokenizer(models.Unigram())
    result.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    result.pre_tokenizer = pre_tokenizers.Metaspace()
    result.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    result.train_from_iterator(TEXTS * 3, trainer)
    result.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return result


def transformer(kind: Kind, seed: int) -> Any:
    from diffusers import WanTransformer3DModel

    tokens = 1 + (CLIP_SIZE // CLIP_PATCH) ** 2
    return randomise(
        WanTransformer3DModel(
            num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=kind.inputs, out_channels=kind.channels,
            text_dim=TEXT, freq_dim=FREQUENCIES, ffn_dim=FFN, num_layers=DEPTH,
            image_dim=CLIP_WIDTH if kind.pictures else None,
            added_kv_proj_dim=HEADS * HEAD if kind.pictures else None,
            pos_embed_seq_len=kind.pictures * tokens if kind.positions else None,
        ),
        seed,
    )  # fmt: skip


def pipeline(name: str) -> Any:
    """A pipeline of diffusers' with random weights."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModel,
        PreTrainedTokenizerFast,
        UMT5Config,
        UMT5EncoderModel,
    )

    kind = KINDS[name]
    words = tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=words.get_vocab_size(), d_model=TEXT, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    residual = kind.channels == 48
    vae = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=6 if residual else None, z_dim=kind.channels, is_residual=residual,
        patch_size=2 if residual else None, in_channels=12 if residual else 3, out_channels=12 if residual else 3,
        scale_factor_spatial=16 if residual else 8,
        **({"latents_mean": RELEASES[48].mean, "latents_std": RELEASES[48].std} if residual else {}),
    )  # fmt: skip
    parts: dict[str, Any] = {
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        "text_encoder": randomise(text_encoder, 1),
        "vae": randomise(vae, 2),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": transformer(kind, 3),
        "transformer_2": transformer(kind, 4) if kind.boundary else None,
        "boundary_ratio": kind.boundary,
        "expand_timesteps": kind.per_token,
    }
    if kind.inputs == kind.channels and not kind.per_token:
        return WanPipeline(**parts)
    if kind.pictures:
        config = CLIPVisionConfig(
            hidden_size=CLIP_WIDTH, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            image_size=CLIP_SIZE, patch_size=CLIP_PATCH, hidden_act="gelu",
        )  # fmt: skip
        parts["image_encoder"] = randomise(CLIPVisionModel(config), 5)
        parts["image_processor"] = CLIPImageProcessorPil(
            size={"shortest_edge": CLIP_SIZE}, crop_size={"height": CLIP_SIZE, "width": CLIP_SIZE}
        )
    return WanImageToVideoPipeline(**parts)


def write_diffusers(made: Any, folder: Path) -> Path:
    """The diffusers folder, its transformers in several shards."""
    made.save_pretrained(folder, max_shard_size="60KB")
    return folder


def write_original(made: Any, name: str, folder: Path) -> Path:
    """The original release of the same weights."""
    kind = KINDS[name]
    folder.mkdir()
    config = {
        "_class_name": "WanModel", "dim": HEADS * HEAD, "eps": 1e-6, "ffn_dim": FFN, "freq_dim": FREQUENCIES,
        "in_dim": kind.inputs, "model_type": kind.model_type, "num_heads": HEADS, "num_layers": DEPTH,
        "out_dim": kind.channels, "text_len": 512,
    }  # fmt: skip
    experts = [made.transformer, made.transformer_2] if kind.boundary else [made.transformer]
    places = ["high_noise_model", "low_noise_model"] if kind.boundary else ["."]
    for model, place in zip(experts, places, strict=True):
        inside = folder / place
        inside.mkdir(exist_ok=True)
        (inside / "config.json").write_text(json.dumps(config))
        weights = {n: t.contiguous().clone() for n, t in renamed(TRANSFORMER, model.state_dict(), DEPTH).items()}
        names = sorted(weights)
        shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, held in shards.items():
            save_file({n: weights[n] for n in held}, inside / file)
        index = {"metadata": {}, "weight_map": {n: file for file, held in shards.items() for n in held}}
        (inside / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    text = renamed(TEXT_ENCODER, made.text_encoder.state_dict(), 2)
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    spec = vae_spec(dict(made.vae.config))
    ours = published(spec, "diffusers")
    theirs = {ours[n].name: row for n, row in published(spec, "release").items()}
    vae = {theirs[n].name: t.reshape(theirs[n].shape) for n, t in made.vae.state_dict().items()}
    torch.save(vae, folder / ("Wan2.2_VAE.pth" if kind.channels == 48 else "Wan2.1_VAE.pth"))
    if kind.pictures:
        torch.save(_clip(made.image_encoder), folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    (folder / "google").mkdir()
    made.tokenizer.save_pretrained(folder / "google" / "umt5-xxl")
    return folder


def renamed(names: Names, weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The diffusers folder's names -> those of the original release."""
    table = {
        row[Layout.DIFFUSERS].format(i=i): row[Layout.ORIGINAL].format(i=i) for row in names.rows for i in range(depth)
    }
    found = {}
    for name, tensor in weights.items():
        layer, _, parameter = name.rpartition(".")
        if name in table:
            found[table[name]] = tensor
        elif layer in table:
            found[f"{table[layer]}.{parameter}"] = tensor
    return found


def _clip(model: Any) -> dict[str, Tensor]:
    """Queries, keys and values in one matrix, a text half that nothing reads, and half precision."""
    weights = {n.removeprefix("vision_model."): t for n, t in model.state_dict().items()}
    found: dict[str, Tensor] = {"log_scale": torch.ones(()), "textual.token_embedding.weight": torch.ones(3, 4)}
    for name, tensor in renamed(IMAGE_ENCODER, weights, 3).items():
        found[name.partition("[")[0] + name.partition("]")[2]] = tensor
    for i in range(3):
        for parameter in ("weight", "bias"):
            parts = [weights[f"encoder.layers.{i}.self_attn.{p}_proj.{parameter}"] for p in "qkv"]
            found[f"visual.transformer.{i}.attn.to_qkv.{parameter}"] = torch.cat(parts)
    for name in ("visual.cls_embedding", "visual.pos_embedding"):
        found[name] = found[name].reshape(1, -1, CLIP_WIDTH)
    found["visual.post_norm.weight"] = weights["post_layernorm.weight"]
    found["visual.post_norm.bias"] = weights["post_layernorm.bias"]
    return found


def rewrite(folder: Path, changed: Mapping[str, Tensor | None]) -> None:
    """A part's safetensors in one file, with some tensors changed, or lost where they are None."""
    weights: dict[str, Tensor | None] = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    for path in folder.glob("*.index.json"):
        path.unlink()
    weights |= changed
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / "model.safetensors")


def copy_without(folder: Path, target: Path, *names: str) -> Path:
    """A copy of a published folder that lacks some files."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*names)))
