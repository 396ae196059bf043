"""What Wan's published files call our parameters: one row a layer, in both layouts (see `names.py`)."""

from __future__ import annotations

from .names import Names

EMBEDDERS = "condition_embedder"
TRANSFORMER = Names(
    (
        ("denoiser.embed", "patch_embedding", "patch_embedding"),
        ("denoiser.time_embedding.0", f"{EMBEDDERS}.time_embedder.linear_1", "time_embedding.0"),
        ("denoiser.time_embedding.2", f"{EMBEDDERS}.time_embedder.linear_2", "time_embedding.2"),
        ("denoiser.time_projection.1", f"{EMBEDDERS}.time_proj", "time_projection.1"),
        ("denoiser.offset_out", "scale_shift_table", "head.modulation"),
        ("denoiser.project_out", "proj_out", "head.head"),
        ("denoiser.blocks.{i}.offset", "blocks.{i}.scale_shift_table", "blocks.{i}.modulation"),
        ("denoiser.blocks.{i}.self_attention.q", "blocks.{i}.attn1.to_q", "blocks.{i}.self_attn.q"),
        ("denoiser.blocks.{i}.self_attention.k", "blocks.{i}.attn1.to_k", "blocks.{i}.self_attn.k"),
        ("denoiser.blocks.{i}.self_attention.v", "blocks.{i}.attn1.to_v", "blocks.{i}.self_attn.v"),
        ("denoiser.blocks.{i}.self_attention.o", "blocks.{i}.attn1.to_out.0", "blocks.{i}.self_attn.o"),
        ("denoiser.blocks.{i}.self_attention.norm_q", "blocks.{i}.attn1.norm_q", "blocks.{i}.self_attn.norm_q"),
        ("denoiser.blocks.{i}.self_attention.norm_k", "blocks.{i}.attn1.norm_k", "blocks.{i}.self_attn.norm_k"),
        ("denoiser.blocks.{i}.norm2", "blocks.{i}.norm2", "blocks.{i}.norm3"),
        ("denoiser.blocks.{i}.cross_attention.q", "blocks.{i}.attn2.to_q", "blocks.{i}.cross_attn.q"),
        ("denoiser.blocks.{i}.cross_attention.o", "blocks.{i}.attn2.to_out.0", "blocks.{i}.cross_attn.o"),
        ("denoiser.blocks.{i}.cross_attention.norm_q", "blocks.{i}.attn2.norm_q", "blocks.{i}.cross_attn.norm_q"),
        ("denoiser.blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj", "blocks.{i}.ffn.0"),
        ("denoiser.blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2", "blocks.{i}.ffn.2"),
        ("conditioner.embed.0", f"{EMBEDDERS}.text_embedder.linear_1", "text_embedding.0"),
        ("conditioner.embed.2", f"{EMBEDDERS}.text_embedder.linear_2", "text_embedding.2"),
        ("conditioner.k.{i}", "blocks.{i}.attn2.to_k", "blocks.{i}.cross_attn.k"),
        ("conditioner.v.{i}", "blocks.{i}.attn2.to_v", "blocks.{i}.cross_attn.v"),
        ("conditioner.norm_k.{i}", "blocks.{i}.attn2.norm_k", "blocks.{i}.cross_attn.norm_k"),
        ("image_conditioner.positions", f"{EMBEDDERS}.image_embedder.pos_embed", "img_emb.emb_pos"),
        ("image_conditioner.embed.0", f"{EMBEDDERS}.image_embedder.norm1", "img_emb.proj.0"),
        ("image_conditioner.embed.1", f"{EMBEDDERS}.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        ("image_conditioner.embed.3", f"{EMBEDDERS}.image_embedder.ff.net.2", "img_emb.proj.3"),
        ("image_conditioner.embed.4", f"{EMBEDDERS}.image_embedder.norm2", "img_emb.proj.4"),
        ("image_conditioner.k.{i}", "blocks.{i}.attn2.add_k_proj", "blocks.{i}.cross_attn.k_img"),
        ("image_conditioner.v.{i}", "blocks.{i}.attn2.add_v_proj", "blocks.{i}.cross_attn.v_img"),
        ("image_conditioner.norm_k.{i}", "blocks.{i}.attn2.norm_added_k", "blocks.{i}.cross_attn.norm_k_img"),
    )
)
T5_BLOCK = "encoder.block.{i}.layer"
TEXT_ENCODER = Names(
    (
        ("text_encoder.embedding", "shared", "token_embedding"),
        ("text_encoder.norm", "encoder.final_layer_norm", "norm"),
        ("text_encoder.layers.{i}.norm1", f"{T5_BLOCK}.0.layer_norm", "blocks.{i}.norm1"),
        ("text_encoder.layers.{i}.q", f"{T5_BLOCK}.0.SelfAttention.q", "blocks.{i}.attn.q"),
        ("text_encoder.layers.{i}.k", f"{T5_BLOCK}.0.SelfAttention.k", "blocks.{i}.attn.k"),
        ("text_encoder.layers.{i}.v", f"{T5_BLOCK}.0.SelfAttention.v", "blocks.{i}.attn.v"),
        ("text_encoder.layers.{i}.o", f"{T5_BLOCK}.0.SelfAttention.o", "blocks.{i}.attn.o"),
        (
            "text_encoder.layers.{i}.bias.weight.weight",
            f"{T5_BLOCK}.0.SelfAttention.relative_attention_bias.weight",
            "blocks.{i}.pos_embedding.embedding.weight",
        ),
        ("text_encoder.layers.{i}.norm2", f"{T5_BLOCK}.1.layer_norm", "blocks.{i}.norm2"),
        ("text_encoder.layers.{i}.gate", f"{T5_BLOCK}.1.DenseReluDense.wi_0", "blocks.{i}.ffn.gate.0"),
        ("text_encoder.layers.{i}.up", f"{T5_BLOCK}.1.DenseReluDense.wi_1", "blocks.{i}.ffn.fc1"),
        ("text_encoder.layers.{i}.down", f"{T5_BLOCK}.1.DenseReluDense.wo", "blocks.{i}.ffn.fc2"),
    ),
    unused=("encoder.embed_tokens.weight", ""),  # the shared embedding again
)
CLIP_LAYER = "encoder.layers.{i}"
VISUAL = "visual.transformer.{i}"
IMAGE_ENCODER = Names(
    (
        ("image_encoder.patches", "embeddings.patch_embedding", "visual.patch_embedding"),
        ("image_encoder.first", "embeddings.class_embedding", "visual.cls_embedding"),
        ("image_encoder.positions", "embeddings.position_embedding.weight", "visual.pos_embedding"),
        ("image_encoder.norm", "pre_layrnorm", "visual.pre_norm"),
        ("image_encoder.layers.{i}.norm1", f"{CLIP_LAYER}.layer_norm1", f"{VISUAL}.norm1"),
        ("image_encoder.layers.{i}.q", f"{CLIP_LAYER}.self_attn.q_proj", f"{VISUAL}.attn.to_qkv[0/3]"),
        ("image_encoder.layers.{i}.k", f"{CLIP_LAYER}.self_attn.k_proj", f"{VISUAL}.attn.to_qkv[1/3]"),
        ("image_encoder.layers.{i}.v", f"{CLIP_LAYER}.self_attn.v_proj", f"{VISUAL}.attn.to_qkv[2/3]"),
        ("image_encoder.layers.{i}.o", f"{CLIP_LAYER}.self_attn.out_proj", f"{VISUAL}.attn.proj"),
        ("image_encoder.layers.{i}.norm2", f"{CLIP_LAYER}.layer_norm2", f"{VISUAL}.norm2"),
        ("image_encoder.layers.{i}.ffn.0", f"{CLIP_LAYER}.mlp.fc1", f"{VISUAL}.mlp.0"),
        ("image_encoder.layers.{i}.ffn.2", f"{CLIP_LAYER}.mlp.fc2", f"{VISUAL}.mlp.2"),
    ),
    # the last layer, which the denoiser does not read, and what is after it; the text half
    unused=(
        f"{CLIP_LAYER}. post_layernorm. visual_projection. embeddings.position_ids",
        f"{VISUAL}. visual.post_norm. visual.head textual. log_scale",
    ),
)
