"""What a site's layers read -> the Rounding that changes their outputs least.

Flows in: a site, what it read, and a format. Flows out: a Rounding and each layer's relative error. Outliers move from
inputs into weights as in SmoothQuant (Xiao et al. 2023, arXiv:2211.10438, eq. 4), by powers of two, where that lowers
the error; greatest inputs are clipped where that does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .formats import Float32, Format, input_scale, round_inputs, round_weight
from .linear import Site
from .passes import Rounding
from .trajectory import Seen

STRENGTHS = (0.25, 0.5, 0.75)  # of the migration
CLIPPED = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # share of the greatest input that still fits
WORTH_IT = 0.95  # a migration costs a node, so it must lower the error by 5 %


@dataclass(frozen=True)
class Found:
    """A site's Rounding and what it does to its layers."""

    rounding: Rounding
    errors: dict[str, float]  # by layer: L2 of the output's error over L2 of the output
    total: float  # the same of all outputs


def search(site: Site, seen: Seen, format: Format) -> Found:
    """Tries every migration and clipping."""
    best: Found | None = None
    for rounding in _candidates(site, seen, format):
        found = measure(site, seen.rows, rounding)
        needed = WORTH_IT if best and best.rounding.factors is None and rounding.factors is not None else 1.0
        if best is None or found.total < needed * best.total:
            best = found
    assert best is not None
    return best


def measure(site: Site, rows: Float32, rounding: Rounding) -> Found:
    """The errors of a Rounding on inputs [rows,I]."""
    factors = np.float32(1) if rounding.factors is None else rounding.factors
    inputs = round_inputs(rounding.format, rows * factors, rounding.scale)
    errors, lost, whole = {}, 0.0, 0.0
    for layer in site.layers:
        weight = layer.values()
        expected = rows @ weight.T
        difference = inputs @ round_weight(rounding.format, weight / factors).restore().T - expected
        energy, output = float(np.square(difference).sum()), float(np.square(expected).sum())
        errors[layer.name] = (energy / output) ** 0.5
        lost, whole = lost + energy, whole + output
    return Found(rounding, errors, (lost / whole) ** 0.5)


def _candidates(site: Site, seen: Seen, format: Format) -> Iterator[Rounding]:
    """Without a migration first."""
    if not format.rounds_inputs:
        yield Rounding(format, None, 1.0)
        return
    clipped = CLIPPED if format.block is None else CLIPPED[:1]  # blocks have scales of their own
    weights = np.max([np.abs(layer.values()).max(axis=0) for layer in site.layers], axis=0)  # [I]
    for strength in (None, *STRENGTHS):
        factors = None if strength is None else _factors(seen.largest, weights, strength)
        largest = float((seen.largest * (1 if factors is None else factors)).max())
        for share in clipped:
            yield Rounding(format, factors, input_scale(format, share * largest))


def _factors(inputs: Float32, weights: Float32, strength: float) -> Float32:
    """Powers of two near weights^(1 - strength) / inputs^strength, of [I] each, around 1."""
    tiny = np.float32(1e-6)
    wanted = (1 - strength) * np.log2(np.maximum(weights, tiny)) - strength * np.log2(np.maximum(inputs, tiny))
    return np.exp2(np.rint(wanted - np.median(wanted))).astype(np.float32)
