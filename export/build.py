"""Checkpoint -> bundle, read top to bottom.

Flows in: a checkpoint folder. Flows out: a bundle folder, whole or not at all: it is built under a temporary name and
renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch

from tubelet.runtime.bundle import (
    SCHEMA,
    TOKENIZER,
    WEIGHTS,
    Bundle,
    Component,
    Manifest,
    content_key,
    record,
    write_manifest,
)
from tubelet.runtime.errors import UserError

from .checkpoint import Checkpoint
from .components import build_modules, components
from .parity import measure
from .trace import trace


def build(source: Path, output: Path, on_stage: Callable[[str], None] = lambda stage: None) -> Bundle:
    """Exports the checkpoint `source` to the bundle `output` and measures its parity.

    Raises UserError when the checkpoint is unreadable, its parameters do not fit its spec, or `output` exists or cannot
    be written.
    """
    if output.exists():
        raise UserError(f"{output} exists; remove it or choose another folder")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is not a folder; create it first")
    checkpoint = Checkpoint.open(source)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"cannot write to {output.parent}: {error.strerror}; choose a writable folder") from error
    try:
        graphs = write_graphs(checkpoint, partial, on_stage)
        for name in (WEIGHTS, TOKENIZER):
            shutil.copyfile(source / name, partial / name)
        on_stage("measure parity")
        parity = measure(checkpoint, partial)
        files = {path.name: record(path) for path in sorted(partial.iterdir())}
        manifest = Manifest(
            schema=SCHEMA,
            key=content_key(checkpoint.spec, files),
            provenance={"torch": torch.__version__.split("+")[0], "onnx_ir": ir.__version__},
            targets=("cpu",),
            spec=checkpoint.spec,
            components=graphs,
            files=files,
            parity=tuple(parity),
        )
        write_manifest(partial, manifest)
        partial.chmod(0o755)
        os.rename(partial, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle.open(output)


def write_graphs(
    checkpoint: Checkpoint, folder: Path, on_stage: Callable[[str], None] = lambda stage: None
) -> dict[str, Component]:
    """Traces every component into `folder`; needs memory for graphs, not for weights."""
    with torch.device("meta"):
        modules = build_modules(checkpoint.spec)
    checkpoint.check(
        {f"{prefix}.{name}": t.shape for prefix, module in modules.items() for name, t in module.state_dict().items()}
    )
    written = {}
    for component in components(checkpoint.spec, modules):
        on_stage(f"trace {component.name}")
        graph = trace(component, checkpoint.tensors)
        ir.save(graph, folder / f"{component.name}.onnx")
        constants = [value.const_value for value in graph.graph.initializers.values()]
        written[component.name] = Component(
            graph=f"{component.name}.onnx",
            parameters=sum(int(c.size) for c in constants if isinstance(c, ir.ExternalTensor)),
            inputs={name: port.shape for name, port in component.inputs.items()},
            outputs={name: port.shape for name, port in component.outputs.items()},
        )
    return written
