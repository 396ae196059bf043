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
        PromptTokenizer.from_file(folder / TOKENIZER, spec.text_encoder, "write it again")
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
    places = {name: _part(sources[name]) for name in expected}
    wanted = {
        theirs: (parts * expected[name][0], *expected[name][1:]) if parts > 1 else expected[name]
        for name, (theirs, _, parts) in places.items()
    }
    shapes = {
        name: wanted[name] if name in wanted and _same(stored.shape, wanted[name]) else stored.shape
        for name, stored in found.items()
        if name in wanted or not name.startswith(unused)
    }
    check_parameters(f"{where} does not fit its spec", wanted, shapes)
    tensors = {}
    for name, (theirs, part, parts) in places.items():
        stored = found[theirs]
        size = stored.bytes // parts
        tensors[name] = replace(stored, shape=expected[name], offset=stored.offset + part * size, bytes=size)
    return tensors


def check_parameters(complaint: str, expected: Shapes, found: Shapes) -> None:
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
