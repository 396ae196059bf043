"""What TensorRT says about a plan that it has loaded, on the GPU that it was built for.

Flows in: a plan. Flows out: the Report that `compiler_report.py` reads from a log where there is no GPU: ports,
profiles and memory as the engine states them, and the layers that its inspector lists.
"""

from __future__ import annotations

import json
import mmap
import re
from pathlib import Path
from typing import Any

from .compiler_report import Layer, Report
from .errors import CompilerError
from .profiles import Bounds

TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
WIDE = re.compile(r"\bfp32\b|\bfloat\b", re.IGNORECASE)


def load_report(trt: Any, logger: Any, plan: Path) -> Report:
    """Loads a plan and asks about it. Raises CompilerError where it cannot be loaded."""
    runtime = trt.Runtime(logger)
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise CompilerError(f"the plan cannot be loaded on the GPU that it was built on: {logger.problems()}")
    inspector = engine.create_engine_inspector()
    listing = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    every = range(engine.num_optimization_profiles)
    dtypes = {name: engine.get_tensor_dtype(name).name for name in names}
    bounds = {name: [_bounds(engine.get_tensor_profile_shape(name, profile)) for profile in every] for name in inputs}
    return Report(
        layers=tuple(_layer(each) for each in listing["Layers"]),
        dtypes={name: TYPES.get(dtype, dtype) for name, dtype in dtypes.items()},
        profiles=tuple({name: bounds[name][profile] for name in inputs} for profile in every),
        activation_bytes=tuple(engine.get_device_memory_size_for_profile_v2(profile) for profile in every),
        weights_bytes=engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE),
    )


def _bounds(shapes: Any) -> Bounds:
    least, optimal, greatest = (tuple(int(extent) for extent in shape) for shape in shapes)
    return least, optimal, greatest


def _layer(listed: Any) -> Layer:
    """A row of the inspector's: an object, or a name where it says no more."""
    if isinstance(listed, str):
        return Layer(listed, "", ())
    types = (str(port.get("Format/Datatype", "")) for port in listed.get("Inputs", ()))
    return Layer(
        name=str(listed.get("Name", "")),
        kind=str(listed.get("LayerType", "")),
        input_types=tuple("fp32" if WIDE.search(each) else each for each in types),
    )
