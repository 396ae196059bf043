"""What this machine can run, and why not where it cannot.

Flows out: one Finding a part. Looks at what is installed; loads no model.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
from dataclasses import dataclass

from . import kernels, targets
from .bundle import EMBEDDED, Bundle
from .errors import UserError
from .memory import DeviceError


@dataclass(frozen=True)
class Finding:
    part: str
    works: bool
    detail: str


def examine() -> list[Finding]:
    """Every part that some target or command needs."""
    return [
        Finding("python", True, f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"),
        _extension(),
        _embedded(),
        _export(),
        _driver(),
        *map(_target, targets.TARGETS),
    ]


def _extension() -> Finding:
    if kernels.IMPLEMENTATION != "extension":
        return Finding("extension", False, "not built: NumPy does its work, slower")
    return Finding("extension", True, "built" if kernels.THREADED else "built without OpenMP: one thread")


def _target(name: str) -> Finding:
    try:
        return Finding(f"target {name}", True, targets.examine(name))
    except (UserError, DeviceError) as error:
        return Finding(f"target {name}", False, str(error))


def _export() -> Finding:
    """Whether the exporter's packages are there; they are not imported, torch takes seconds."""
    modules = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors")
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        return Finding("export", False, f"{', '.join(missing)} not installed: install tubelet with its extra export")
    return Finding("export", True, "all packages installed")


def _embedded() -> Finding:
    try:
        bundle = Bundle.open(EMBEDDED)
    except UserError as error:
        return Finding("embedded model", False, str(error))
    return Finding("embedded model", True, f"{bundle.spec.name}, key {bundle.key[:16]}")


def _driver() -> Finding:
    """Whether the NVIDIA driver answers and sees a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Finding("NVIDIA driver", False, "libcuda.so.1 is not found: no NVIDIA driver is installed")
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return Finding("NVIDIA driver", False, f"the driver sees no GPU (status {status})")
    return Finding("NVIDIA driver", True, f"{count.value} GPU")
