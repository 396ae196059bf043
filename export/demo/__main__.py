"""Makes the embedded model: `python -m tubelet.export.demo FOLDER`.

Stages, each skipped when its result is in FOLDER: the VAE, sharpened, the pool of latents, the denoiser, the
captioner, the decoder three times more, the checkpoint. An interrupted training goes on from its last save; a changed
recipe needs a new FOLDER. Then `tubelet export FOLDER/checkpoint -o BUNDLE` makes the bundle.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tubelet.runtime.bundle import TOKENIZER, WEIGHTS
from tubelet.runtime.spec import ModelSpec

from ..checkpoint import SPEC
from . import train_captioner, train_denoiser, train_vae
from .recipe import model_spec, tokenizer, vae_spec


def make(folder: Path) -> None:
    """Runs the stages that are left."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "vae_sampled.pt").exists():
        train_vae.train(vae_spec(), folder)
    if not (folder / "vae.pt").exists():
        train_vae.sharpen(vae_spec(), folder)
    vae = torch.load(folder / "vae.pt", weights_only=True)
    spec = model_spec(vae["latent_mean"].flatten().tolist(), vae["latent_std"].flatten().tolist())
    train_denoiser.encode_pool(spec, folder)
    if not (folder / "denoiser.pt").exists():
        train_denoiser.train(spec, folder)
    if not (folder / "captioner.pt").exists():
        train_captioner.train(spec, folder)
    if not (folder / "vae_refined.pt").exists():
        train_vae.refine_decoder(spec.vae, folder)
    if not (folder / "vae_settled.pt").exists():
        train_vae.settle_decoder(spec.vae, folder)
    if not (folder / "remade.pt").exists():
        train_denoiser.remake(spec, folder)
    if not (folder / "vae_adapted.pt").exists():
        train_vae.adapt_decoder(spec.vae, folder)
    write_checkpoint(spec, folder)


def write_checkpoint(spec: ModelSpec, folder: Path) -> None:
    """Joins all trainings' weights, in fp16, to the checkpoint that `tubelet export` reads."""
    weights = torch.load(folder / "denoiser.pt", weights_only=True)
    vae = torch.load(folder / "vae_adapted.pt", weights_only=True)
    weights |= torch.load(folder / "captioner.pt", weights_only=True)
    weights |= {f"vae.{name}": tensor for name, tensor in vae.items()}
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, checkpoint / WEIGHTS)
    (checkpoint / SPEC).write_text(json.dumps(spec.to_json(), indent=1) + "\n")
    tokenizer().save(str(checkpoint / TOKENIZER))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
