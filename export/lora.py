"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) merged into a checkpoint's weights: W + scale alpha/rank B A.

Flows in: a checkpoint and safetensors files in the key styles of diffusers, of the original release, and of kohya's
trainers. Flows out: the checkpoint with the changed weights to be made, one at a time. `diff` and `diff_b` are whole
differences of a weight and a bias.

    transformer.blocks.0.attn1.to_q.lora_A.weight           diffusers; transformer_2. is the expert for low noise
    diffusion_model.blocks.0.self_attn.q.lora_down.weight   the original release
    lora_unet_blocks_0_self_attn_q.lora_down.weight         kohya
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tubelet.runtime.errors import UserError
from tubelet.runtime.spec import DenoiserSpec, LtxDenoiserSpec
from tubelet.runtime.strict import read, require

from .checkpoint import Checkpoint, Made
from .ltx_names import TRANSFORMER as LTX
from .names import Names
from .storage import DTYPES, StoredTensor, read_header, read_metadata, read_values
from .wan_names import TRANSFORMER as WAN

NAMES: Mapping[type[DenoiserSpec], Names] = {DenoiserSpec: WAN, LtxDenoiserSpec: LTX}
DOWN, UP = ("lora_A.weight", "lora_down.weight"), ("lora_B.weight", "lora_up.weight")
PARTS = (*DOWN, *UP, "alpha", "diff", "diff_b")
EXPERTS = {"high": ("",), "low": ("_low",), None: ("", "_low")}


@dataclass(frozen=True)
class Lora:
    path: Path
    scale: float
    expert: str | None  # "high" or "low"; None: of all denoisers

    @classmethod
    def parse(cls, text: str) -> Lora:
        """From FILE, FILE:SCALE or FILE:SCALE:EXPERT. Raises UserError where it is none of these."""
        rest, expert = text, None
        for name in ("high", "low"):
            if text.endswith(f":{name}"):
                rest, expert = text.removesuffix(f":{name}"), name
        name, colon, number = rest.rpartition(":")
        try:
            scale = float(number) if colon else 1.0
        except ValueError as error:
            raise UserError(f"--lora {text!r} must be FILE:SCALE, as in style.safetensors:0.8") from error
        name = name if colon else rest
        require(bool(name) and abs(scale) < float("inf"), f"--lora {text!r} needs a file and a finite scale")
        return cls(Path(name), scale, expert)


@dataclass(frozen=True)
class Change:
    """What one file adds to one parameter: scale * alpha/rank * up @ down, or scale * diff."""

    path: Path
    scale: float
    factors: tuple[StoredTensor, ...]  # up and down, or a difference
    alpha: StoredTensor | float | None = None  # None: the rank

    def of(self, shape: tuple[int, ...]) -> Tensor:
        first, *second = (read_values(self.path, stored).float() for stored in self.factors)
        if not second:
            return self.scale * first.reshape(shape)
        (down,) = second
        alpha = read_values(self.path, self.alpha).item() if isinstance(self.alpha, StoredTensor) else self.alpha
        scale = self.scale if alpha is None else self.scale * alpha / len(down)
        return scale * (first.flatten(1) @ down.flatten(1)).reshape(shape)


def merged(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """The checkpoint with all adapters merged, in the stored types.

    Raises UserError for a file that is damaged, or that has keys which are not parameters of the model or do not fit.
    """
    changes: dict[str, list[Change]] = {}
    for lora in loras:
        for name, change in _changes(lora, checkpoint).items():
            changes.setdefault(name, []).append(change)
    made = {name: _made(checkpoint, name, found) for name, found in changes.items()}
    return replace(checkpoint, made={**checkpoint.made, **made})


def _made(checkpoint: Checkpoint, name: str, changes: Sequence[Change]) -> Made:
    stored = checkpoint.tensors[name]

    def compute() -> Tensor:
        weight = checkpoint.read(name).float()
        for change in changes:
            weight += change.of(stored.shape)
        return weight.to(DTYPES[stored.dtype])

    return Made(stored.dtype, stored.shape, compute)


def _changes(lora: Lora, checkpoint: Checkpoint) -> dict[str, Change]:
    """What a file adds, by our names."""
    require(lora.path.is_file(), f"there is no file {lora.path}")
    stored = read_header(lora.path)
    require(bool(stored), f"{lora.path} holds no tensors; give a file with an adapter")
    layers, alphas = _layers(checkpoint, lora.expert), _Alphas(lora.path)
    changes: dict[str, Change] = {}
    unmatched: list[str] = []
    for layer, parts in _by_layer(stored).items():
        found = _of_layer(lora, layer, parts, alphas)
        if layer in layers and found is not None:
            changes |= {f"{ours}{end}": change for ours in layers[layer] for end, change in found.items()}
        else:
            unmatched += [f"{layer}.{part}" for part in parts]
    unfit = [name for name, change in changes.items() if not _fits(change, checkpoint.tensors.get(name))]
    require(
        not unmatched and not unfit,
        f"{lora.path} does not fit the model; not its parameters: {', '.join(sorted(unmatched)) or 'none'}; "
        f"of another shape: {', '.join(sorted(unfit)) or 'none'}",
    )
    return changes


def _by_layer(found: dict[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Tensors by layer and by what they are of it."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    for key, stored in found.items():
        part = next((name for name in PARTS if key.endswith(f".{name}")), "")
        layers.setdefault(key.removesuffix(f".{part}") if part else key, {})[part] = stored
    return layers


def _of_layer(lora: Lora, layer: str, parts: Mapping[str, StoredTensor], alphas: _Alphas) -> dict[str, Change] | None:
    """What is added to a layer's ".weight" and ".bias"; None where something of a pair is missing or unknown."""
    down, up = (next((parts[name] for name in names if name in parts), None) for names in (DOWN, UP))
    if "" in parts or (down is None) != (up is None) or ("alpha" in parts and down is None):
        return None
    changes = {}
    if down is not None and up is not None:
        changes[".weight"] = Change(lora.path, lora.scale, (up, down), parts.get("alpha", alphas.of(layer)))
    for part, end in (("diff", ".weight"), ("diff_b", ".bias")):
        if part in parts:
            if end in changes:
                return None
            changes[end] = Change(lora.path, lora.scale, (parts[part],))
    return changes


def _layers(checkpoint: Checkpoint, expert: str | None) -> dict[str, list[str]]:
    """What a layer may be called -> its names here, one for each denoiser that is meant."""
    spec = checkpoint.spec
    require(expert is None or spec.boundary is not None, f"{spec.name} has one denoiser; leave :{expert} out of --lora")
    meant = [name for name in EXPERTS[expert] if name in spec.experts]
    layers: dict[str, list[str]] = {}
    for row, i in itertools.product(NAMES[type(spec.denoiser)].rows, range(spec.denoiser.depth)):
        ours, diffusers, original = (name.format(i=i) for name in row)
        module, _, layer = ours.partition(".")
        here = [f"{module}{name}.{layer}" for name in meant]
        for called in (diffusers, original):
            layers |= {f"{prefix}{called}": here for prefix in ("", "transformer.", "diffusion_model.")}
        layers[f"lora_unet_{original.replace('.', '_')}"] = here
        layers[f"transformer_2.{diffusers}"] = [f"{module}_low.{layer}"]
    return layers


def _fits(change: Change, stored: StoredTensor | None) -> bool:
    if stored is None:
        return False
    if len(change.factors) == 1:
        return math.prod(change.factors[0].shape) == math.prod(stored.shape)
    up, down, (rows, columns) = (_matrix(tensor.shape) for tensor in (*change.factors, stored))
    rank, alpha = up[1], change.alpha
    one = not isinstance(alpha, StoredTensor) or math.prod(alpha.shape) == 1
    return one and min(rows, rank) > 0 and up == (rows, rank) and down == (rank, columns)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns; a convolution has them too, and what has none is an empty matrix."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)


@dataclass(frozen=True)
class _Alpha:
    """Of all layers of a part, and of some by name."""

    lora_alpha: float | None
    alpha_pattern: Mapping[str, float]


class _Alphas:
    """What diffusers writes of alpha beside the tensors."""

    def __init__(self, path: Path):
        self._where = f"the metadata of {path}"
        try:
            self._told: dict[str, Any] = dict(json.loads(read_metadata(path).get("lora_adapter_metadata", "{}")))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{self._where} is not JSON: {error}") from error

    def of(self, layer: str) -> float | None:
        part, _, name = layer.partition(".")
        told = {"lora_alpha": self._told.get(f"{part}.lora_alpha") or None}
        told |= {"alpha_pattern": self._told.get(f"{part}.alpha_pattern") or {}}
        found = read(_Alpha, told, f"{self._where}: {part}")
        return found.alpha_pattern.get(name, found.lora_alpha)
