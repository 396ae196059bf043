"""A TensorRT without a GPU: the part of its API that `tubelet.runtime.tensorrt` uses, run by ONNX Runtime.

`build_plans` writes plans of the embedded bundle as `tubelet build` would: records of the real format, and files that
name a graph. Such a plan runs when its stream gets to it, on the memory that addresses point to. Stricter than TensorRT
where that shows mistakes: a context asserts that a profile is set before shapes, that shapes are inside it, that every
tensor has an address, and that scratch memory is as large as it asked for; it writes garbage there.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
from fake_device import FakeDevice, FakeStream
from numpy.typing import NDArray

from tubelet.runtime.bundle import EMBEDDED, Bundle, record, sizes
from tubelet.runtime.dtypes import DTYPES, from_float, from_plan
from tubelet.runtime.plans import Compiler, Measured, PlanRecord, Target, plan_key, plan_path, write_record
from tubelet.runtime.profiles import Profile, Range

WIDE = {"ids": "int64", "mask": "int64", "position": "int64"}  # by port; others have the target's precision
PRECISE = {"time_features", "rope_cos", "rope_sin"}
WEIGHTS_BYTES, SCRATCH_BYTES = 1 << 20, 64  # scratch: for each value of the first input
VERSION = "11.0.0.1"
RTX, RTX_FP16 = (Target("rtx", ("sm89",), precision) for precision in ("fp32", "fp16"))


class FakeTensorRt:
    """The module: `tensorrt_rtx` with a runtime cache, or `tensorrt` without."""

    def __init__(self, device: FakeDevice, kind: str = "rtx"):
        self.__name__ = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}[kind]
        self.__version__ = VERSION
        self.device = device
        self.failing: str | None = None  # the component that cannot run
        self.broken = False  # whether there is no runtime
        self.ILogger = type("ILogger", (), {"ERROR": 1, "__init__": lambda self: None})
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
        if kind == "rtx":
            self.IRuntimeCache = Cache
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def Runtime(self, logger: Any) -> Runtime:
        if self.broken:
            logger.log(1, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return Runtime(self, logger)


@dataclass
class Runtime:
    module: FakeTensorRt
    logger: Any

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            self.logger.log(1, "magic tag does not match")
            return None
        return Engine(self.module, plan, self.module.device.allocate(WEIGHTS_BYTES))


class Cache:
    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels:"):
            return False
        self.kernels = set(blob.decode().removeprefix("kernels:").split(",")) - {""}
        return True

    def serialize(self) -> bytes:
        return b"kernels:" + ",".join(sorted(self.kernels)).encode()


class RuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"
        self.strategy = "static"
        self.cache: Cache | None = None

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


@functools.cache
def load(graph: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(EMBEDDED / graph, options, providers=["CPUExecutionProvider"])


@dataclass
class Engine:
    module: FakeTensorRt
    plan: dict[str, Any]
    weights: Any  # memory, held by contexts too

    @property
    def session(self) -> ort.InferenceSession:
        return load(self.plan["graph"])

    def create_runtime_config(self) -> RuntimeConfig:
        assert hasattr(self.module, "IRuntimeCache"), "only TensorRT-RTX has one"
        return RuntimeConfig()

    def create_execution_context(self, settings: Any) -> Context:
        cache = None
        if isinstance(settings, RuntimeConfig):
            assert settings.dynamic_shapes_kernel_specialization_strategy == "eager"
            settings, cache = settings.strategy, settings.cache
        assert settings == "user managed"
        return Context(self, cache)


@dataclass
class Context:
    engine: Engine
    cache: Cache | None
    profile: Mapping[str, Any] | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    needed: int | None = None
    memory: tuple[int, int] | None = None

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._stream(stream_handle)
        self.profile = self.engine.plan["profiles"][profile_index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "a profile must be set first"
        least, most = self.profile[name]
        assert all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)), (name, shape, least, most)
        self.shapes[name], self.needed, self.memory = shape, None, None
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self.engine.plan["dtypes"]
        self.addresses[name] = memory
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        assert self.shapes.keys() == set(self.engine.plan["inputs"])
        self.needed = SCRATCH_BYTES * math.prod(next(iter(self.shapes.values())))
        return self.needed

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self.needed is not None and size >= self.needed
        self.memory = memory, size

    def execute_async_v3(self, stream_handle: int) -> bool:
        plan, addresses, shapes, memory = self.engine.plan, dict(self.addresses), dict(self.shapes), self.memory
        assert memory is not None and addresses.keys() == set(plan["dtypes"]), "a tensor has no address"
        stream = self._stream(stream_handle)
        if self.engine.plan["component"] == self.engine.module.failing:
            return False
        if self.cache is not None:
            self.cache.kernels.add(f"{plan['component']}-{'x'.join(str(n) for s in shapes.values() for n in s)}")

        def run() -> None:
            stream.device.bytes_at(*memory)[:] = 0x5A  # what others kept there is gone
            inputs = {name: self._read(name, addresses[name], shape) for name, shape in shapes.items()}
            results = self.engine.session.run(None, inputs)
            for port, values in zip(self.engine.session.get_outputs(), results, strict=True):
                self._write(port.name, addresses[port.name], values)

        stream.enqueue(run)
        return True

    def _read(self, name: str, address: int, shape: tuple[int, ...]) -> NDArray[Any]:
        dtype = self.engine.plan["dtypes"][name]
        size = math.prod(shape) * DTYPES[dtype].itemsize
        values = self.engine.module.device.bytes_at(address, size).view(DTYPES[dtype]).reshape(shape)
        return from_plan(values.copy(), dtype)

    def _write(self, name: str, address: int, values: NDArray[Any]) -> None:
        dtype = DTYPES[self.engine.plan["dtypes"][name]]
        stored = values if values.dtype == dtype else from_float(values, dtype)
        self.engine.module.device.bytes_at(address, stored.nbytes)[:] = (
            np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        )

    def _stream(self, handle: int) -> FakeStream:
        return next(stream for stream in self.engine.module.device.streams if stream.handle == handle)


def spans(bundle: Bundle) -> dict[str, list[Profile]]:
    """Two profiles for the denoiser, one for each other component: all that tests ask for."""
    every = {
        "B": Range(1, 2, 2),
        "L": Range(bundle.spec.text_encoder.length, *[bundle.spec.text_encoder.length] * 2),
        "N": Range(1, 27, 4096),
        "h": Range(2, 6, 16),
        "w": Range(2, 6, 16),
        "t": Range(1, 4, 4),
    }
    profiles = {}
    for name, component in bundle.manifest.components.items():
        symbols = {part for port in component.inputs.values() for extent in port for part in str(extent).split("*")}
        profiles[name] = [{symbol: extent for symbol, extent in every.items() if symbol in symbols}]
        if name == "captioner":
            profiles[name][0] = profiles[name][0] | {"B": Range(1, 1, 64)}
    small, large = Range(1, 27, 100), Range(101, 200, 4096)
    profiles["denoiser"] = [profiles["denoiser"][0] | {"N": extent} for extent in (small, large)]
    return profiles


def build_plans(
    bundle: Bundle,
    target: Target,
    profiles: Mapping[str, Sequence[Profile]] | None = None,
    weights: Mapping[str, int] | None = None,
    version: str = VERSION,
) -> None:
    """Writes a plan and a record of every component; `weights`: bytes that records claim, by component."""
    for name, wanted in (profiles or spans(bundle)).items():
        component = bundle.manifest.components[name]
        compiler = Compiler({"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}[target.compiler], version)
        ports = (*component.inputs, *component.outputs)
        dtypes = {port: WIDE.get(port, "fp32" if port in PRECISE else target.precision) for port in ports}
        bounds = [
            {
                port: [sizes(shape, {n: getattr(extent, at) for n, extent in profile.items()}) for at in ("min", "max")]
                for port, shape in component.inputs.items()
            }
            for profile in wanted
        ]
        content = {"component": name, "graph": component.graph, "inputs": list(component.inputs)}
        path = plan_path(bundle, target, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**content, "dtypes": dtypes, "profiles": bounds}))
        key = plan_key(bundle, name, target, compiler, wanted, None)
        measured = Measured((weights or {}).get(name, WEIGHTS_BYTES), (1024,) * len(wanted), 1, 0, 0, 0, (), 0.0, 0)
        written = PlanRecord(name, key, target, compiler, dtypes, tuple(wanted), None, record(path), measured)
        write_record(path, written)
