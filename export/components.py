"""The graph contract: for each component its module, its inputs and outputs, and which extents vary.

Flows in: a ModelSpec and its modules (on the meta device they have shapes and no memory). Flows out: one Component a
graph. `trace.py` turns them into ONNX, `parity.py` runs them beside the compiled graphs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tubelet.runtime.bundle import Extents, Shape, sizes
from tubelet.runtime.spec import CaptionerSpec, DenoiserSpec, ImageEncoderSpec, ModelSpec, VaeSpec

from .captioner import Captioner, CaptionerMemory
from .dit import Conditioner, Denoiser, ImageConditioner
from .image_encoder import ImageEncoder
from .text_encoder import TextEncoder
from .vae import Vae


@dataclass(frozen=True)
class Port:
    """A graph input or output."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    below: int = 0  # the port holds whole numbers from 0 up to this; 0: any number

    def example(self, extents: Extents) -> Tensor:
        """Standard normal values, or random whole numbers in the port's range."""
        shape = sizes(self.shape, extents)
        return torch.randint(0, self.below, shape).to(self.dtype) if self.below else torch.randn(shape)


@dataclass(frozen=True)
class Component:
    name: str
    weights: str  # what precedes the name of its parameters in the checkpoint
    module: nn.Module  # takes the inputs by name or in order, returns a tensor or a tuple
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    shapes: tuple[Extents, ...]  # on which parity is measured

    @property
    def by_name(self) -> bool:
        """Whether `forward` has a parameter of its own for every input."""
        return set(self.inputs) <= set(inspect.signature(self.module.forward).parameters)

    def run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The module's outputs."""
        results = self.module(**inputs) if self.by_name else self.module(*inputs.values())
        return (results,) if isinstance(results, Tensor) else tuple(results)


def build_modules(spec: ModelSpec) -> dict[str, nn.Module]:
    """Every module that holds parameters, by its prefix in the checkpoint."""
    modules: dict[str, nn.Module] = {
        "text_encoder": TextEncoder(spec.text_encoder),
        "vae": Vae(spec.vae),
    }
    if spec.image_encoder is not None:
        modules["image_encoder"] = ImageEncoder(spec.image_encoder)
    for expert in spec.experts:
        modules[f"conditioner{expert}"] = Conditioner(spec.denoiser)
        modules[f"denoiser{expert}"] = Denoiser(spec.denoiser)
        if spec.denoiser.image is not None:
            modules[f"image_conditioner{expert}"] = ImageConditioner(spec.denoiser, spec.denoiser.image)
    if spec.captioner is not None:
        modules |= {"captioner_memory": CaptionerMemory(spec.captioner), "captioner": Captioner(spec.captioner)}
    return {name: module.eval() for name, module in modules.items()}


def components(spec: ModelSpec, modules: Mapping[str, nn.Module]) -> list[Component]:
    """All graphs of a model, in the order in which a request meets them."""
    length = spec.text_encoder.length
    ids = Port(("B", "L"), torch.int64, spec.text_encoder.vocabulary)
    mask = Port(("B", "L"), torch.int64, 2)
    texts = tuple({"B": b, "L": n} for b, n in ((2, length), (1, length), (3, 5)))
    embeddings = Port(("B", "L", spec.text_encoder.width))
    return [
        Component(
            "text_encoder",
            "text_encoder.",
            modules["text_encoder"],
            {"ids": ids, "mask": mask},
            {"embeddings": embeddings},
            texts,
        ),
        *(_image_encoder(spec.image_encoder, modules) if spec.image_encoder is not None else ()),
        *(each for expert in spec.experts for each in _expert(spec.denoiser, length, modules, expert)),
        *vae_components(spec.vae, modules["vae"]),
        *(_captioner(spec.captioner, modules) if spec.captioner is not None else ()),
    ]


def _image_encoder(spec: ImageEncoderSpec, modules: Mapping[str, nn.Module]) -> list[Component]:
    return [
        Component(
            "image_encoder",
            "image_encoder.",
            modules["image_encoder"],
            {"pixels": Port(("B", 3, spec.size, spec.size))},
            {"image_embeddings": Port(("B", spec.tokens, spec.width))},
            ({"B": 1}, {"B": 2}),
        )
    ]


def _expert(spec: DenoiserSpec, length: int, modules: Mapping[str, nn.Module], expert: str) -> list[Component]:
    """A denoiser and what makes its keys and values, of text and of pictures."""

    def component(name: str, inputs: dict[str, Port], outputs: dict[str, Port], *shapes: Extents) -> Component:
        name += expert
        return Component(name, f"{name}.", modules[name], inputs, outputs, shapes)

    cross = _keys(spec, "L")
    texts = [{"B": b, "L": n} for b, n in ((2, length), (1, length), (3, 5))]
    videos = [{"B": b, "N": n, "L": length} for b, n in ((2, 36), (1, 9), (2, 144), (1, 325))]
    embeddings, velocity = Port(("B", "L", spec.text_width)), Port(("B", "N", spec.token_values))
    made = [component("conditioner", {"embeddings": embeddings}, {"cross_k": cross, "cross_v": cross}, *texts)]
    if spec.image is not None:
        keys, shown = _keys(spec, spec.image.tokens), Port(("B", spec.image.tokens, spec.image.width))
        outputs = {"image_k": keys, "image_v": keys}
        made.append(component("image_conditioner", {"image_embeddings": shown}, outputs, {"B": 1}, {"B": 2}))
    return [*made, component("denoiser", _denoiser_inputs(spec, cross), {"velocity": velocity}, *videos)]


def _keys(spec: DenoiserSpec, length: int | str) -> Port:
    return Port((spec.depth, "B", spec.heads, length, spec.head_size))


def _denoiser_inputs(spec: DenoiserSpec, cross: Port) -> dict[str, Port]:
    rope = Port(spec.rope_shape)
    inputs = {
        "tokens": Port(("B", "N", spec.token_inputs)),
        "time_features": Port(("B", 2, spec.time_features)),
        "rope_cos": rope,
        "rope_sin": rope,
        "cross_k": cross,
        "cross_v": cross,
    }
    if spec.two_levels:
        inputs["known"] = Port(("B", "N"), below=2)
    if spec.image is not None:
        inputs["image_k"] = inputs["image_v"] = _keys(spec, spec.image.tokens)
    if spec.text_mask:
        inputs["text_mask"] = Port(("B", "L"), below=2)
    return inputs


def _captioner(spec: CaptionerSpec, modules: Mapping[str, nn.Module]) -> list[Component]:
    """A clip as keys and values, once; then one word of every beam at a time, with a cache of the words before."""
    cross = Port((spec.decoder_depth, "B", spec.heads, "N", spec.head_size))
    cache = Port((spec.decoder_depth, "B", spec.heads, spec.length, spec.head_size))
    clips = tuple({"B": b, "N": n} for b, n in ((1, 36), (4, 9), (2, 325)))
    word = {
        "ids": Port(("B", 1), torch.int64, spec.vocabulary),
        "position": Port((1,), torch.int64, spec.length),
    }
    return [
        Component(
            "captioner_memory",
            "captioner_memory.",
            modules["captioner_memory"],
            {"tokens": Port(("B", "N", spec.token_inputs))},
            {"cross_k": cross, "cross_v": cross},
            clips,
        ),
        Component(
            "captioner",
            "captioner.",
            modules["captioner"],
            word | {"cross_k": cross, "cross_v": cross, "past_k": cache, "past_v": cache},
            {"logits": Port(("B", spec.vocabulary)), "next_k": cache, "next_v": cache},
            clips,
        ),
    ]


class VaeStep(nn.Module):
    """`Vae.encode` or `Vae.decode` on one chunk: x and the caches (none for a first frame) -> result, next caches."""

    def __init__(self, vae: nn.Module, method: str):
        super().__init__()
        self.vae, self.method = vae, method

    def forward(self, x: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        result, following = getattr(self.vae, self.method)(x, caches or None)
        return result, *following


CHUNKS = tuple({"B": b, "t": t, "h": h, "w": w} for b, t, h, w in ((1, 2, 6, 8), (1, 1, 8, 6), (2, 4, 4, 4)))


def vae_components(spec: VaeSpec, vae: nn.Module) -> list[Component]:
    """Both halves, each as a clip's first frame and the chunks after it; one graph for what does not stream."""
    scale, step = spec.spatial_factor, spec.temporal_factor
    latents = Port(("B", spec.latent_channels, "t", "h", "w"))
    pixels = Port(("B", 3, f"{step}*t", f"{scale}*h", f"{scale}*w"))
    decoder = VaeStep(vae, "decode")
    if spec.streams:
        decoders = _vae_half("vae_decoder", decoder, ("latents", latents), ("pixels", pixels))
    else:
        clip = Port(("B", 3, f"{1 - step}+{step}*t", *pixels.shape[3:]))
        decoders = [Component("vae_decoder", "", decoder, {"latents": latents}, {"pixels": clip}, CHUNKS)]
    return [*decoders, *_vae_half("vae_encoder", VaeStep(vae, "encode"), ("pixels", pixels), ("latents", latents))]


def _vae_half(name: str, step: nn.Module, source: tuple[str, Port], result: tuple[str, Port]) -> list[Component]:
    """One half of the VAE as two graphs: a clip's first frame, and the chunks after it with their caches."""
    first, first_result = ({port: _one_frame(shape)} for port, shape in (source, result))
    with torch.no_grad():
        one_frame = sizes(first[source[0]].shape, {"B": 1, "h": 1, "w": 1})
        probe = torch.zeros(one_frame, device=next(step.parameters()).device)
        shapes = [cache.shape for cache in step(probe)[1:]]
    ports = [Port(("B", c, t, _times(h, "h"), _times(w, "w"))) for _, c, t, h, w in shapes]
    caches = {f"cache_{i:02}": port for i, port in enumerate(ports)}
    following = {f"next_{cache}": port for cache, port in caches.items()}
    frames = tuple({axis: size for axis, size in each.items() if axis != "t"} for each in CHUNKS)
    return [
        Component(f"{name}_first", "", step, first, first_result | following, frames),
        Component(name, "", step, dict([source]) | caches, dict([result]) | following, CHUNKS),
    ]


def _one_frame(port: Port) -> Port:
    """The same tensor for a clip's first frame."""
    b, c, _, h, w = port.shape
    return Port((b, c, 1, h, w))


def _times(factor: int, name: str) -> str:
    return name if factor == 1 else f"{factor}*{name}"
