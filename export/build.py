"""Checkpoint -> bundle, read top to bottom.

Flows in: a checkpoint folder. Flows out: a bundle folder, whole or not at all: it is built under a temporary name and
renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import onnx_ir as ir
import torch

from tubelet.runtime.atomic import new_folder
from tubelet.runtime.bundle import (
    SCHEMA,
    TOKENIZER,
    Bundle,
    Component,
    Manifest,
    content_key,
    record,
    write_manifest,
)
from tubelet.runtime.strict import require

from .checkpoint import SPEC, Checkpoint
from .components import build_modules, components
from .content import place, weight_line, weights_digest
from .hashes import Hashes
from .lora import Lora, merged
from .ltx import open_ltx
from .names import Layout
from .parity import measure
from .published import CONFIG, INDEX, layout_of, pipeline_class
from .tracing import Source, Traced, trace_all
from .wan import open_wan

Report = Callable[[str], None]
WAN = ("WanPipeline", "WanImageToVideoPipeline")
LTX = ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline")
READERS = dict.fromkeys(WAN, open_wan) | dict.fromkeys(LTX, open_ltx)  # by diffusers' class of pipeline


def build(
    source: Path,
    output: Path,
    loras: Sequence[Lora] = (),
    copy: bool = False,
    on_stage: Report = lambda stage: None,
) -> Bundle:
    """Exports the checkpoint `source`, with adapters merged, to the bundle `output` and measures its parity.

    The bundle's weights are hard links to the checkpoint's files, or with `copy` copies of them. Raises UserError when
    the checkpoint is unreadable, its parameters do not fit its spec, or `output` exists or cannot be written.
    """
    with new_folder(output) as partial, Hashes() as hashes:
        on_stage("read the checkpoint")
        checkpoint = merged(open_checkpoint(source), loras)
        on_stage("merge")
        checkpoint = checkpoint.materialised(partial)
        for name, path in checkpoint.files.items():
            if path.parent != partial:
                place(path, partial / name, copy)
        shutil.copyfile(checkpoint.tokenizer, partial / TOKENIZER)
        graphs = write_graphs(checkpoint, partial, hashes, on_stage)
        weights = {name: hashes.file(partial / name) for name in checkpoint.files}
        on_stage("measure parity")
        parity = measure(checkpoint, partial)
        on_stage("hash files")
        others = {path.name: record(path) for path in partial.iterdir() if path.name not in weights}
        files = dict(sorted({**others, **{name: found.result() for name, found in weights.items()}}.items()))
        manifest = Manifest(
            schema=SCHEMA,
            key=content_key(checkpoint.spec, graphs, files[TOKENIZER]),
            provenance={"torch": torch.__version__.split("+")[0], "onnx_ir": ir.__version__},
            targets=("cpu",),
            spec=checkpoint.spec,
            components=graphs,
            weights=tuple(checkpoint.files),
            files=files,
            parity=tuple(parity),
        )
        write_manifest(partial, manifest)
    return Bundle(output, manifest)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint in tubelet's own layout or in one of the published ones.

    Raises UserError for a folder that is none of these, or of a pipeline that is not known.
    """
    require(folder.exists(), f"{folder} does not exist; give the folder that was downloaded")
    require(folder.is_dir(), f"{folder} is a file; give the folder that was downloaded")
    if (folder / SPEC).is_file():
        return Checkpoint.open(folder)
    layout = layout_of(folder)
    require(
        layout is not None,
        f"{folder} is not a checkpoint: it has no {INDEX} as diffusers' folders, no {CONFIG} beside shards as the "
        f"original releases, and no {SPEC} as tubelet's own",
    )
    if layout == Layout.ORIGINAL:
        return open_wan(folder)
    pipeline = pipeline_class(folder)
    require(pipeline in READERS, f"{folder} is of {pipeline}; known are {', '.join(READERS)}")
    return READERS[pipeline](folder)


def write_graphs(
    checkpoint: Checkpoint, folder: Path, hashes: Hashes, on_stage: Report = lambda stage: None
) -> dict[str, Component]:
    """Traces every component into `folder`; needs memory for graphs, not for weights."""
    with torch.device("meta"):
        contract = components(checkpoint.spec, build_modules(checkpoint.spec))
    source = Source(checkpoint.spec, checkpoint.tensors, folder)
    names = [component.name for component in contract]
    graphs, found = dict[str, Traced](), dict[str, Future[str]]()
    for traced in trace_all(source, names, lambda name: on_stage(f"trace {name}")):
        graphs[traced.component] = traced
        for name in traced.weights.keys() - found.keys():
            stored = checkpoint.tensors[name]
            found[name] = hashes.tensor(checkpoint.files[stored.file], stored)
    on_stage("hash weights")
    tensors = ((name, checkpoint.tensors[name], sha256.result()) for name, sha256 in found.items())
    lines = {name: weight_line(name, stored.dtype, stored.shape, sha256) for name, stored, sha256 in tensors}
    return {
        component.name: Component(
            graph=f"{component.name}.onnx",
            graph_digest=graphs[component.name].digest,
            weights_digest=weights_digest(lines[name] for name in graphs[component.name].weights),
            parameters=sum(graphs[component.name].weights.values()),
            inputs={name: port.shape for name, port in component.inputs.items()},
            outputs={name: port.shape for name, port in component.outputs.items()},
        )
        for component in contract
    }
