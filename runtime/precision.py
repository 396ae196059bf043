"""How a quantized bundle was rounded, and the damage: what lies in it as precision.json.

Flows in: a bundle. Flows out: its Precision, or None for one that was not quantized, and which plans of it can be
built. `export/quantize` writes it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from .bundle import Bundle
from .errors import UserError
from .plans import ROUNDED, Target
from .strict import read

FILE = "precision.json"
COMPONENT = "denoiser"  # whose linear layers are rounded
WIDE = "fp32"  # of a layer that was not rounded


@dataclass(frozen=True)
class LayerPrecision:
    """A linear layer of the denoiser's blocks."""

    name: str
    precision: str
    migrated: bool  # outliers of its inputs were moved into its weights
    relative: float  # L2 of its output's error over L2 of its output, on inputs of calibration


@dataclass(frozen=True)
class Damage:
    """Rounded against float32, over whole clips that were no part of the calibration.

    Under a budget they are those that the choice of layers was measured on, so that what is said is what was met.
    """

    clips: int
    latents: float  # L2 of the difference of final latents over L2 of the reference
    psnr_db: float  # of the frames; 100 where they are equal
    ssim: float


@dataclass(frozen=True)
class Precision:
    precision: str  # the one that was asked for
    source: str  # key of the bundle that was rounded
    keep: tuple[str, ...]  # patterns of layers that were left as they are
    budget: float | None  # most that `damage.latents` may be
    prompts: int  # of the calibration
    weights_bytes: int
    source_weights_bytes: int
    layers: tuple[LayerPrecision, ...]
    damage: Damage


def read_precision(bundle: Bundle) -> Precision | None:
    """Raises UserError when the record is not readable."""
    if FILE not in bundle.manifest.files:
        return None
    path = bundle.path(FILE)
    try:
        return read(Precision, json.loads(path.read_text(encoding="utf-8")), "precision")
    except (UserError, OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not usable: {error}; quantize the bundle again") from error


def refusal(bundle: Bundle, target: Target, component: str) -> str | None:
    """Why a component's plan cannot be built for a target, None where it can.

    Plans below 16 bits are those of a bundle that was quantized to the precision; its denoiser has no others.
    """
    known = read_precision(bundle)
    made_for, asked = known.precision if known else None, target.precision if target.precision in ROUNDED else None
    if asked == made_for or (asked is None and component != COMPONENT):
        return None
    if made_for is None:
        return (
            f"{bundle.folder} is not quantized; make a bundle with `tubelet quantize {bundle.folder} "
            f"--precision {target.precision} -o ...` and build that"
        )
    remedy = f"build it with --precision {made_for}" if made_for in ROUNDED else "it runs on the target cpu"
    return f"{bundle.folder} is quantized to {made_for}, not made for {target.precision}; {remedy}"


def write_precision(folder: Path, precision: Precision) -> None:
    text = json.dumps(dataclasses.asdict(precision), indent=1)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
