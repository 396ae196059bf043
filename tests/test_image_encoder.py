"""The image encoder and what goes into it against transformers' CLIP, whose last layer but one the denoiser reads.

    pytest tests/test_image_encoder.py

1e-5 relative of tokens: float32, in another order of summation where torch chooses another kernel. 1e-6 of a prepared
picture, whose values are below 3: its bytes must be the same, and normalising them may differ by a rounding or two.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from published import randomise, relative

from tubelet.export.image_encoder import ImageEncoder
from tubelet.export.names import Layout
from tubelet.export.wan_names import IMAGE_ENCODER
from tubelet.runtime.image import prepare_pictures
from tubelet.runtime.spec import ImageEncoderSpec

SMALL = ImageEncoderSpec(size=42, patch=14, width=48, depth=3, heads=3, ffn_width=80)
REAL = ImageEncoderSpec(size=224, patch=14, width=1280, depth=2, heads=16, ffn_width=5120)  # CLIP ViT-H, two layers


@pytest.mark.parametrize(
    ("spec", "batch"),
    [
        (SMALL, 1),
        (SMALL, 2),
        (SMALL, 5),
        (dataclasses.replace(SMALL, size=64, patch=16, depth=1, heads=4), 3),
        (REAL, 1),
    ],
    ids=lambda value: f"{value.width}x{value.depth}" if isinstance(value, ImageEncoderSpec) else str(value),
)
@torch.no_grad()
def test_tokens_are_those_of_the_last_layer_but_one(spec: ImageEncoderSpec, batch: int) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=spec.width, intermediate_size=spec.ffn_width, num_hidden_layers=spec.depth + 1,
        num_attention_heads=spec.heads, image_size=spec.size, patch_size=spec.patch, hidden_act="gelu",
    )  # fmt: skip
    theirs, ours = randomise(CLIPVisionModel(config), 0), ImageEncoder(spec)
    stored = {name.removeprefix("vision_model."): tensor for name, tensor in theirs.state_dict().items()}
    names = {f"image_encoder.{name}": name for name in ours.state_dict()}
    sources = IMAGE_ENCODER.sources(names, Layout.DIFFUSERS, spec.depth)
    ours.load_state_dict({names[name]: stored[source] for name, source in sources.items()}, assign=True)
    pixels = torch.randn(batch, 3, spec.size, spec.size, generator=torch.Generator().manual_seed(1))

    wanted = theirs(pixels, output_hidden_states=True).hidden_states[-2]

    assert relative(ours(pixels), wanted) < 1e-5


@given(sides=st.tuples(*[st.integers(16, 300)] * 2), size=st.sampled_from([14, 28, 224]), count=st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_pictures_are_prepared_as_transformers_does(sides: tuple[int, int], size: int, count: int) -> None:
    from transformers import CLIPImageProcessorPil

    pictures = np.random.default_rng(0).integers(0, 256, (count, *sides, 3), np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    wanted = processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="np")["pixel_values"]

    np.testing.assert_allclose(prepare_pictures(pictures, size), wanted, rtol=0, atol=1e-6)
