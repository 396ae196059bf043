"""What TensorRT says about the plan that it built: its header, and the report that it logs.

Flows in: the first bytes of a plan, and the logger's lines at detailed verbosity. Flows out: numbers. No GPU is needed.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tubelet.runtime.plans import COMPILERS

from .errors import CompilerError
from .profiles import Bounds

HEADER = struct.Struct("<4s12xQ8sQ16xQ")  # magic, bytes of the plan, version, architecture mask, bytes of weights
MAGIC = b"vtrt"
TYPES = {
    "Float": "fp32",
    "Half": "fp16",
    "BFloat16": "bf16",
    "Int8": "int8",
    "FP8": "fp8",
    "FP4E2M1": "fp4",
    "Int64": "int64",
    "Int32": "int32",
    "Bool": "bool",
}
ROUNDED_TYPES = frozenset({"int8", "fp8", "fp4"})
ATTENTION = re.compile(r"_mha_|fmha|flash_att", re.IGNORECASE)
PRODUCT_TYPES = frozenset({"gemm", "correlation", "conv"})
PRODUCT_NAMES = re.compile(r"__myl_(\w*?)(Fc|Gemm|Conv)", re.ASCII)


@dataclass(frozen=True)
class Layer:
    """One kernel or call of a plan."""

    name: str
    kind: str
    input_types: tuple[str, ...]
    nodes: frozenset[str] = frozenset()  # of the graph, that it computes

    @property
    def is_attention(self) -> bool:
        return bool(ATTENTION.search(self.name))

    @property
    def is_product(self) -> bool:
        """A matrix product or convolution, alone or fused with what follows it."""
        return self.kind in PRODUCT_TYPES or bool(PRODUCT_NAMES.match(self.name))

    @property
    def is_rounded(self) -> bool:
        """A product of values in 8 or 4 bits."""
        return self.is_product and not ROUNDED_TYPES.isdisjoint(self.input_types)


@dataclass(frozen=True)
class Report:
    layers: tuple[Layer, ...]  # of all profiles: each has kernels of its own
    dtypes: dict[str, str]  # of inputs and outputs
    profiles: tuple[dict[str, Bounds], ...]  # by input
    activation_bytes: tuple[int, ...]  # by profile
    weights_bytes: int

    @property
    def fused_attentions(self) -> int:
        return sum(layer.is_attention for layer in self.layers)

    @property
    def wide_products(self) -> int:
        """Matrix products that run in float32."""
        return sum(layer.is_product and "fp32" in layer.input_types for layer in self.layers)

    def fallen_back(self, rounded: Collection[str]) -> tuple[str, ...]:
        """Those of the graph's rounded products that not every profile multiplies in 8 or 4 bits."""
        found = Counter(name for layer in self.layers if layer.is_rounded for name in layer.nodes)
        return tuple(sorted(name for name in rounded if found[name] < len(self.profiles)))


def architectures(header: bytes, size: int) -> tuple[str, ...]:
    """The architectures that a TensorRT-RTX plan of this size names in its header.

    Raises CompilerError where the header is not one.
    """
    magic, content, _, mask, _ = HEADER.unpack(header.ljust(HEADER.size, b"\0"))
    if magic != MAGIC or not 0 < content <= size:
        raise CompilerError(f"the compiler wrote no plan: it begins with {magic!r}, names {content} of {size} bytes")
    return tuple(name for bit, name in enumerate(COMPILERS["rtx"]) if mask >> bit & 1)


def parse_report(lines: Sequence[str]) -> Report:
    """Reads the logger's messages of one build. Raises CompilerError where a part is missing."""
    listing = next((line for line in lines if line.startswith("Layers:")), None)
    if listing is None or "I/O Tensors:" not in listing:
        raise CompilerError("the compiler logged no list of layers; is its release another than the one pinned?")
    layers, _, ports = listing.partition("I/O Tensors:")
    activations = [int(n) for line in lines for n in re.findall(r"^Total Activation Memory: (\d+) bytes", line)]
    weights = [int(n) for line in lines for n in re.findall(r"^Total Weights Memory: (\d+) bytes", line)]
    dtypes, ranges = {}, {}
    for name, dtype, rest in re.findall(r"^ Name: ([^,]+), IOMode: \w+, DataType: (\w+), (.*)$", ports, re.MULTILINE):
        dtypes[name] = TYPES.get(dtype, dtype)
        shapes = re.findall(r"MinShape: \[([\d,]*)\], OptShape: \[([\d,]*)\], MaxShape: \[([\d,]*)\]", rest)
        if shapes:
            ranges[name] = [_bounds(found) for found in shapes]
    count = max((len(found) for found in ranges.values()), default=0)
    return Report(
        layers=tuple(_layer(line) for line in layers.splitlines() if line.startswith("Name: ")),
        dtypes=dtypes,
        profiles=tuple({name: found[i] for name, found in ranges.items()} for i in range(count)),
        activation_bytes=tuple(activations),
        weights_bytes=weights[-1] if weights else 0,
    )


def _layer(line: str) -> Layer:
    name, _, rest = line.removeprefix("Name: ").partition(", LayerType: ")
    kind, _, rest = rest.partition(", Inputs: ")
    inputs, _, rest = rest.partition(", Constants: ")
    nodes = frozenset(re.findall(r"\[ONNX Layer: ([^\]]+)\]", rest))
    return Layer(name, kind, tuple(TYPES.get(t, t) for t in re.findall(r"Datatype: (\w+)", inputs)), nodes)


def _bounds(found: tuple[str, ...]) -> Bounds:
    least, optimal, greatest = (tuple(int(n) for n in shape.split(",") if n) for shape in found)
    return least, optimal, greatest
