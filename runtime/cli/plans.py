"""How compiled plans and their building are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from ..plans import PlanRecord, State
from .app import err

if TYPE_CHECKING:
    from tubelet.export.compile import Event  # noqa: TID251 loaded by the commands alone

LONGEST = "Computing profile costs"  # the compiler's phase that takes nearly all of its time: kernels of each profile


def plans_tables(plans: Iterable[State]) -> list[Table]:
    """What plans are and take, a table for each target and release of its compiler."""
    return [_table(title, of) for title, of in groupby(plans, key=_title)]


def _title(plan: State) -> str:
    known = plan.record
    return plan.path.parent.name + (f", {known.compiler.name} {known.compiler.version}" if known else "")


def _table(title: str, plans: Iterable[State]) -> Table:
    table = Table(
        Column("component, key", no_wrap=True),
        *("profiles", "plan", "weights", "activations", "kernels", "time"),
        Column("state", no_wrap=True),
        title=title,
        title_justify="left",
    )
    for each in plans:
        name, told = each.path.stem, [""] * 6
        if each.record is not None:
            known, measured = each.record, each.record.measured
            name += f"\n{known.key[:16]}"
            told = [
                *(str(len(known.profiles)), decimal(known.file.bytes), decimal(measured.weights_bytes)),
                "\n".join(decimal(n) for n in measured.activation_bytes),
                *(str(measured.kernels), f"{measured.seconds:.0f} s"),
            ]
        table.add_row(name, *told, "bad" if each.problem else "good")
    return table


class Bars:
    """One bar a component that is being built: the compiler's phase and its layers, and the time left."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=err, transient=True, speed_estimate_period=math.inf)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def step(self, event: Event) -> None:
        if event.component not in self._tasks:
            self._tasks[event.component] = self._progress.add_task(event.component, total=1)
        self._progress.update(
            self._tasks[event.component],
            description=f"{event.component}: {event.phase.lower()}, {event.done} of {event.steps}",
            completed=event.done / event.steps if event.phase == LONGEST else None,
        )

    def finish(self, record: PlanRecord, kept: bool) -> None:
        if record.component in self._tasks:
            self._progress.remove_task(self._tasks.pop(record.component))
        self.say(f"{record.target.name} {record.component}: {'up to date' if kept else 'built'}")

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False)
