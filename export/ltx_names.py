"""What LTX-Video's published files call our parameters: one row a layer (see `names.py`), and the VAE's by their parts.

The column of the original release serves its adapters; its checkpoint of one file is not read.
"""

from __future__ import annotations

from collections.abc import Iterable

from . import wan_names
from .names import Names

BLOCK = "transformer_blocks.{i}"
TRANSFORMER = Names(
    (
        ("denoiser.embed", "proj_in", "patchify_proj"),
        (
            "denoiser.time_embedding.0",
            "time_embed.emb.timestep_embedder.linear_1",
            "adaln_single.emb.timestep_embedder.linear_1",
        ),
        (
            "denoiser.time_embedding.2",
            "time_embed.emb.timestep_embedder.linear_2",
            "adaln_single.emb.timestep_embedder.linear_2",
        ),
        ("denoiser.time_projection.1", "time_embed.linear", "adaln_single.linear"),
        ("denoiser.offset_out", "scale_shift_table", "scale_shift_table"),
        ("denoiser.project_out", "proj_out", "proj_out"),
        ("denoiser.blocks.{i}.offset", f"{BLOCK}.scale_shift_table", f"{BLOCK}.scale_shift_table"),
        ("denoiser.blocks.{i}.self_attention.q", f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_q"),
        ("denoiser.blocks.{i}.self_attention.k", f"{BLOCK}.attn1.to_k", f"{BLOCK}.attn1.to_k"),
        ("denoiser.blocks.{i}.self_attention.v", f"{BLOCK}.attn1.to_v", f"{BLOCK}.attn1.to_v"),
        ("denoiser.blocks.{i}.self_attention.o", f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.attn1.to_out.0"),
        ("denoiser.blocks.{i}.self_attention.norm_q", f"{BLOCK}.attn1.norm_q", f"{BLOCK}.attn1.q_norm"),
        ("denoiser.blocks.{i}.self_attention.norm_k", f"{BLOCK}.attn1.norm_k", f"{BLOCK}.attn1.k_norm"),
        ("denoiser.blocks.{i}.cross_attention.q", f"{BLOCK}.attn2.to_q", f"{BLOCK}.attn2.to_q"),
        ("denoiser.blocks.{i}.cross_attention.o", f"{BLOCK}.attn2.to_out.0", f"{BLOCK}.attn2.to_out.0"),
        ("denoiser.blocks.{i}.cross_attention.norm_q", f"{BLOCK}.attn2.norm_q", f"{BLOCK}.attn2.q_norm"),
        ("denoiser.blocks.{i}.ffn.0", f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.0.proj"),
        ("denoiser.blocks.{i}.ffn.2", f"{BLOCK}.ff.net.2", f"{BLOCK}.ff.net.2"),
        ("conditioner.embed.0", "caption_projection.linear_1", "caption_projection.linear_1"),
        ("conditioner.embed.2", "caption_projection.linear_2", "caption_projection.linear_2"),
        ("conditioner.k.{i}", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_k"),
        ("conditioner.v.{i}", f"{BLOCK}.attn2.to_v", f"{BLOCK}.attn2.to_v"),
        ("conditioner.norm_k.{i}", f"{BLOCK}.attn2.norm_k", f"{BLOCK}.attn2.k_norm"),
    )
)
SHARED_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
TEXT_ENCODER = Names(  # T5 v1.1 is UMT5 with one table of biases, which all layers read
    tuple(
        (ours, SHARED_BIAS if ours.endswith(".bias.weight.weight") else theirs, original)
        for ours, theirs, original in wan_names.TEXT_ENCODER.rows
    ),
    wan_names.TEXT_ENCODER.unused,
)
VAE = {  # parts of our names, replaced in this order
    "encoder.levels.": "encoder.down_blocks.",
    "decoder.levels.": "decoder.up_blocks.",
    ".middle.": ".mid_block.resnets.",
    ".blocks.": ".resnets.",
    ".conv1.": ".conv1.conv.",
    ".conv2.": ".conv2.conv.",
    "coder.conv_in.": "coder.conv_in.conv.",
    "coder.conv_out.": "coder.conv_out.conv.",
    ".down.": ".downsamplers.0.conv.",
    ".up.conv.": ".upsamplers.0.conv.conv.",
    ".shortcut.0.": ".norm3.",
    ".shortcut.1.": ".conv_shortcut.conv.",
    "latent_": "latents_",
}
CHANGES = {"encoder": ".conv_out.", "decoder": ".conv_in."}  # the block that changes the number of channels


def vae_sources(names: Iterable[str]) -> dict[str, str]:
    """Our parameters of the VAE -> theirs."""
    found = {}
    for name in names:
        theirs = name.removeprefix("vae.")
        theirs = theirs.replace(".change.", CHANGES.get(theirs.partition(".")[0], ""))
        for ours, part in VAE.items():
            theirs = theirs.replace(ours, part)
        found[name] = theirs
    return found
