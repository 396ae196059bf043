"""The arrow of the design: runtime knows nothing of export, and both are imported as parts of `tubelet`.

pytest tests/test_layout.py
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def imports(folder: str) -> Iterator[tuple[str, str]]:
    """(file, absolute module) of every import under a folder, relative ones left out."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            yield from ((str(path.relative_to(ROOT)), name) for name in names)


def test_the_folders_are_no_packages_of_their_own() -> None:
    found = [i for f in ("runtime", "export", "tests", "benchmarks") for i in imports(f)]
    assert len(found) > 100
    assert not [i for i in found if i[1].split(".")[0] in ("runtime", "export")]


def test_only_the_command_line_knows_the_exporter() -> None:
    knowing = {file for file, module in imports("runtime") if module.startswith("tubelet.export")}
    assert knowing == {
        f"runtime/cli/{name}.py" for name in ("build", "bundles", "fleet", "plans", "profiles", "quantize")
    }
    assert not [i for i in imports("runtime") if i[1].split(".")[0] in ("torch", "onnx", "onnx_ir")]


def test_the_command_line_loads_no_exporter_and_planning_no_torch() -> None:
    code = """if True:
        import sys
        import tubelet.runtime.cli
        assert not [name for name in sys.modules if name.startswith("tubelet.export")]
        import tubelet.export.fleet
        assert not {"torch", "onnx", "onnx_ir", "onnxruntime"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
