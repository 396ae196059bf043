"""What a compiled component is expected to take: memory, the size of its plan, the time to build it.

Flows in: a manifest, a component's name, its profiles. Flows out: bytes and seconds, all estimates: before a plan is
built only its weights are known. Needs no torch.

    buffers     = 2 bytes * values of all inputs and outputs
    activations = 2 bytes * values alive at the widest moment inside
    plan        = weights + profiles * blocks * 1.5 MB
    build time  = profiles * blocks * 1.5 s

Buffers and activations are those of the greatest extents of the profiles. What is expected has the form of what is
measured later, a Footprint, so that the same plan of memory serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tubelet.runtime.bundle import Component, Extents, sizes
from tubelet.runtime.plans import PRECISIONS
from tubelet.runtime.profiles import Profile
from tubelet.runtime.residency import PARTS, RESERVED, Footprint
from tubelet.runtime.spec import ModelSpec

from .errors import CompilerError

VALUE_BYTES = 2  # activations are fp16 or bf16 whatever the weights are
PROFILE_BYTES = 1_500_000  # a block a profile; 1.3 to 1.6 MB with TensorRT-RTX 1.7 and a denoiser's blocks
PROFILE_SECONDS = 1.5  # a block a profile, likewise


@dataclass(frozen=True)
class Kind:
    """How many blocks a component has, and how many values are alive at its widest moment."""

    blocks: Callable[[ModelSpec], int]
    inside: Callable[[ModelSpec, Extents], int]


def plan_growth(spec: ModelSpec, component: str, profiles: int) -> int:
    """Bytes that this many profiles add to a component's weights."""
    return profiles * KINDS[component].blocks(spec) * PROFILE_BYTES


def build_seconds(spec: ModelSpec, component: str, profiles: int) -> float:
    return profiles * KINDS[component].blocks(spec) * PROFILE_SECONDS


def weight_bytes(component: Component, precision: str) -> int:
    return math.ceil(component.parameters * PRECISIONS[precision])


def footprint(
    spec: ModelSpec, name: str, component: Component, profiles: Sequence[Profile], precision: str
) -> Footprint:
    """What an engine is expected to take on its device, at the greatest sizes of these profiles."""
    ports = (*component.inputs.values(), *component.outputs.values())
    most = [{extent: values.max for extent, values in profile.items()} for profile in profiles]
    return Footprint(
        weights=weight_bytes(component, precision),
        buffers=VALUE_BYTES * max(sum(math.prod(sizes(port, extents)) for port in ports) for extents in most),
        scratch=VALUE_BYTES * max(KINDS[name].inside(spec, extents) for extents in most),
    )


def activation_budget(components: Mapping[str, Component], name: str, precision: str, memory_gb: float) -> int:
    """Bytes that a component's activations may take on a GPU of this memory: all that the weights of its part leave.

    Raises CompilerError where they leave nothing.
    """
    part, names = next((part, names) for part, names in PARTS.items() if name in names)
    weights = sum(weight_bytes(components[each], precision) for each in names if each in components)
    budget = round(memory_gb * 10**9) - RESERVED - weights
    if budget <= 0:
        raise CompilerError(
            f"a GPU of {memory_gb:g} GB cannot hold the {part}: its weights take {weights / 10**9:.1f} GB, and "
            f"{RESERVED / 10**9:.1f} GB are kept for other things"
        )
    return budget


def _transformer(width: int, hidden: int) -> int:
    """Values a token: residual, normed input, q, k, v, attention's output; or the first two and the FFN's hidden."""
    return max(6 * width, 2 * width + hidden)


def _text_encoder(spec: ModelSpec, extents: Extents) -> int:
    text = spec.text_encoder
    a_token = max(2 * text.width + 4 * text.heads * text.head_size, 2 * text.width + 2 * text.ffn_width)
    scores = text.heads * extents["L"]  # its position bias is added to every score
    return extents["B"] * extents["L"] * (a_token + scores)


def _image_encoder(spec: ModelSpec, extents: Extents) -> int:
    assert spec.image_encoder is not None
    image = spec.image_encoder
    return extents["B"] * image.tokens * _transformer(image.width, image.ffn_width)


def _image_conditioner(spec: ModelSpec, extents: Extents) -> int:
    assert spec.denoiser.image is not None
    return 3 * extents["B"] * spec.denoiser.image.tokens * spec.denoiser.width


def _denoiser(spec: ModelSpec, extents: Extents) -> int:
    return extents["B"] * extents["N"] * _transformer(spec.denoiser.width, spec.denoiser.ffn_width)


def _vae(spec: ModelSpec, extents: Extents) -> int:
    """A block at the finest resolution: residual, normed input, and that with its past."""
    vae = spec.vae
    frames = extents["t"] * vae.temporal_factor if "t" in extents else 1
    scale = vae.spatial_factor // vae.pixel_patch
    return 3 * max(vae.widths[:2]) * frames * extents["B"] * extents["h"] * scale * extents["w"] * scale


def _captioner(spec: ModelSpec, extents: Extents) -> int:
    assert spec.captioner is not None
    return extents["B"] * extents["N"] * _transformer(spec.captioner.width, spec.captioner.ffn_width)


def _word(spec: ModelSpec, extents: Extents) -> int:
    assert spec.captioner is not None
    return extents["B"] * _transformer(spec.captioner.width, spec.captioner.ffn_width)


_DECODER = Kind(lambda spec: spec.vae.decoder_depth, _vae)
_ENCODER = Kind(lambda spec: spec.vae.encoder_depth, _vae)
_CONDITIONER = Kind(lambda spec: spec.denoiser.depth, lambda spec, e: 3 * e["B"] * e["L"] * spec.denoiser.width)
_IMAGE_CONDITIONER = Kind(lambda spec: spec.denoiser.depth, _image_conditioner)
_DENOISER = Kind(lambda spec: spec.denoiser.depth, _denoiser)

KINDS: Mapping[str, Kind] = {
    "text_encoder": Kind(lambda spec: spec.text_encoder.depth, _text_encoder),
    "image_encoder": Kind(lambda spec: spec.image_encoder.depth if spec.image_encoder else 0, _image_encoder),
    "image_conditioner": _IMAGE_CONDITIONER,
    "image_conditioner_low": _IMAGE_CONDITIONER,
    "conditioner": _CONDITIONER,
    "conditioner_low": _CONDITIONER,
    "denoiser": _DENOISER,
    "denoiser_low": _DENOISER,
    "vae_decoder_first": _DECODER,
    "vae_decoder": _DECODER,
    "vae_encoder_first": _ENCODER,
    "vae_encoder": _ENCODER,
    "captioner_memory": Kind(lambda spec: spec.captioner.encoder_depth if spec.captioner else 0, _captioner),
    "captioner": Kind(lambda spec: spec.captioner.decoder_depth if spec.captioner else 0, _word),
}
