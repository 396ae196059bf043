"""Digests that name what a component is, however it is stored; and files of weights put into a bundle.

Flows in: graphs, and lines about weights. Flows out: the digests of a bundle's Component. Needs no torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx_ir as ir

from tubelet.runtime.errors import UserError


def graph_digest(model: ir.Model) -> str:
    """SHA-256 of a graph, apart from where its weights are stored."""
    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        del tensor.external_data[:]
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def weight_line(name: str, dtype: str, shape: Sequence[int], sha256: str) -> str:
    """What a component's digest takes of a weight: its type by safetensors' name, and the hash of its bytes."""
    return f"{name} {dtype} {list(shape)} {sha256}"


def weights_digest(lines: Iterable[str]) -> str:
    """SHA-256 of all weights of a component, in any order."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def borrow(source: Path, target: Path) -> None:
    """Puts a file of weights where graphs look for it for a while: a hard link, or a copy where it cannot be linked."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def place(source: Path, target: Path, copy: bool) -> None:
    """Puts a file of weights into a bundle, as a hard link or a copy. Raises UserError where it cannot be linked."""
    if copy:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise UserError(
            f"cannot link {source} into the bundle: {error.strerror}; write the bundle to the same file system, or "
            "copy with --copy"
        ) from error
