"""`tubelet build`: a bundle's engines for GPUs, compiled on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..bundle import Bundle
from ..errors import UserError
from ..plans import State, Target, plan_path
from .app import app, err, out
from .plans import Bars, plans_tables
from .profiles import print_outside

Jobs = Annotated[int, typer.Option(min=1, help="Plans built at the same time.")]
CORES = os.cpu_count() or 1
MOST_MEMORY = 10_000  # GB
MISSING = "building needs a package that is missing ({}); install tubelet with its extra build"


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder; its plans go to its folder engines.")],
    *,
    target: Annotated[str, typer.Option(help="Compiler and GPU architectures, such as rtx:sm89,sm120.")],
    traffic: Annotated[Path, typer.Option(help="TOML file of shapes and their shares: see docs/compile.md.")],
    precision: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    max_profiles: Annotated[int, typer.Option(min=1, help="Most profiles of one engine.")] = 4,
    component: Annotated[list[str] | None, typer.Option(help="Build this one alone; may be repeated.")] = None,
    memory: Annotated[
        float | None, typer.Option(help="GB of the smallest GPU that loads the plans; without limit, if not given.")
    ] = None,
    jobs: Jobs = CORES,
) -> None:
    """Compile a bundle's engines for GPUs; needs none for the target rtx. Goes on where an earlier build stopped.

    Exits with 1 if some of the traffic falls outside.
    """
    try:
        from tubelet.export.engines import build_engines  # noqa: TID251 needs no torch
        from tubelet.export.errors import CompilerError  # noqa: TID251
        from tubelet.export.profiles import choose  # noqa: TID251
        from tubelet.export.traffic import read_traffic  # noqa: TID251
    except ImportError as error:
        raise UserError(MISSING.format(error)) from error
    wanted = Target.parse(target, precision)
    opened = Bundle.open(bundle)
    choice = choose(opened.spec, read_traffic(traffic, opened.spec), max_profiles)
    profiles = choice.profiles
    for name in component or ():
        if name not in profiles:
            raise UserError(f"the bundle has no component {name!r}; it has {', '.join(profiles)}")
    profiles = {name: chosen for name, chosen in profiles.items() if not component or name in component}
    if memory is not None:
        check_memory(memory)
    with Bars() as bars:
        try:
            built = build_engines(opened, wanted, profiles, jobs, memory, bars.step, bars.finish)
        except CompilerError as error:
            raise UserError(str(error)) from error
    out.print(*plans_tables(State(plan_path(opened, each.target, each.component), each, None) for each in built))
    print_outside(choice.outside, to=err)
    if choice.outside:
        raise typer.Exit(1)


def check_memory(memory: float) -> None:
    """Raises UserError for a memory in GB that no GPU has."""
    if not 0 < memory <= MOST_MEMORY:
        raise UserError(f"--memory must be above 0 and at most {MOST_MEMORY} GB, is {memory:g}")
