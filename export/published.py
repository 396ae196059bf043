"""The two layouts in which models are published, read into one Release; of LTX-Video there is only the first.

    diffusers   model_index.json, transformer/, transformer_2/, text_encoder/, image_encoder/, vae/, tokenizer/
    original    config.json beside shards, or both under high_noise_model/ and low_noise_model/;
                models_t5_*.pth, models_clip_*.pth, Wan2.*_VAE.pth, google/umt5-xxl/

Flows in: a folder. Flows out: each part's config and tensors by their published names, the values still on disk. Knows
nothing of what the parameters mean: see `wan.py` and `ltx.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from tubelet.runtime.bundle import TOKENIZER
from tubelet.runtime.errors import UserError
from tubelet.runtime.strict import read, require

from .names import Layout
from .storage import StoredTensor, read_header, read_pth

STEMS = ("diffusion_pytorch_model", "model")  # what a folder's weights are called
INDEX, CONFIG, HIGH, LOW = "model_index.json", "config.json", "high_noise_model", "low_noise_model"
MODEL_TYPES = ("t2v", "i2v", "flf2v", "ti2v")  # of the original's config.json
T = TypeVar("T")
CLIP = "models_clip_*.pth"


@dataclass(frozen=True)
class Part:
    """The tensors of one part of a model, by their published names."""

    folder: Path
    config: Mapping[str, Any]
    found: Mapping[str, StoredTensor]
    files: Mapping[str, Path]  # those that hold the tensors, by their names in the bundle

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Of a tensor with so many axes. Raises UserError where it is missing or has others, or empty ones."""
        if name not in self.found:
            raise UserError(f"{self.folder} has no {name}, which says how large the model is; download it again")
        stored = self.found[name]
        require(
            len(stored.shape) == rank and min(stored.shape) > 0,
            f"{name} in {self.files[stored.file]} has the shape {list(stored.shape)}; it must have {rank} axes, none "
            "of them empty; download it again",
        )
        return stored.shape

    def without(self, prefix: str) -> Part:
        """The same, where some names begin with a prefix, with names that do not."""
        return replace(self, found={name.removeprefix(prefix): stored for name, stored in self.found.items()})

    def depth(self, name: str) -> int:
        """How many blocks there are, by the highest number in the place of the name's {i}.

        Other names count too: a block that lacks this one is there, so that it can be said what it lacks.
        """
        block = re.compile(re.escape(name.partition("{i}")[0]) + r"([0-9]{1,3})\.")
        return 1 + max((int(found[1]) for found in map(block.match, self.found) if found), default=-1)

    def expect(self, **values: Any) -> None:
        """Raises UserError where the config changes what the reference models leave fixed."""
        for name, value in values.items():
            given = self.config.get(name, value)
            require(given == value, f"{self.folder} has {name} {given!r}; only {value!r} is supported")


@dataclass(frozen=True)
class Release:
    layout: Layout
    folder: Path
    transformers: tuple[Part, ...]  # from high noise to low
    text_encoder: Part
    image_encoder: Part | None
    vae: Part
    tokenizer: Path
    per_token: bool  # known tokens have a timestep of their own
    boundary: float | None  # where the release says it


@dataclass(frozen=True)
class Settings:
    """Of model_index.json, beside the parts."""

    boundary_ratio: float | None = None
    expand_timesteps: bool = False


def layout_of(folder: Path) -> Layout | None:
    """The layout in which a folder is published; None where it is in neither."""
    if (folder / INDEX).is_file():
        return Layout.DIFFUSERS
    return Layout.ORIGINAL if any((folder / place / CONFIG).is_file() for place in (".", HIGH)) else None


def pipeline_class(folder: Path) -> str:
    """Which of diffusers' pipelines a diffusers folder is of."""
    return read(str, read_json(folder / INDEX).get("_class_name"), f"_class_name in {folder / INDEX}")


def read_release(folder: Path) -> Release:
    """Raises UserError when a part is missing or unreadable."""
    return _diffusers(folder) if layout_of(folder) == Layout.DIFFUSERS else _original(folder)


def _diffusers(folder: Path) -> Release:
    index = read_json(folder / INDEX)
    settings = read_fields(Settings, index, str(folder / INDEX))
    parts = {name: _part(folder, name) for name, value in index.items() if _named(value) and (folder / name).is_dir()}
    for name in ("transformer", "text_encoder", "vae"):
        there = name in parts and bool(parts[name].found)
        require(there, f"{folder} has no {name}, or {INDEX} does not name it as [library, class]; download it again")
    low = [parts["transformer_2"]] if "transformer_2" in parts else []
    tokenizer = folder / "tokenizer" / TOKENIZER
    require(
        tokenizer.is_file(),
        f"{tokenizer} is missing; download the whole release, or where it has only spiece.model, write it with "
        f"transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of {tokenizer.parent}",
    )
    return Release(
        layout=Layout.DIFFUSERS,
        folder=folder,
        transformers=(parts["transformer"], *low),
        text_encoder=parts["text_encoder"],
        image_encoder=parts.get("image_encoder"),
        vae=parts["vae"],
        tokenizer=tokenizer,
        per_token=settings.expand_timesteps,
        boundary=settings.boundary_ratio,
    )


def _named(value: Any) -> bool:
    """Whether an entry of model_index.json names a part that is there, as ["library", "class"]."""
    return isinstance(value, list) and len(value) == 2 and value[1] is not None


def _original(folder: Path) -> Release:
    names = (HIGH, LOW) if (folder / HIGH).is_dir() else (".",)
    transformers = tuple(_part(folder, name) for name in names)
    for part in transformers:
        kind = part.config.get("model_type")
        known = ", ".join(MODEL_TYPES)
        require(kind in MODEL_TYPES, f"{part.folder / CONFIG} has model_type {kind!r}; known of Wan are {known}")
    shown = any(folder.glob(CLIP))
    return Release(
        layout=Layout.ORIGINAL,
        folder=folder,
        transformers=transformers,
        text_encoder=_pth(_only(folder, "models_t5_*.pth")),
        image_encoder=_pth(_only(folder, CLIP)) if shown else None,
        vae=_pth(_only(folder, "Wan2.*_VAE.pth")),
        tokenizer=_file(folder / "google" / "umt5-xxl" / TOKENIZER),
        per_token=transformers[0].config.get("model_type") == "ti2v",
        boundary=None,
    )


def _part(folder: Path, name: str) -> Part:
    """A folder's config and its safetensors: those that an index lists, or the one file, or numbered ones."""
    inside = folder / name
    config = read_json(inside / CONFIG) if (inside / CONFIG).is_file() else {}
    for stem in STEMS:
        index, shards = (
            inside / f"{stem}.safetensors.index.json",
            sorted(inside.glob(f"{stem}-?????-of-?????.safetensors")),
        )
        if index.is_file():
            return _indexed(inside, index, config, name)
        paths = [inside / f"{stem}.safetensors"] if (inside / f"{stem}.safetensors").is_file() else shards
        if paths:
            return _read(inside, paths, config, name)
    return Part(inside, config, {}, {})


@dataclass(frozen=True)
class Listed:
    """Of an index of shards."""

    weight_map: Mapping[str, str]  # files by tensor


def _indexed(folder: Path, index: Path, config: Mapping[str, Any], name: str) -> Part:
    listed = read_fields(Listed, read_json(index), str(index)).weight_map
    shards = sorted(set(listed.values()))
    for shard in shards:
        require(Path(shard).name == shard, f"{index} names the file {shard!r}, which is outside its folder")
    part = _read(folder, [_file(folder / shard) for shard in shards], config, name)
    misplaced = sorted(t for t in listed if t not in part.found or part.files[part.found[t].file].name != listed[t])
    unlisted = sorted(part.found.keys() - set(listed))
    require(
        not misplaced and not unlisted,
        f"{index} does not fit its files; not where it says: {', '.join(misplaced) or 'none'}; "
        f"not listed: {', '.join(unlisted) or 'none'}",
    )
    return part


def _read(folder: Path, paths: list[Path], config: Mapping[str, Any], name: str) -> Part:
    found: dict[str, StoredTensor] = {}
    files = {path.name if name == "." else f"{name}.{path.name}": path for path in paths}
    for file, path in files.items():
        tensors = read_header(path, file)
        twice = sorted(tensors.keys() & found.keys())
        require(not twice, f"{path} holds {', '.join(twice)}, which another file holds too; download them again")
        found |= tensors
    return Part(folder, config, found, files)


def _pth(path: Path) -> Part:
    return Part(path, {}, read_pth(path, path.name), {path.name: path})


def _only(folder: Path, pattern: str) -> Path:
    paths = sorted(folder.glob(pattern))
    found = ", ".join(path.name for path in paths) or "none"
    require(len(paths) == 1, f"{folder} must have one file {pattern}, has {found}; download the whole release")
    return paths[0]


def _file(path: Path) -> Path:
    require(path.is_file(), f"{path} is missing; download the whole release")
    return path


def read_fields(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Those of a config's values that `kind` has. Raises UserError where one is missing or ill-typed."""
    wanted = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return read(kind, {name: value for name, value in values.items() if name in wanted}, where)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; download it again") from error
    require(isinstance(value, dict), f"{path} must hold an object; download it again")
    return dict(value)
