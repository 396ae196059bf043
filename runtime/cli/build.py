"""`tubelet build`: a bundle's engines for GPUs, compiled on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..bundle import Bundle
from ..errors import UserError
from ..plans import PlanRecord, Target
from .app import app, err, out

if TYPE_CHECKING:
    from tubelet.export.engines import Event  # noqa: TID251 loaded by the command alone


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder; its plans go to its folder engines.")],
    *,
    target: Annotated[str, typer.Option(help="Compiler and GPU architectures, such as rtx:sm89,sm120.")],
    traffic: Annotated[Path, typer.Option(help="TOML file of shapes and their shares: see docs/compile.md.")],
    precision: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    max_profiles: Annotated[int, typer.Option(min=1, help="Most profiles of one engine.")] = 4,
    memory: Annotated[
        float | None, typer.Option(min=0.001, help="GB of device memory that one engine's activations may take.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Components built at the same time.")] = os.cpu_count() or 1,
) -> None:
    """Compile a bundle's engines for GPUs; needs none for the target rtx. Goes on where an earlier build stopped."""
    try:
        from tubelet.export.engines import build_engines  # noqa: TID251 needs no torch
        from tubelet.export.errors import CompilerError  # noqa: TID251
        from tubelet.export.profiles import choose  # noqa: TID251
        from tubelet.export.traffic import read_traffic  # noqa: TID251
    except ImportError as error:
        raise UserError(
            f"building needs a package that is missing ({error}); install tubelet with its extra build"
        ) from error
    wanted = Target.parse(target, precision)
    opened = Bundle.open(bundle)
    choice = choose(opened.spec, read_traffic(traffic, opened.spec), max_profiles)
    budget = None if memory is None else int(memory * 10**9)
    with _Bars() as bars:
        try:
            built = build_engines(opened, wanted, choice.profiles, jobs, budget, bars.step, bars.finish)
        except CompilerError as error:
            raise UserError(str(error)) from error
    out.print(records_table(built, wanted.name))


def records_table(records: list[PlanRecord], title: str) -> Table:
    """What plans are and take."""
    table = Table(
        *("component", "profiles", "plan", "weights", "activations", "attention", "kernels", "time"),
        title=title,
    )
    for each in records:
        measured = each.measured
        table.add_row(
            *(each.component, str(len(each.profiles)), decimal(each.file.bytes), decimal(measured.weights_bytes)),
            " ".join(decimal(n) for n in measured.activation_bytes),
            *(str(measured.fused_attentions), str(measured.layers), f"{measured.seconds:.0f} s"),
        )
    return table


class _Bars:
    """One bar a component that is being built, with the compiler's phase, its layers and the time left of it."""

    def __init__(self) -> None:
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")),
            *(TimeElapsedColumn(), TimeRemainingColumn()),
        )
        self._progress = Progress(*columns, console=err, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def step(self, event: Event) -> None:
        if event.component not in self._tasks:
            self._tasks[event.component] = self._progress.add_task(event.component)
        self._progress.update(
            self._tasks[event.component],
            description=f"{event.component}: {event.phase.lower()}",
            completed=event.done,
            total=event.steps,
        )

    def finish(self, record: PlanRecord, kept: bool) -> None:
        if record.component in self._tasks:
            self._progress.remove_task(self._tasks.pop(record.component))
        self._progress.console.print(f"{record.component}: {'up to date' if kept else 'built'}", markup=False)
