"""Which engines are in a GPU's memory at the same time, decided before any is loaded.

Flows in: what each engine takes, and how much memory is free. Flows out: groups that are loaded in turn, as few as fit,
and a sentence that says so. All engines share one scratch memory; weights and static buffers add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .bundle import Component, sizes
from .dtypes import DTYPES
from .errors import UserError
from .memory import MemoryInfo
from .plans import PlanRecord

RESERVED = 1 << 29  # bytes for contexts, the code of kernels and the sampler's state
PARTS = {
    "text encoder": ("text_encoder", "conditioner", "conditioner_low"),
    "image encoder": ("image_encoder", "image_conditioner"),
    "denoiser": ("denoiser",),
    "denoiser for low noise": ("denoiser_low",),
    "VAE": ("vae_decoder_first", "vae_decoder", "vae_encoder_first", "vae_encoder"),
    "captioner": ("captioner_memory", "captioner"),
}


@dataclass(frozen=True)
class Footprint:
    """Bytes of one engine on the device."""

    weights: int
    buffers: int  # inputs and outputs
    scratch: int  # while it runs


@dataclass(frozen=True)
class Residency:
    groups: tuple[tuple[str, ...], ...]  # of components
    sentence: str

    def beside(self, component: str) -> tuple[str, ...]:
        """The components that may be loaded with this one."""
        return next(group for group in self.groups if component in group)


def footprint(component: Component, record: PlanRecord) -> Footprint:
    """What a plan takes at the greatest sizes of its profiles."""
    ports = {**component.inputs, **component.outputs}
    buffers = []
    for profile in record.profiles:
        most = {name: extent.max for name, extent in profile.items()}
        shapes = ((DTYPES[record.dtypes[name]].itemsize, sizes(port, most)) for name, port in ports.items())
        buffers.append(sum(itemsize * math.prod(shape) for itemsize, shape in shapes))
    return Footprint(record.measured.weights_bytes, max(buffers), max(record.measured.activation_bytes))


def plan_residency(footprints: Mapping[str, Footprint], memory: MemoryInfo, device: str) -> Residency:
    """The fewest groups that fit into the free memory: all at once, without the text encoder, or part by part.

    Raises UserError when a part does not fit by itself.
    """
    parts = {
        part: tuple(name for name in names if name in footprints)
        for part, names in PARTS.items()
        if any(name in footprints for name in names)
    }
    text, everything = parts["text encoder"], tuple(footprints)
    rest = tuple(name for name in everything if name not in text)
    free = memory.free - RESERVED
    whole = f"needs {_gib(_needed(footprints, everything))}, {device} has {_gib(free)} to spare"
    if _needed(footprints, everything) <= free:
        return Residency((everything,), f"{whole}: all engines stay loaded")
    if max(_needed(footprints, group) for group in (text, rest)) <= free:
        return Residency((text, rest), f"{whole}: will swap the text encoder out")
    for part, names in parts.items():
        if _needed(footprints, names) > free:
            raise UserError(
                f"the {part} alone needs {_gib(_needed(footprints, names))}, {device} has {_gib(free)} to spare; "
                "free its memory, build for smaller shapes, or use target cpu"
            )
    return Residency(tuple(parts.values()), f"{whole}: will load {', '.join(parts)} in turn")


def _needed(footprints: Mapping[str, Footprint], names: Sequence[str]) -> int:
    found = [footprints[name] for name in names]
    return sum(each.weights + each.buffers for each in found) + max(each.scratch for each in found)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
