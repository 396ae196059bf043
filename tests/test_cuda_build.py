"""What the CUDA compiler made: the fatbin that is installed beside the extension.

Proves: machine code for every architecture of the targets and PTX for later ones; no kernel spills or uses local
memory; those that move 16 bytes do so in every access to arrays; the driver has the functions that `cuda.py` calls;
the extension links to no CUDA library. Skipped where it was built without nvcc, or cuobjdump and nvdisasm are missing.

Run: pytest tests/test_cuda_build.py
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tubelet.runtime import _kernels, cuda
from tubelet.runtime.errors import UserError

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
SYMBOLS = re.findall(r"KERNEL\((tubelet_\w+)", (ROOT / "csrc/cuda/symbols.h").read_text())
PIP_TOOLS = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"


def cuobjdump(*options: str) -> str:
    path = os.pathsep.join([str(PIP_TOOLS), os.environ["PATH"]])
    if not all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")):
        pytest.skip("cuobjdump and nvdisasm are not installed")
    try:
        fatbin = cuda.fatbin()
    except UserError as error:
        pytest.skip(str(error))
    command = ["cuobjdump", *options, str(fatbin)]
    return subprocess.run(command, env=os.environ | {"PATH": path}, check=True, text=True, capture_output=True).stdout


def by_kernel(listing: str, start: str) -> dict[tuple[str, str], str]:
    """(architecture, symbol) -> its part of a listing, where `start` matches a kernel's first line."""
    found = {}
    for part in listing.split("Fatbin elf code:")[1:]:
        arch = re.findall(r"arch = sm_(\d+)", part)[0]
        _, *pieces = re.split(start, part)
        found |= {(arch, symbol): text for symbol, text in zip(pieces[::2], pieces[1::2], strict=True)}
    return found


def test_every_architecture_has_every_kernel_and_later_ones_have_ptx() -> None:
    assert re.findall(r"sm_(\d+)\.cubin", cuobjdump("--list-elf")) == ARCHITECTURES
    assert re.findall(r"sm_(\d+)\.ptx", cuobjdump("--list-ptx")) == ARCHITECTURES[:1]
    ptx = cuobjdump("--dump-ptx")
    assert set(re.findall(r"\.entry (\w+)", ptx)) == set(SYMBOLS)
    assert not re.findall(r"\.local|depot", ptx)


def test_no_kernel_spills_or_uses_local_memory() -> None:
    resources = by_kernel(cuobjdump("--dump-resource-usage"), r"Function (tubelet_\w+):")

    assert set(resources) == {(arch, symbol) for arch in ARCHITECTURES for symbol in SYMBOLS}
    for kernel, usage in resources.items():
        assert "STACK:0 SHARED:0 LOCAL:0 " in usage, f"{kernel}: {usage}"


def test_16_bytes_are_moved_at_once() -> None:
    """Every access of the wide kernels, but the one to `known`, and none of the narrow ones; all to global memory."""
    code = by_kernel(cuobjdump("--dump-sass"), r"Function : (tubelet_\w+)")

    assert set(code) == {(arch, symbol) for arch in ARCHITECTURES for symbol in SYMBOLS}
    for (arch, symbol), sass in code.items():
        accesses = re.findall(r"\b(LDG|STG|LD|ST|LDL|STL)\.([\w.]*)", sass)
        where, kinds = f"{symbol} on sm_{arch}: {accesses}", {kind for kind, _ in accesses}
        wide = [width.endswith("128") or ".128." in width for _, width in accesses]
        assert kinds <= {"LDG", "STG"} and "STG" in kinds, where
        assert ("LDG" in kinds) == ("rope3d" not in symbol), where
        if symbol.endswith("_at"):  # it reads its arguments too
            direct = code[arch, symbol.removesuffix("_at")]
            assert wide.count(True) == len(re.findall(r"\b(?:LDG|STG)\.[\w.]*128", direct)), where
            continue
        narrow = 1 if "guided_step" in symbol else 0
        assert wide.count(False) == narrow if moves_16_bytes(symbol) else not any(wide), where


def moves_16_bytes(symbol: str) -> bool:
    """From the name's end: bits of an element times elements."""
    bits, count = re.findall(r"(\d+)x(\d+)$", symbol)[0]
    return int(bits) * int(count) == 128


@pytest.mark.parametrize(("release", "built"), [("12.4", False), ("12.8", True), ("13.0", True)])
def test_an_older_cuda_is_passed_over(tmp_path: Path, release: str, built: bool) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)

    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DTUBELET_NVCC={nvcc}"]
    told = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    assert (f"{nvcc} is of CUDA {release}; sm_120 needs 12.8 or later" in told) != built
    assert ("built without CUDA kernels" in told) != built
    made = (tmp_path / "build").rglob("*tubelet_fatbin*")
    assert bool(list(made)) == built


def test_the_extension_links_to_no_cuda_library() -> None:
    assert b"libcud" not in Path(_kernels.__file__).read_bytes()


def test_the_driver_has_what_is_called() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    tree = ast.parse(Path(cuda.__file__).read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.lower()[:2] == "cu"}
    enums = [getattr(driver, name) for name in used if name.startswith("CU") and hasattr(driver, name)]

    assert {"cuLaunchKernel", "cuMemAlloc", "CUresult", "CU_STREAM_NON_BLOCKING"} <= used
    assert not [name for name in used if not any(hasattr(owner, name) for owner in (driver, *enums))]
