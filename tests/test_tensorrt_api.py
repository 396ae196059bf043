"""Every name of TensorRT, TensorRT-RTX and cuda-python that our code uses exists, and takes the arguments it is given.

Proves it on the installed tensorrt_rtx and cuda-python; and on the bindings of TensorRT for servers, whose wheel is
downloaded and imported with stubs in place of its libraries. Where the wheel cannot be had, on what was last read from
it: `enterprise_api.json`, which is written anew by `python tests/test_tensorrt_api.py`.

Run: pytest tests/test_tensorrt_api.py
"""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from tensorrt_api import ROOT, Api, Use, api_of, misuse, stub_libraries, used

from tubelet.runtime.plans import COMPILERS

BINDINGS = "tensorrt-cu13-bindings"
KNOWN = Path(__file__).with_name("enterprise_api.json")
ONLY_RTX = {  # behind `hasattr`
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ComputeCapability",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IRuntimeCache",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
}


@pytest.fixture(scope="module")
def rtx() -> Api:
    pytest.importorskip("tensorrt_rtx")
    return api_of("tensorrt_rtx")


@pytest.fixture(scope="module")
def uses(rtx: Api) -> list[Use]:
    return used(rtx)


def enterprise() -> Api:
    """What the bindings offer. Raises CalledProcessError where their wheel cannot be had."""
    with tempfile.TemporaryDirectory() as folder:
        version = json.loads(KNOWN.read_text())["__version__"] if KNOWN.exists() else None
        wanted = f"{BINDINGS}=={version}" if version else BINDINGS
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, wanted]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        (wheel,) = Path(folder).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
        stub_libraries(Path(folder))
        return api_of("tensorrt_bindings", Path(folder))


def of_uses(api: Api, uses: list[Use]) -> Api:
    """The part of an API that is used."""
    names = sorted({use.name for use in uses})
    return {"__version__": api["__version__"], **{name: api[name] for name in names if name in api}}


def test_the_reader_sees_what_is_used(uses: list[Use]) -> None:
    """Calls on results and attributes, assigned properties, methods that are overridden, and names behind hasattr."""
    names = {use.name for use in uses}

    assert ("IExecutionContext.set_input_shape", (2, ())) in {(use.name, use.arguments) for use in uses}
    assert ("ParserError.desc", (0, ())) in {(use.name, use.arguments) for use in uses}
    assert "IBuilderConfig.profiling_verbosity" in {use.name for use in uses if use.assigned}
    assert {"ILogger.log", "IStreamWriter.write", "IProgressMonitor.step_complete"} <= names
    assert {"IRuntimeCache", "IRuntimeCache.serialize", "BuilderFlag.TF32"} <= names
    assert len(names) > 40


def test_the_check_sees_mistakes() -> None:
    signature = ["f(self: m.A, name: str, shape: tuple[int, int] = (1, 2)) -> bool"]
    for use, offered in (
        (Use("A.f", "x", (0, ())), signature),
        (Use("A.f", "x", (3, ())), signature),
        (Use("A.f", "x", (1, ("size",))), signature),
        (Use("A.f", "x"), None),
        (Use("A.p", "x", assigned=True), "property"),
        (Use("A.p", "x", (0, ())), "settable"),
    ):
        assert misuse(use, offered), use
    assert not misuse(Use("A.f", "x", (1, ("shape",))), signature)


def test_tensorrt_rtx_has_what_is_used(rtx: Api, uses: list[Use]) -> None:
    assert not [wrong for use in uses if (wrong := misuse(use, rtx.get(use.name)))]
    assert not [name for name in COMPILERS["rtx"] if f"ComputeCapability.{name.upper()}" not in rtx]


def test_tensorrt_had_what_is_used(uses: list[Use]) -> None:
    known = json.loads(KNOWN.read_text())
    assert not [wrong for use in uses if use.name not in ONLY_RTX and (wrong := misuse(use, known.get(use.name)))]
    assert not ONLY_RTX & set(known)


def test_tensorrt_has_what_is_used(uses: list[Use]) -> None:
    """The same on the wheel itself."""
    try:
        api = enterprise()
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"{BINDINGS} cannot be had: {error}")
    assert of_uses(api, uses) == json.loads(KNOWN.read_text())


def test_cuda_python_takes_the_arguments_it_is_given() -> None:
    """Calls through `call(function, ...)`; that the names exist is in `test_cuda_build.py`."""
    driver = pytest.importorskip("cuda.bindings.driver")
    checked = 0
    for node in ast.walk(ast.parse((ROOT / "runtime/cuda.py").read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        functions = [i for i, a in enumerate(node.args) if isinstance(a, ast.Attribute) and a.attr.startswith("cu")]
        if functions and not any(isinstance(argument, ast.Starred) for argument in node.args):
            function = node.args[functions[0]]
            assert isinstance(function, ast.Attribute)
            parameters = inspect.signature(getattr(driver, function.attr)).parameters
            assert len(parameters) == len(node.args) - functions[0] - 1, (function.attr, node.lineno)
            checked += 1
    assert checked > 20


if __name__ == "__main__":
    KNOWN.unlink(missing_ok=True)
    now = of_uses(enterprise(), used(api_of("tensorrt_rtx")))
    KNOWN.write_text(json.dumps(now, indent=1) + "\n")
