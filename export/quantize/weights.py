"""Tensors of several graphs -> one safetensors file, and references to it; and the digest of a graph's tensors.

Flows in: graphs whose initializers are references into other files, or not computed yet. Flows out: a file, each tensor
in it once, and graphs that refer to it. Holds one tensor at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from tubelet.runtime.strict import require

from ..content import weight_line, weights_digest

STORED = {  # safetensors' names; what it has no name for is stored as bytes
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.INT8: "I8",
    ir.DataType.UINT4: "U8",
}


def is_new(value: ir.Value) -> bool:
    """Whether an initializer was not stored yet."""
    return isinstance(value.const_value, ir.LazyTensor)


def files(graph: ir.Graph) -> set[str]:
    """The names of the files that hold a graph's weights."""
    return {_path(tensor).name for tensor in _stored(graph)}


def unused(path: Path) -> Path:
    """The path, or with a number where a file has it: one may be a hard link to what must not change."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


def is_new_or_in(names: Collection[str]) -> Callable[[ir.Value], bool]:
    """Tells initializers that were not stored yet, or are in one of these files."""

    def chosen(value: ir.Value) -> bool:
        stored = value.const_value
        return is_new(value) or (isinstance(stored, ir.ExternalTensor) and str(stored.location) in names)

    return chosen


def values(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    """A tensor's values. onnx_ir reads no file that has several hard links, as those of an exported bundle have."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    return np.frombuffer(_data(tensor), tensor.dtype.numpy()).reshape(tensor.shape.numpy())


def digest(graph: ir.Graph) -> str:
    """A component's `weights_digest`."""
    return weights_digest(
        weight_line(
            str(tensor.name), STORED[tensor.dtype], tensor.shape.numpy(), hashlib.sha256(_data(tensor)).hexdigest()
        )
        for tensor in _stored(graph)
    )


def store(graphs: Iterable[ir.Graph], path: Path, chosen: Callable[[ir.Value], bool]) -> int:
    """Writes the chosen initializers of all graphs, by name, to a new file, and makes them references to it.

    Returns their bytes. Raises FileExistsError where there is a file.
    """
    users: dict[str, list[ir.Value]] = {}
    for graph in graphs:
        for value in graph.initializers.values():
            if chosen(value):
                users.setdefault(str(value.name), []).append(value)
    tensors = {name: _tensor(values[0]) for name, values in users.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # aligned without gaps
    header: dict[str, dict[str, object]] = {}
    offsets, end = {}, 0
    for name in order:
        tensor = tensors[name]
        shape = list(tensor.shape.numpy())
        if tensor.dtype == ir.DataType.UINT4:
            shape[-1] //= 2
        offsets[name], end = end, end + tensor.nbytes
        header[name] = {"dtype": STORED[tensor.dtype], "shape": shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_data(tensors[name]))
    for name, tensor in tensors.items():
        place = (path.name, 8 + len(text) + offsets[name], tensor.nbytes, tensor.dtype)
        for value in users[name]:
            value.const_value = ir.ExternalTensor(*place, shape=ir.Shape(tensor.shape), name=name, base_dir=path.parent)
    return end


def _stored(graph: ir.Graph) -> list[ir.ExternalTensor]:
    constants = [value.const_value for value in graph.initializers.values()]
    return [constant for constant in constants if isinstance(constant, ir.ExternalTensor)]


def _path(tensor: ir.ExternalTensor) -> Path:
    """Raises UserError for a file that is not the graph's neighbour."""
    name = str(tensor.location)
    require(Path(name).name == name, f"the graph's weights are in {name}, outside the bundle; export the bundle again")
    return Path(tensor.base_dir, name)


def _data(tensor: ir.ExternalTensor | ir.LazyTensor) -> Any:
    """A tensor's bytes, as they are stored."""
    if isinstance(tensor, ir.LazyTensor):
        return tensor.tobytes()
    return np.memmap(_path(tensor), np.uint8, "r", tensor.offset or 0, (tensor.nbytes,))


def _tensor(value: ir.Value) -> ir.LazyTensor | ir.ExternalTensor:
    assert isinstance(value.const_value, ir.LazyTensor | ir.ExternalTensor)
    return value.const_value
