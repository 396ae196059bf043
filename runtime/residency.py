"""Which engines are in a GPU's memory at the same time, decided before any is loaded.

Flows in: what each engine takes, and how much memory is free. Flows out: groups that are loaded in turn, as few as fit,
and a sentence that says so. All engines share one scratch memory; weights and static buffers add up. What a generation
keeps on the device while other engines take their turn is part of every group.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .bundle import Component, sizes
from .dtypes import DTYPES
from .errors import UserError
from .memory import MemoryInfo
from .plans import PlanRecord

RESERVED = 1 << 29  # bytes for contexts, the code of kernels and the sampler's state
KEPT = ("conditioner", "image_conditioner", "denoiser")  # their buffers are a generation's: how the names begin
HOST_BYTES = 4  # of a weight: ONNX Runtime holds float32
PARTS = {
    "text encoder": ("text_encoder", "conditioner", "conditioner_low"),
    "image encoder": ("image_encoder", "image_conditioner", "image_conditioner_low"),
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
    workspaces: int  # bytes for the denoiser's buffers, of all shapes together
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


def plan_host_residency(components: Mapping[str, Component]) -> Residency:
    """As `plan_residency`, for engines of this machine's memory, which hold float32 weights and are never refused."""
    footprints = {name: Footprint(HOST_BYTES * each.parameters, 0, 0) for name, each in components.items()}
    memory = _host_memory()
    try:
        return plan_residency(footprints, memory, "this machine")
    except UserError as error:
        return Residency(tuple(_parts(footprints).values()), 0, f"{error}; memory may run out")


def _host_memory() -> MemoryInfo:
    """What is there without swapping; all of it where the system does not say how much is free."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return MemoryInfo(next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), total)
    except (OSError, StopIteration):
        return MemoryInfo(total, total)


def _parts(footprints: Mapping[str, Footprint]) -> dict[str, tuple[str, ...]]:
    found = {part: tuple(name for name in names if name in footprints) for part, names in PARTS.items()}
    return {part: names for part, names in found.items() if names}


def plan_residency(footprints: Mapping[str, Footprint], memory: MemoryInfo, device: str) -> Residency:
    """The fewest groups that fit into the free memory: all at once, without the text encoder, or part by part.

    Raises UserError when a part does not fit by itself.
    """
    parts = _parts(footprints)
    text, everything = parts["text encoder"], tuple(footprints)
    rest = tuple(name for name in everything if name not in text)
    free = memory.free - RESERVED
    whole = f"needs {_gib(_needed(footprints, everything))}, {device} has {_gib(free)} to spare"

    def residency(groups: tuple[tuple[str, ...], ...], sentence: str) -> Residency:
        spare = free - max(_needed(footprints, group) for group in groups)
        denoisers = sum(each.buffers for name, each in footprints.items() if name.startswith("denoiser"))
        return Residency(groups, denoisers + spare, f"{whole}: {sentence}")

    if _needed(footprints, everything) <= free:
        return residency((everything,), "all engines stay loaded")
    if max(_needed(footprints, group) for group in (text, rest)) <= free:
        return residency((text, rest), "will swap the text encoder out")
    for part, names in parts.items():
        if _needed(footprints, names) > free:
            raise UserError(
                f"the {part} alone needs {_gib(_needed(footprints, names))}, {device} has {_gib(free)} to spare; "
                "free its memory, build for smaller shapes, or use target cpu"
            )
    return residency(tuple(parts.values()), f"will load {', '.join(parts)} in turn")


def _needed(footprints: Mapping[str, Footprint], names: Sequence[str]) -> int:
    weights = sum(footprints[name].weights for name in names)
    kept = {*names, *(name for name in footprints if name.startswith(KEPT))}
    buffers = sum(footprints[name].buffers for name in kept)
    return weights + buffers + max(footprints[name].scratch for name in names)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
