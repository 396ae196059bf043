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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.runtime.bundle import TOKENIZER
from tubelet.runtime.errors import UserError
from tubelet.runtime.strict import require

from .names import Layout
from .storage import StoredTensor, read_header, read_pth

STEMS = ("diffusion_pytorch_model", "model")  # what a folder's weights are called
INDEX, HIGH, LOW = "model_index.json", "high_noise_model", "low_noise_model"
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


def is_published(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (INDEX, "config.json", f"{HIGH}/config.json"))


def pipeline_class(folder: Path) -> str | None:
    """Which of diffusers' pipelines a folder is of; None for the original layout."""
    return read_json(folder / INDEX).get("_class_name") if (folder / INDEX).is_file() else None


def read_release(folder: Path) -> Release:
    """Raises UserError when a part is missing or unreadable."""
    return _diffusers(folder) if (folder / INDEX).is_file() else _original(folder)


def _diffusers(folder: Path) -> Release:
    index = read_json(folder / INDEX)
    parts = {name: _part(folder, name) for name, value in index.items() if _named(value) and (folder / name).is_dir()}
    for name in ("transformer", "text_encoder", "vae"):
        require(name in parts and bool(parts[name].found), f"{folder} has no {name}; download it again")
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
        per_token=bool(index.get("expand_timesteps", False)),
        boundary=index.get("boundary_ratio"),
    )


def _named(value: Any) -> bool:
    """Whether an entry of model_index.json names a part that is there, as ["library", "class"]."""
    return isinstance(value, list) and value[-1] is not None


def _original(folder: Path) -> Release:
    names = (HIGH, LOW) if (folder / HIGH).is_dir() else (".",)
    transformers = tuple(_part(folder, name) for name in names)
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
    config = read_json(inside / "config.json") if (inside / "config.json").is_file() else {}
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


def _indexed(folder: Path, index: Path, config: Mapping[str, Any], name: str) -> Part:
    listed = read_json(index).get("weight_map")
    require(isinstance(listed, dict), f"{index} lists no weights; download it again")
    assert listed is not None
    shards = sorted(set(listed.values()))
    for shard in shards:
        require(Path(str(shard)).name == shard, f"{index} names the file {shard!r}, which is outside its folder")
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


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; download it again") from error
    require(isinstance(value, dict), f"{path} must hold an object; download it again")
    return dict(value)
