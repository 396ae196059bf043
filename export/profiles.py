"""Traffic -> a few narrow optimization profiles for every component, chosen to cost least, and why.

Flows in: a ModelSpec, shapes and the most profiles that an engine may have. Flows out: a Choice. Needs no torch, and
knows nothing of compilers.

The cost model. A run of the denoiser on N tokens takes `linear * N + quadratic * N^2` FLOPs a row; in a profile whose
kernels were chosen for `opt` tokens it costs `FALLOFF` more for every doubling between the two:

    cost(N) = (linear * N + quadratic * N^2) * (1 + FALLOFF * |log2(N / opt)|)

Expected cost is the mean over requests. FALLOFF is an assumption; it scales what profiles save and never changes which
are best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from tubelet.runtime.bundle import Manifest, sizes
from tubelet.runtime.bundle import Shape as PortShape
from tubelet.runtime.caption import MAX_BEAMS
from tubelet.runtime.errors import UserError
from tubelet.runtime.geometry import Geometry, plan
from tubelet.runtime.profiles import Profile, Profiles, Range, distance, nearest, select
from tubelet.runtime.request import Request
from tubelet.runtime.spec import ModelSpec
from tubelet.runtime.strict import require
from tubelet.runtime.tiles import tile_size

from .traffic import Shape

MIN_TOKENS = 32  # TensorRT fuses FP8 attention only where a profile begins at 32 tokens or more
FALLOFF = 0.1  # assumed, not measured

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True)
class Served:
    """A shape of the traffic that profiles are made for."""

    shape: Shape
    geometry: Geometry


@dataclass(frozen=True)
class Outside:
    """A shape of the traffic that no profile can take, and the nearest one inside."""

    shape: Shape
    reason: str
    nearest: Geometry


@dataclass(frozen=True)
class Choice:
    """The profiles of every component, and what they mean for the traffic."""

    profiles: Profiles
    served: tuple[Served, ...]  # by tokens
    outside: tuple[Outside, ...]
    cost: float  # expected FLOPs of the denoiser's run, one row, with these profiles
    cost_of_one: float  # the same with one profile
    cost_of_all: float  # and with one profile a token count

    def profile_of(self, served: Served) -> int:
        """The index of the denoiser's profile that a shape takes."""
        index = select(self.profiles["denoiser"], {"N": served.geometry.tokens})
        assert index is not None
        return index


def choose(spec: ModelSpec, traffic: Sequence[Shape], limit: int) -> Choice:
    """The best profiles for the traffic, at most `limit` for each component.

    Raises UserError when `limit` is below 1 and when no shape of the traffic can be served.
    """
    require(limit >= 1, f"the most profiles must be 1 or more, is {limit}")
    served, refused = _sort(spec, traffic)
    tokens = token_profiles(spec, served, limit)
    profiles = _components(spec, served, tokens, picture_profiles(spec, served, limit))
    outside = [
        Outside(shape, reason, nearest(spec, profiles, shape.width, shape.height, shape.frames))
        for shape, reason in refused
    ]
    one, every = (token_profiles(spec, served, count) for count in (1, len(served)))
    costs = (expected_cost(spec, served, each) for each in (tokens, one, every))
    return Choice(profiles, tuple(served), tuple(outside), *costs)


def _sort(spec: ModelSpec, traffic: Sequence[Shape]) -> tuple[list[Served], list[tuple[Shape, str]]]:
    """The shapes that the model has, by tokens, and the others with the reason."""
    served, refused = [], []
    for shape in traffic:
        try:
            geometry = plan(spec, shape.width, shape.height, shape.frames)
            require(geometry.tokens >= MIN_TOKENS, f"it is {geometry.tokens} tokens, profiles begin at {MIN_TOKENS}")
            served.append(Served(shape, geometry))
        except UserError as error:
            refused.append((shape, str(error)))
    if not served:
        reason = refused[0][1] if refused else "it is empty"
        raise UserError(f"the model {spec.name} serves no shape of the traffic: {reason}")
    return sorted(served, key=lambda each: each.geometry.tokens), refused


def flops(spec: ModelSpec, tokens: int) -> int:
    """FLOPs of the denoiser's run on one row: two for every multiply-add of its matrix products."""
    d, length = spec.denoiser, spec.text_encoder.length
    projections = (
        6 * d.width**2 + 2 * d.width * d.ffn_width
    )  # q, k, v, o; q, o of the text's attention; both of the FFN
    linear = d.depth * (projections + 2 * length * d.width) + d.width * (d.token_inputs + d.token_values)
    quadratic = d.depth * 2 * d.width
    return 2 * (linear * tokens + quadratic * tokens**2)


def expected_cost(spec: ModelSpec, served: Sequence[Served], profiles: Sequence[Profile]) -> float:
    """The mean over requests of the cost model, each in the profile that it takes."""
    total = sum(each.shape.share for each in served)
    cost = 0.0
    for each in served:
        extents = {"N": each.geometry.tokens}
        index = select(profiles, extents)
        assert index is not None
        cost += each.shape.share * flops(spec, extents["N"]) * (1 + FALLOFF * distance(profiles[index], extents))
    return cost / total


def token_profiles(spec: ModelSpec, served: Sequence[Served], limit: int) -> list[Profile]:
    """The denoiser's best profiles over N and B; each begins where the one before ends, so that none is between."""
    work: dict[int, float] = {}
    for each in served:
        tokens = each.geometry.tokens
        work[tokens] = work.get(tokens, 0.0) + each.shape.share * flops(spec, tokens)
    runs = partition(sorted(work), lambda tokens, opt: work[tokens] * abs(math.log2(tokens / opt)), limit)
    starts = [runs[0][0][0], *(run[-1] + 1 for run, _ in runs[:-1])]
    return [{"B": _rows(spec), "N": Range(start, opt, run[-1])} for start, (run, opt) in zip(starts, runs, strict=True)]


def _rows(spec: ModelSpec) -> Range:
    """B: one row or, with guidance, two."""
    return Range(1, 2 if Request("").complete(spec).guided else 1, 2)


def picture_profiles(spec: ModelSpec, served: Sequence[Served], limit: int) -> list[Profile]:
    """The VAE's best profiles over the rows and columns of latent tiles, among those that divide them by area.

    A chunk's work is proportional to its area. Every profile begins at the least rows and columns of all.
    """
    work: dict[tuple[int, int], float] = {}
    for each in served:
        picture = tile_size(spec.vae, *each.geometry.latent[1:])
        work[picture] = work.get(picture, 0.0) + each.shape.share * math.prod(each.geometry.latent)

    def penalty(picture: tuple[int, int], opt: tuple[int, int]) -> float:
        return work[picture] * sum(abs(math.log2(a / b)) for a, b in zip(picture, opt, strict=True))

    runs = partition(sorted(work, key=lambda picture: (math.prod(picture), picture)), penalty, limit)
    least = [min(side) for side in zip(*work, strict=True)]
    return [
        {
            name: Range(least[axis], opt[axis], max(picture[axis] for picture in run))
            for axis, name in enumerate(("h", "w"))
        }
        for run, opt in runs
    ]


def partition(
    items: Sequence[Item], penalty: Callable[[Item, Item], float], limit: int
) -> list[tuple[Sequence[Item], Item]]:
    """Cuts a sequence into at most `limit` runs, each with one of its items as optimum, at the least total penalty.

    `penalty(item, optimum)` is what an item costs in a run with that optimum. Exact: dynamic programming over where
    the last run begins. Of equally good cuts the one with the fewest runs.
    """
    count = len(items)
    penalties = np.array([[penalty(item, opt) for opt in items] for item in items])
    best = np.full((count + 1, count + 1), np.inf)  # [start, stop]: of one run
    optimum = np.zeros((count + 1, count + 1), np.int64)
    for start in range(count):
        sums = penalties[start:].cumsum(axis=0)  # [last - start, optimum]
        for stop in range(start + 1, count + 1):
            inside = sums[stop - 1 - start, start:stop]
            best[start, stop], optimum[start, stop] = inside.min(), start + inside.argmin()
    totals, begins = [best[0]], [np.zeros(count + 1, np.int64)]  # [number of runs - 1][stop]: of the first items
    for _ in range(1, min(limit, count)):
        through = totals[-1][:, None] + best  # [start of the last run, stop]
        totals.append(through.min(axis=0))
        begins.append(through.argmin(axis=0))
    runs, stop = int(np.argmin([total[count] for total in totals])), count
    cuts = [stop]
    for begin in reversed(begins[: runs + 1]):
        cuts.insert(0, stop := int(begin[stop]))
    return [(items[start:stop], items[optimum[start, stop]]) for start, stop in pairwise(cuts)]


def _components(
    spec: ModelSpec, served: Sequence[Served], tokens: Sequence[Profile], pictures: Sequence[Profile]
) -> dict[str, tuple[Profile, ...]]:
    """Each component's profiles, by how `pipeline.py` and `caption.py` run it."""
    one, length = _fixed(1), _fixed(spec.text_encoder.length)
    text: tuple[Profile, ...] = ({"B": _rows(spec), "L": length},)
    first = tuple({"B": one, **picture} for picture in pictures)
    chunks = tuple({**picture, "t": Range(1, spec.vae.chunk, spec.vae.chunk)} for picture in first)
    profiles: dict[str, tuple[Profile, ...]] = {
        "text_encoder": text,
        **{f"conditioner{expert}": text for expert in spec.experts},
        **{f"denoiser{expert}": tuple({**profile, "L": length} for profile in tokens) for expert in spec.experts},
        "vae_encoder_first": first,
        "vae_encoder": chunks,
    }
    if spec.vae.streams:
        profiles |= {"vae_decoder_first": first, "vae_decoder": chunks}
    else:
        times = [each.geometry.latent[0] for each in served]
        whole = Range(min(times), round(float(np.median(times))), max(times))
        profiles["vae_decoder"] = tuple({**picture, "t": whole} for picture in first)
    if spec.image_encoder is not None:
        profiles["image_encoder"] = ({"B": Range(1, 1, spec.pictures)},)
        profiles |= {f"image_conditioner{expert}": ({"B": _rows(spec)},) for expert in spec.experts}
    if spec.captioner is not None:
        beams = Range(1, 1, MAX_BEAMS)
        profiles["captioner_memory"] = tuple({"B": one, "N": profile["N"]} for profile in tokens)
        profiles["captioner"] = tuple({"B": beams, "N": profile["N"]} for profile in tokens)
    return profiles


def _fixed(value: int) -> Range:
    return Range(value, value, value)


Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # min, opt and max shape


def input_shapes(inputs: Mapping[str, PortShape], profile: Profile) -> dict[str, Bounds]:
    """A profile as TensorRT takes it: min, opt and max shape of every input."""
    least, usual, most = ({n: getattr(r, bound) for n, r in profile.items()} for bound in ("min", "opt", "max"))
    return {name: (sizes(shape, least), sizes(shape, usual), sizes(shape, most)) for name, shape in inputs.items()}


def component_profiles(manifest: Manifest, traffic: Sequence[Shape], limit: int) -> dict[str, list[dict[str, Bounds]]]:
    """For every component its profiles, as `input_shapes`."""
    profiles = choose(manifest.spec, traffic, limit).profiles
    return {
        name: [input_shapes(component.inputs, profile) for profile in profiles[name]]
        for name, component in manifest.components.items()
    }
