"""What our code uses of TensorRT's two Python modules, read from its source, and what the modules offer.

`used` follows names through a file: `trt` is the module, the result of a call has the type that the module says it has,
and FILES names what comes from elsewhere. `python tests/tensorrt_api.py MODULE` prints what a module offers. The
bindings of TensorRT for servers import without its libraries where those of `stub_libraries` are loaded.
"""

from __future__ import annotations

import ast
import ctypes
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MODULE = "trt"
FILES: dict[str, Mapping[str, str]] = {  # by variable: the type of what is not made in the file
    "runtime/tensorrt.py": {
        "module": MODULE,
        "_native": "Runtime",
        "engine": "ICudaEngine",
        "_engine": "ICudaEngine",
        "context": "IExecutionContext",
        "_context": "IExecutionContext",
    },
    "runtime/kernel_cache.py": {"config": "IRuntimeConfig", "cache": "IRuntimeCache", "_cache": "IRuntimeCache"},
    "runtime/compiler_log.py": {},
    "export/compile.py": {"builder": "Builder", "network": "INetworkDefinition"},
}

Api = Mapping[str, Any]  # "Type.member" -> "value", "property", "settable" or the signatures of a method


@dataclass(frozen=True)
class Use:
    """One mention of a name of the module."""

    name: str  # "Builder" or "Builder.create_network"
    where: str
    arguments: tuple[int, tuple[str, ...]] | None = None  # how many, and the names of those that have one; if called
    assigned: bool = False


class _Reader(ast.NodeVisitor):
    def __init__(self, file: str, api: Api):
        self.file, self.api, self.uses = file, api, []
        self.types = {MODULE: MODULE, **FILES[file]}

    def visit_Assign(self, node: ast.Assign) -> None:
        target = node.targets[0]
        if isinstance(target, ast.Name) and (kind := self.type_of(node.value)):
            self.types[target.id] = kind
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            owner, name = self.type_of(node.args[0]), node.args[1]
            if owner and isinstance(name, ast.Constant):
                self.note(owner, str(name.value), node)
        if isinstance(node.func, ast.Attribute) and (owner := self.type_of(node.func.value)):
            arguments = len(node.args), tuple(str(keyword.arg) for keyword in node.keywords)
            if not any(isinstance(argument, ast.Starred) for argument in node.args):
                self.note(owner, node.func.attr, node, arguments)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if owner := self.type_of(node.value):
            self.note(owner, node.attr, node, assigned=isinstance(node.ctx, ast.Store))
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            if kind := self.type_of(base):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and f"{kind}.{method.name}" in self.api:
                        self.note(kind, method.name, method)
        self.generic_visit(node)

    def note(self, owner: str, name: str, node: Any, arguments: Any = None, assigned: bool = False) -> None:
        full = name if owner == MODULE else f"{owner}.{name}"
        if name not in ("__name__", "__version__"):
            self.uses.append(Use(full, f"{self.file}:{node.lineno}", arguments, assigned))

    def type_of(self, node: ast.expr) -> str | None:
        """The type of an expression, the module itself being one; None where it is not the module's."""
        if isinstance(node, ast.Name):
            return self.types.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value)
            if owner is None:
                return self.types.get(node.attr) if isinstance(node.value, ast.Name) else None
            return node.attr if owner == MODULE else owner if self.api.get(f"{owner}.{node.attr}") == "value" else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = self.type_of(node.func.value)
            if owner == MODULE:
                return node.func.attr
            signatures = self.api.get(f"{owner}.{node.func.attr}")
            if isinstance(signatures, list):
                name = re.split(r"[.:]+", signatures[0].rpartition("-> ")[2])[-1]
                return name if name in self.api else name.removeprefix("I")  # what is bound later has C++'s name
        return None


def used(api: Api) -> list[Use]:
    """Every use in our files; `api` says the types of results."""
    uses = []
    for file in FILES:
        reader = _Reader(file, api)
        reader.visit(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        uses += reader.uses
    return uses


def misuse(use: Use, offered: Any) -> str | None:
    """What is wrong with a use of what a module offers under its name, None where nothing is."""
    if offered is None:
        return f"{use.where}: there is no {use.name}"
    if use.assigned and offered != "settable":
        return f"{use.where}: {use.name} cannot be set"
    if use.arguments is None or offered == "value":
        return None
    if not isinstance(offered, list):
        return f"{use.where}: {use.name} cannot be called"
    count, names = use.arguments
    if any(_takes(signature, count, names) for signature in offered):
        return None
    return f"{use.where}: {use.name} takes {' or '.join(offered)}, is given {count} and {names}"


def _takes(signature: str, count: int, names: tuple[str, ...]) -> bool:
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    parameters = [part.strip() for part in re.split(r",\s*(?=[\w*]+(?::|$))", inside) if part.strip()]
    parameters = [part for part in parameters if not part.startswith("self")]
    named = [part.partition(":")[0] for part in parameters]
    needed = [name for name, part in zip(named, parameters, strict=True) if "=" not in part]
    given = {*named[:count], *names}
    return count <= len(named) and set(names) <= set(named) and set(needed) <= given


def offers(module: Any) -> Iterator[tuple[str, Any]]:
    """(name, what it is) of everything public in a module and in its classes."""
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        yield name, "value"
        if isinstance(value, type):
            for base in reversed(value.__mro__[:-2]):
                for member, each in vars(base).items():
                    if not member.startswith("_"):
                        yield f"{name}.{member}", _kind(each, member)
            yield name, _kind(vars(value).get("__init__"), "__init__")


def _kind(member: Any, name: str) -> Any:
    if isinstance(member, property):
        return "property" if member.fset is None else "settable"
    text = inspect.getdoc(member) or ""
    signatures = re.findall(rf"^(?:\d+\. )?({name}\(.*?\) -> .*)$", text, re.MULTILINE)
    return [s for s in signatures if "*args" not in s] or "value" if callable(member) else "value"


def api_of(module: str, search: Path | None = None) -> dict[str, Any]:
    """What a module offers, asked in a process of its own: two of these modules do not load into one."""
    command = [sys.executable, __file__, module, *([str(search)] if search else [])]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def stub_libraries(bindings: Path) -> list[Path]:
    """Compiles libraries that have the symbols which the bindings' shared object asks of TensorRT, and nothing else."""
    shared = next(bindings.glob("*_bindings/tensorrt.so"))
    symbols = rb"\0(create\w+_INTERNAL|get\w*PluginRegistry|getNvOnnxParserVersion|initLib\w+)(?=\0)"
    names = set(re.findall(symbols, shared.read_bytes()))
    code = "".join(f'extern "C" void* {name.decode()}() {{ return nullptr; }}\n' for name in sorted(names))
    source = bindings / "stubs.cpp"
    source.write_text(code)
    wanted = re.findall(rb"lib(?:nvinfer|nvinfer_plugin|nvonnxparser)\.so\.\d+", shared.read_bytes())
    made = [bindings / name.decode() for name in sorted(set(wanted))]
    for library in made:
        soname = f"-Wl,-soname,{library.name}"
        subprocess.run(["c++", "-shared", "-fPIC", soname, str(source), "-o", str(library)], check=True)
    return made


def main() -> None:
    name, *folder = sys.argv[1:]
    for path in folder:
        sys.path.insert(0, path)
        for library in sorted(Path(path).glob("*.so.*")):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    module = import_module(name)
    print(json.dumps({**dict(offers(module)), "__version__": module.__version__}))


if __name__ == "__main__":
    main()
