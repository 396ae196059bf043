"""`tubelet build`: a bundle's engines for GPUs, compiled on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..bundle import Bundle
from ..errors import UserError
from ..plans import Target
from .app import app, out
from .plans import Bars, records_tables

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
        float | None, typer.Option(help="GB of device memory that one engine's activations may take.")
    ] = None,
    jobs: Jobs = CORES,
) -> None:
    """Compile a bundle's engines for GPUs; needs none for the target rtx. Goes on where an earlier build stopped."""
    try:
        from tubelet.export.engines import build_engines  # noqa: TID251 needs no torch
        from tubelet.export.errors import CompilerError  # noqa: TID251
        from tubelet.export.profiles import choose  # noqa: TID251
        from tubelet.export.traffic import read_traffic  # noqa: TID251
    except ImportError as error:
        raise UserError(MISSING.format(error)) from error
    wanted = Target.parse(target, precision)
    opened = Bundle.open(bundle)
    profiles = choose(opened.spec, read_traffic(traffic, opened.spec), max_profiles).profiles
    for name in component or ():
        if name not in profiles:
            raise UserError(f"the bundle has no component {name!r}; it has {', '.join(profiles)}")
    profiles = {name: chosen for name, chosen in profiles.items() if not component or name in component}
    budget = None if memory is None else round(check_memory(memory) * 10**9)
    with Bars() as bars:
        try:
            built = build_engines(opened, wanted, profiles, jobs, budget, bars.step, bars.finish)
        except CompilerError as error:
            raise UserError(str(error)) from error
    out.print(*records_tables(built))


def check_memory(memory: float) -> float:
    """Raises UserError for a memory in GB that no GPU has."""
    if not 0 < memory <= MOST_MEMORY:
        raise UserError(f"--memory must be above 0 and at most {MOST_MEMORY} GB, is {memory:g}")
    return memory
