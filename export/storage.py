"""Where tensors lie in the files of a checkpoint, safetensors or torch's own, without their values.

Flows in: a file. Flows out: each tensor's type, shape and bytes; and, where they are asked for, its values or digest.
Nothing is unpickled but by torch's loader of weights alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tubelet.runtime.errors import UserError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
BLOCK = 1 << 24  # bytes read at a time


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's type (safetensors' name, such as F16), shape, and bytes from `offset` of a file on.

    `file` is its name in the bundle.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def read_header(path: Path, file: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Raises UserError when it is damaged.

    `file` is the name that the file has in the bundle, its own if not given.
    """
    with _reported(path):
        length, header = _header(path)
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensor = StoredTensor(
                file or path.name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin
            )
            if tensor.dtype not in ITEM_BYTES:
                raise ValueError(f"{name} is {tensor.dtype}, must be one of {', '.join(ITEM_BYTES)}")
            if tensor.bytes != ITEM_BYTES[tensor.dtype] * math.prod(tensor.shape):
                raise ValueError(f"{name} has {tensor.bytes} bytes, not those of {list(tensor.shape)}")
            if 8 + length + end > path.stat().st_size:
                raise ValueError(f"the bytes of {name} are truncated")
            tensors[name] = tensor
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors. Raises UserError when it is damaged."""
    with _reported(path):
        return dict(_header(path)[1].get("__metadata__", {}))


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """A safetensors file's header, after its length in bytes."""
    with path.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > path.stat().st_size - 8:
            raise ValueError("its header is truncated")
        return length, json.loads(opened.read(length))


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """What goes wrong inside, in reading a safetensors file, is a UserError outside."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a usable safetensors file ({error}); copy it again") from error


def read_pth(path: Path, file: str) -> dict[str, StoredTensor]:
    """The tensors of a file that torch.save wrote of a state dict; their values stay on disk.

    Raises UserError when it is damaged, or holds anything else than tensors of float types.
    """

    def refusal(reason: str) -> UserError:
        return UserError(f"{path} is not a usable file of weights ({reason}); copy it again")

    try:
        with FakeTensorMode():
            content = torch.load(path, weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; make it readable") from error
    except Exception as error:  # unpickling what is not of torch raises almost anything, with advice for programmers
        raise refusal("it is damaged, or torch did not write it of tensors alone") from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise refusal("it holds more than named tensors")
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {}
    for name, value in content.items():
        if value.dtype not in dtypes or value.layout != torch.strided or not value.is_contiguous():
            raise refusal(f"{name} is {value.dtype}, must be dense and one of {', '.join(ITEM_BYTES)}")
        start = value.untyped_storage()._checkpoint_offset
        if start is None:
            raise refusal("it is in the format of torch before 1.6")
        offset = start + value.storage_offset() * value.itemsize
        size = value.numel() * value.itemsize
        tensors[name] = StoredTensor(file, dtypes[value.dtype], tuple(value.shape), offset, size)
    return tensors


def read_values(path: Path, stored: StoredTensor) -> Tensor:
    """A tensor's values, in its stored type."""
    with path.open("rb") as file:
        file.seek(stored.offset)
        data = bytearray(file.read(stored.bytes))
    return torch.frombuffer(data, dtype=DTYPES[stored.dtype]).reshape(stored.shape)


def digest(path: Path, stored: StoredTensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return sha256(path, stored.offset, stored.bytes)


def sha256(path: Path, offset: int, size: int, stop: threading.Event | None = None) -> str:
    """SHA-256 of a part of a file, read in blocks. Raises InterruptedError once `stop` is set."""
    found, left = hashlib.sha256(), size
    with path.open("rb") as file:
        file.seek(offset)
        while left:
            if stop is not None and stop.is_set():
                raise InterruptedError
            block = file.read(min(left, BLOCK))
            if not block:
                raise UserError(f"{path} is truncated; copy it again")
            found.update(block)
            left -= len(block)
    return found.hexdigest()


def write_tensors(
    path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], compute: Callable[[str], Tensor]
) -> None:
    """Writes a safetensors file of these types and shapes, asking for one tensor's values at a time."""
    header, end = {}, 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in layout:
            file.write(compute(name).contiguous().view(torch.uint8).numpy().tobytes())
