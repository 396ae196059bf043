"""`tubelet fleet plan | build | check`: what a fleet needs built, where, and whether it is there and fits."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..errors import UserError
from ..plans import Target
from .app import app, err, out
from .build import CORES, MISSING, Jobs
from .plans import Bars
from .profiles import describe, print_outside

if TYPE_CHECKING:
    from tubelet.export.fleet import FleetPlan  # noqa: TID251 loaded by the command alone

FleetPath = Annotated[Path, typer.Argument(help="fleet.toml, or the folder that holds it: see docs/compile.md.")]
fleet = typer.Typer(no_args_is_help=True, help="Plans, builds and checks what a fleet of machines needs.")
app.add_typer(fleet, name="fleet")


@fleet.command()
def plan(
    path: FleetPath,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Print every plan to build and every component x SKU x profile. Exits with 1 if not all can be served."""
    from tubelet.export.fleet import plan_fleet  # noqa: TID251 needs no torch

    planned = plan_fleet(_file(path))
    if as_json:
        out.print_json(data=_report(planned))
    else:
        _print(planned)
    if not planned.complete:
        raise typer.Exit(1)


@fleet.command()
def build(
    path: FleetPath,
    *,
    jobs: Jobs = CORES,
) -> None:
    """Build all engines that any machine can; print a shell line for each other machine. Exits with 1 if some is left.

    Goes on where an earlier build stopped.
    """
    try:
        from tubelet.export.fleet import plan_fleet  # noqa: TID251 needs no torch
        from tubelet.export.fleet_build import build_fleet  # noqa: TID251
    except ImportError as error:
        raise UserError(MISSING.format(error)) from error
    planned = plan_fleet(_file(path))
    with Bars() as bars:
        rest = build_fleet(planned, jobs, lambda order: bars.say(f"{order.model}:"), bars.step, bars.finish)
    for each in rest:
        order = each.order
        err.print(
            f"not built: {order.model} {order.target.name} {', '.join(order.profiles)}: {each.reason}", markup=False
        )
    for each in rest:
        if each.command is not None:
            out.print(each.command, markup=False)
    _print_outside(planned, err)
    if rest or any(planned.outside.values()):
        raise typer.Exit(1)


@fleet.command()
def check(
    path: FleetPath,
) -> None:
    """Prove that a folder serves its fleet: every plan is there, whole, for this traffic, and fits into memory.

    Exits with 1 and a list of what is missing if it does not.
    """
    from tubelet.export.fleet import plan_fleet  # noqa: TID251 needs no torch
    from tubelet.export.fleet_check import check_fleet  # noqa: TID251

    planned = plan_fleet(_file(path))
    holes = check_fleet(planned)
    for hole in holes:
        what = hole.model if hole.component is None else f"{hole.model} {hole.component}"
        out.print(f"{what} on {', '.join(hole.skus)}: {hole.reason}", markup=False)
    _print_outside(planned)
    if holes or any(planned.outside.values()):
        raise typer.Exit(1)
    out.print(f"{len(planned.builds)} plans serve all {len(planned.cells)} cells")


def _file(path: Path) -> Path:
    return path / "fleet.toml" if path.is_dir() else path


def _report(planned: FleetPlan) -> dict[str, Any]:
    """What `plan --json` prints."""
    return {
        "fleet": dataclasses.asdict(planned.fleet),
        "builds": [
            {**dataclasses.asdict(build), "can_be_built": build.target.can_be_built} for build in planned.builds
        ],
        "cells": [dataclasses.asdict(cell) for cell in planned.cells],
        "loading": {
            model: [dataclasses.asdict(each) for each in loading] for model, loading in planned.loading.items()
        },
        "outside": {model: [dataclasses.asdict(each) for each in shapes] for model, shapes in planned.outside.items()},
        "complete": planned.complete,
    }


def _print(planned: FleetPlan) -> None:
    for model in planned.fleet.models:
        out.print(_matrix(planned, model))
    builds = Table("model", "component", "compiler", "precision", "architectures", "build", "plan", title="Builds")
    for build in planned.builds:
        builds.add_row(
            *(build.model, build.component, build.target.compiler, build.target.precision),
            *(" ".join(build.target.architectures), _where(build.target), decimal(build.plan_bytes)),
        )
    machines = Table("SKU", "count", "architecture", "memory", "plans on disk", "in all", title="Machines")
    for sku in planned.fleet.sku:
        disk = planned.disk_bytes(sku.name)
        machines.add_row(
            *(sku.name, str(sku.count), sku.architecture, f"{sku.memory_gb:g} GB"),
            *(decimal(disk), decimal(disk * sku.count)),
        )
    out.print(builds, machines)
    _print_outside(planned)
    for where, count in Counter(_where(build.target) for build in planned.builds).items():
        out.print(f"plans to build {where}: {count}", markup=False)
    for model, loading in planned.loading.items():
        for each in loading:
            out.print(f"{model} on {each.sku}: {each.sentence}", style=None if each.fits else "red", markup=False)


def _where(target: Target) -> str:
    """Where a plan is built."""
    return (
        (f"on {target.gpu}" if target.gpu else "here")
        if target.can_be_built
        else f"nowhere yet, being {target.precision}"
    )


def _print_outside(planned: FleetPlan, to: Console = out) -> None:
    for model, outside in planned.outside.items():
        print_outside(outside, f"outside {model}", to)


def _matrix(planned: FleetPlan, model: str) -> Table:
    """What every component takes in every profile, a column for each SKU."""
    skus = [sku.name for sku in planned.fleet.sku]
    profiles = {build.component: build.profiles for build in planned.builds if build.model == model}
    cells = {(cell.component, cell.profile, cell.sku): cell for cell in planned.cells if cell.model == model}
    table = Table("component", "profile", *skus, title=f"Memory of {model}")
    for component, chosen in profiles.items():
        for index, profile in enumerate(chosen):
            row = [cells[component, index, sku] for sku in skus]
            table.add_row(component, describe(profile), *(decimal(cell.memory_bytes) for cell in row))
    return table
