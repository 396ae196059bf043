"""A checkpoint: the folder that training leaves, and what `tubelet export` reads.

    spec.json             the ModelSpec
    weights.safetensors   every parameter, named <module>.<parameter>, in any float type
    tokenizer.json

Flows in: a folder. Flows out: its spec, and where each tensor's bytes lie. The header says what they are; only the
latents' normalisation, which the spec holds too, is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from tubelet.runtime.bundle import TOKENIZER, WEIGHTS
from tubelet.runtime.errors import UserError
from tubelet.runtime.spec import ModelSpec
from tubelet.runtime.text import PromptTokenizer

SPEC = "spec.json"
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's type (safetensors' name, such as F16), shape, and bytes from `offset` of the file on."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    spec: ModelSpec
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Raises UserError when a file is missing or unreadable."""
        for name in (SPEC, WEIGHTS, TOKENIZER):
            if not (folder / name).is_file():
                raise UserError(f"{folder} is not a checkpoint: it has no {name}")
        try:
            spec = ModelSpec.from_json(json.loads((folder / SPEC).read_text(encoding="utf-8")))
        except (UserError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{folder / SPEC} is not usable: {error}; write it again") from error
        PromptTokenizer.from_file(folder / TOKENIZER, spec.text_encoder.length)
        return cls(folder, spec, read_header(folder / WEIGHTS))

    def check(self, expected: Mapping[str, torch.Size]) -> None:
        """Strict both ways. Raises UserError that lists missing, unknown and wrongly shaped parameters."""
        found = {name: tensor.shape for name, tensor in self.tensors.items()}
        check_parameters(f"{self.folder / WEIGHTS} does not fit its spec", expected, found)
        with safe_open(self.folder / WEIGHTS, "pt") as file:
            for name in ("latent_mean", "latent_std"):
                stored, wanted = file.get_tensor(f"vae.{name}").flatten().tolist(), getattr(self.spec.vae, name)
                if not np.allclose(stored, wanted, rtol=1e-2, atol=1e-2):  # the file's may be rounded to bfloat16
                    raise UserError(f"vae.{name} is {stored} in {self.folder / WEIGHTS}, but {list(wanted)} in {SPEC}")


def check_parameters(
    complaint: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Strict both ways. Raises UserError that lists missing, unknown and wrongly shaped parameters."""
    reshaped = [
        f"{name} is {list(found[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = [
        f"{title}: {', '.join(names)}"
        for title, names in (
            ("missing", sorted(set(expected) - set(found))),
            ("unknown", sorted(set(found) - set(expected))),
            ("wrong shape", reshaped),
        )
        if names
    ]
    if problems:
        raise UserError(f"{complaint}; {'; '.join(problems)}")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, without their bytes. Raises UserError when the file is damaged."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size - 8:
                raise ValueError("its header is truncated")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
            if tensor.dtype not in ITEM_BYTES:
                raise ValueError(f"{name} is {tensor.dtype}, must be one of {', '.join(ITEM_BYTES)}")
            if tensor.bytes != ITEM_BYTES[tensor.dtype] * math.prod(tensor.shape):
                raise ValueError(f"{name} has {tensor.bytes} bytes, not those of {list(tensor.shape)}")
            if 8 + length + end > path.stat().st_size:
                raise ValueError(f"the bytes of {name} are truncated")
            tensors[name] = tensor
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a usable safetensors file ({error}); copy it again") from error
    return tensors
