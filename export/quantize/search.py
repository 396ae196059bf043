"""What a site's layers read -> the Rounding that changes their outputs least.

Flows in: a site, what it read, and a format. Flows out: a Rounding and each layer's relative error. Outliers move from
inputs into weights as in SmoothQuant (Xiao et al. 2023, arXiv:2211.10438, eq. 4), by powers of two, where that lowers
the error; greatest inputs are clipped where that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .compare import relative
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
    """Tries every migration, without one first, and with each every clipping."""
    weights = [layer.values() for layer in site.layers]
    expected = [seen.rows @ weight.T for weight in weights]
    largest = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)  # [I]
    best: Found | None = None
    for strength in (None, *STRENGTHS) if format.rounds_inputs else (None,):
        factors = None if strength is None else _factors(seen.largest, largest, strength)
        divided = weights if factors is None else [weight / factors for weight in weights]
        restored = [round_weight(format, weight).restore() for weight in divided]
        for scale in _scales(seen, format, factors):
            rounding = Rounding(format, factors, scale)
            found = _measure(site, seen.rows, rounding, restored, expected)
            needed = WORTH_IT if best and best.rounding.factors is None and factors is not None else 1.0
            if best is None or found.total < needed * best.total:
                best = found
    assert best is not None
    return best


def _measure(
    site: Site, rows: Float32, rounding: Rounding, restored: Sequence[Float32], expected: Sequence[Float32]
) -> Found:
    """The errors of a Rounding on inputs [rows,I], with each layer's rounded weight and its outputs as they were."""
    moved = rows if rounding.factors is None else rows * rounding.factors
    inputs = round_inputs(rounding.format, moved, rounding.scale)
    errors, lost, whole = {}, 0.0, 0.0
    for layer, weight, wanted in zip(site.layers, restored, expected, strict=True):
        energy, output = float(np.square(inputs @ weight.T - wanted).sum()), float(np.square(wanted).sum())
        errors[layer.name] = relative(energy, output)
        lost, whole = lost + energy, whole + output
    return Found(rounding, errors, relative(lost, whole))


def _scales(seen: Seen, format: Format, factors: Float32 | None) -> list[float]:
    """Of inputs after the migration, with the greatest of them clipped more and more."""
    if not format.rounds_inputs:
        return [1.0]
    largest = float((seen.largest if factors is None else seen.largest * factors).max())
    clipped = CLIPPED if format.block is None else CLIPPED[:1]  # blocks have scales of their own
    return [input_scale(format, share * largest) for share in clipped]


def _factors(inputs: Float32, weights: Float32, strength: float) -> Float32:
    """Powers of two near weights^(1 - strength) / inputs^strength, of [I] each, around 1."""
    tiny = np.float32(1e-6)
    wanted = (1 - strength) * np.log2(np.maximum(weights, tiny)) - strength * np.log2(np.maximum(inputs, tiny))
    return np.exp2(np.rint(wanted - np.median(wanted))).astype(np.float32)
