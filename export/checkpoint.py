"""A checkpoint: what training leaves, and what `tubelet export` reads.

    spec.json             the ModelSpec
    weights.safetensors   every parameter, named <module>.<parameter>, in any float type
    tokenizer.json

is tubelet's own layout; `published.py` reads others into the same Checkpoint. Flows in: a folder. Flows out: its spec,
and where each parameter's bytes lie. Headers say what they are; only the latents' normalisation, which the spec holds
too, is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tubelet.runtime.bundle import TOKENIZER, WEIGHTS
from tubelet.runtime.errors import UserError
from tubelet.runtime.spec import ModelSpec
from tubelet.runtime.text import PromptTokenizer

from .components import build_modules
from .storage import StoredTensor, read_header, read_values, write_tensors

SPEC, MADE = "spec.json", "made.safetensors"
LISTED = 40  # names in a message; the rest is counted

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Made:
    """A parameter that no file holds as it is needed."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]  # in that type and shape


@dataclass(frozen=True)
class Checkpoint:
    """A model and its parameters, in as many files as they came in."""

    folder: Path
    spec: ModelSpec
    tensors: Mapping[str, StoredTensor]  # by our names
    files: Mapping[str, Path]  # those that hold tensors, by their names in the bundle
    tokenizer: Path
    made: Mapping[str, Made] = field(default_factory=dict)  # in the place of tensors, by our names

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Reads tubelet's own layout.

        Raises UserError when a file is missing or unreadable, or lists parameters that do not fit the spec.
        """
        for name in (SPEC, WEIGHTS, TOKENIZER):
            if not (folder / name).is_file():
                raise UserError(f"{folder} is not a checkpoint: it has no {name}")
        try:
            spec = ModelSpec.from_json(json.loads((folder / SPEC).read_text(encoding="utf-8")))
        except (UserError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{folder / SPEC} is not usable: {error}; write it again") from error
        PromptTokenizer.from_file(folder / TOKENIZER, spec.text_encoder)
        found, expected = read_header(folder / WEIGHTS), parameters(spec)
        tensors = match(found, expected, {name: name for name in expected}, (), f"{folder / WEIGHTS}")
        checkpoint = cls(folder, spec, tensors, {WEIGHTS: folder / WEIGHTS}, folder / TOKENIZER)
        for name in ("latent_mean", "latent_std"):
            stored, wanted = checkpoint.read(f"vae.{name}").flatten().tolist(), getattr(spec.vae, name)
            if not np.allclose(stored, wanted, rtol=1e-2, atol=1e-2):  # the file's may be rounded to bfloat16
                raise UserError(f"vae.{name} is {stored} in {folder / WEIGHTS}, but {list(wanted)} in {SPEC}")
        return checkpoint

    def materialised(self, folder: Path) -> Checkpoint:
        """The same with what is made in a file of its own, MADE in `folder`, written one tensor at a time."""
        if not self.made:
            return self
        write_tensors(folder / MADE, {name: (m.dtype, m.shape) for name, m in self.made.items()}, self._compute)
        tensors = {**self.tensors, **read_header(folder / MADE)}
        used = {tensor.file for tensor in tensors.values()}
        files = {name: path for name, path in {**self.files, MADE: folder / MADE}.items() if name in used}
        return replace(self, tensors=tensors, files=files, made={})

    def _compute(self, name: str) -> Tensor:
        return self.made[name].compute()

    def read(self, name: str) -> Tensor:
        """A parameter's values, in its stored type."""
        stored = self.tensors[name]
        return read_values(self.files[stored.file], stored)


def parameters(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model."""
    with torch.device("meta"):
        modules = build_modules(spec)
    return {
        f"{prefix}.{name}": tuple(tensor.shape)
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def match(
    found: Mapping[str, StoredTensor],
    expected: Shapes,
    sources: Mapping[str, str],
    unused: tuple[str, ...],
    where: str,
) -> dict[str, StoredTensor]:
    """The stored tensor of each expected parameter, in the expected shape.

    `sources` says what each is called in `where`; "name[1/3]" is the second third of its rows. Names that begin with
    one of `unused` may be there. Strict both ways: raises UserError that lists what is missing, unknown and wrongly
    shaped, by the names of `where`.
    """
    tensors, used, missing, reshaped = {}, set(), [], []
    for name, shape in expected.items():
        theirs, part, parts = _part(sources[name])
        used.add(theirs)
        if theirs not in found:
            missing.append(theirs)
            continue
        stored = found[theirs]
        if not _same(stored.shape, (parts * shape[0], *shape[1:]) if parts > 1 else shape):
            wanted = f", must be {list(shape)}" + (f" {parts} times" if parts > 1 else "")
            reshaped.append(f"{theirs} is {list(stored.shape)}{wanted}")
            continue
        size = stored.bytes // parts
        tensors[name] = replace(stored, shape=shape, offset=stored.offset + part * size, bytes=size)
    unknown = [name for name in found if name not in used and not name.startswith(unused)]
    problems = [
        f"{title}: {_listed(sorted(set(names)))}"
        for title, names in (("missing", missing), ("unknown", unknown), ("wrong shape", reshaped))
        if names
    ]
    if problems:
        raise UserError(f"{where} does not fit its spec; {'; '.join(problems)}")
    return tensors


def _part(source: str) -> tuple[str, int, int]:
    """ "name[1/3]" -> name, 1, 3."""
    name, _, part = source.partition("[")
    if not part:
        return name, 0, 1
    index, _, parts = part.rstrip("]").partition("/")
    return name, int(index), int(parts)


def _same(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    """Whether a stored shape is ours apart from axes of one, or is a convolution that we have as a matrix."""
    a, b = ([extent for extent in shape if extent != 1] for shape in (theirs, ours))
    convolution = len(theirs) == 5 and len(ours) == 2 and theirs[0] == ours[0] and math.prod(theirs) == math.prod(ours)
    return a == b or convolution


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
