"""What this machine can run, and why not where it cannot.

Flows out: one Finding a part. Looks at what is installed; loads no model.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass

from . import kernels
from .bundle import EMBEDDED, Bundle
from .errors import UserError


@dataclass(frozen=True)
class Finding:
    part: str
    works: bool
    detail: str


def examine() -> list[Finding]:
    """Every part that some target or command needs."""
    extension = kernels.IMPLEMENTATION == "extension"
    return [
        Finding("python", True, f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"),
        Finding("kernels", True, "compiled extension" if extension else "NumPy, slower: the extension is not built"),
        _embedded(),
        _package("target cpu", "onnxruntime", "cpu"),
        _driver(),
        _package("target tensorrt", "tensorrt", "gpu"),
        _package("target rtx", "tensorrt_rtx", "rtx"),
        _package("export", "torch", "export"),
    ]


def _package(part: str, module: str, extra: str) -> Finding:
    """Whether a part's main package is installed."""
    if importlib.util.find_spec(module) is None:
        return Finding(part, False, f"{module} is not installed: pip install 'tubelet[{extra}]'")
    names = importlib.metadata.packages_distributions().get(module, [module])
    return Finding(part, True, f"{names[0]} {importlib.metadata.version(names[0])}")


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
