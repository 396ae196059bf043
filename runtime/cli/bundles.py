"""Commands about bundles, files and this machine: inspect, export, doctor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..bundle import EMBEDDED, Bundle
from ..doctor import examine
from ..errors import UserError
from ..plans import State, states
from ..precision import read_precision
from .app import app, err, out
from .output import read_recipe
from .plans import plans_tables
from .precision import precision_tables


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="Bundle folder, the embedded model if not given; or a file that tubelet made.")
    ] = EMBEDDED,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what a bundle holds (components, shapes, targets, hashes, parity, plans), or how a file was made."""
    if path.is_file():
        _inspect_file(path, as_json)
    else:
        _inspect_bundle(Bundle.open(path), as_json)


def _inspect_file(path: Path, as_json: bool) -> None:
    recipe = read_recipe(path)
    if recipe is None:
        raise UserError(f"{path} does not say how it was made; only files that tubelet wrote do")
    if as_json:
        out.print_json(data=vars(recipe))
        return
    out.print(
        f"made by tubelet {recipe.version}, command {recipe.command}, bundle key {recipe.bundle[:16]}", markup=False
    )
    table = Table("option", "value")
    for name, value in recipe.options.items():
        table.add_row(name, escape(value if isinstance(value, str) else json.dumps(value)))
    out.print(table)


def _inspect_bundle(opened: Bundle, as_json: bool) -> None:
    plans, precision = states(opened), read_precision(opened)
    if as_json:
        told = {
            **dataclasses.asdict(opened.manifest),
            "plans": [_plan(plan) for plan in plans],
            "precision": dataclasses.asdict(precision) if precision else None,
        }
        out.print_json(data=told)
        return
    spec, manifest = opened.spec, opened.manifest
    out.print(f"{spec.name}  key {opened.key[:16]}  targets {', '.join(manifest.targets)}", markup=False)
    defaults = ", ".join(f"{name} {value!r}" for name, value in vars(spec.defaults).items())
    route = f"known tokens by {spec.denoiser.route}"
    out.print(f"{spec.fps} fps, at most {spec.max_tokens} tokens, {route}; defaults: {defaults}", markup=False)
    components = Table("component", "parameters", "inputs", "outputs", title="Components")
    for name, component in manifest.components.items():
        components.add_row(name, f"{component.parameters:,}", _ports(component.inputs), _ports(component.outputs))
    files = Table("file", "bytes", "sha256", title="Files")
    for name, record in manifest.files.items():
        files.add_row(name, f"{record.bytes:,}", record.sha256[:16])
    parity = Table("component", "target", "shape", "max |difference|", "relative", title="Parity against torch")
    for row in manifest.parity:
        parity.add_row(row.component, row.target, row.shape, f"{row.max_abs:.1e}", f"{row.relative:.1e}")
    narrow = precision_tables(precision) if precision else ()
    out.print(components, files, parity, *narrow, *plans_tables(plans))
    for plan in plans:
        if plan.problem is not None:
            out.print(plan.problem, style="red", markup=False)


def _plan(state: State) -> dict[str, Any]:
    record = {} if state.record is None else dataclasses.asdict(state.record)
    return {"component": state.path.stem, **record, "path": str(state.path), "problem": state.problem}


def _ports(ports: Any) -> str:
    """Few ports one a line; the caches of a VAE only counted."""
    caches = [name for name in ports if "cache_" in name]
    lines = [f"{name} \\[{','.join(map(str, shape))}]" for name, shape in ports.items() if name not in caches]
    return "\n".join([*lines, f"{len(caches)} caches"] if caches else lines)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of Wan or LTX-Video as downloaded, or tubelet's own.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle folder to make.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(help="FILE:SCALE, merged into the weights; FILE:SCALE:high or :low for one expert; repeatable."),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the weights, instead of linking the files.")] = False,
) -> None:
    """Compile a checkpoint into a bundle (needs the extra `export`)."""
    try:
        from tubelet.export.build import build  # noqa: TID251 the one lazy exception
        from tubelet.export.lora import Lora  # noqa: TID251
    except ImportError as error:
        raise UserError(
            f"exporting needs a package that is missing ({error}); install tubelet with its extras export and cpu"
        ) from error
    with err.status("") as status:
        loras = [Lora.parse(text) for text in lora or []]
        made = build(checkpoint, output, loras, copy, status.update)
    worst = max(row.relative for row in made.manifest.parity)
    out.print(
        f"wrote {output}: {len(made.manifest.components)} components, key {made.key[:16]}, "
        f"at most {worst:.1e} from torch (relative)",
        markup=False,
    )


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Say what this machine can run, and why not where it cannot."""

    findings = examine()
    if as_json:
        out.print_json(data=[dataclasses.asdict(finding) for finding in findings])
        return
    table = Table("part", "works", "detail")
    for finding in findings:
        table.add_row(finding.part, "yes" if finding.works else "no", finding.detail)
    out.print(table)
