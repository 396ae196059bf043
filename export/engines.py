"""A bundle + a target -> all plans that are missing, built by parallel processes.

Flows in: a bundle, a target and profiles by component. Flows out: plans beside their records. A plan whose key matches
is kept, so that an interrupted build goes on where it was; what was being built then leaves nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import cast

from tubelet.runtime.bundle import Bundle
from tubelet.runtime.errors import UserError
from tubelet.runtime.plans import (
    FOLDER,
    PlanRecord,
    Target,
    plan_key,
    plan_path,
    read_record,
    verify_plan,
    write_record,
)
from tubelet.runtime.profiles import Profiles
from tubelet.runtime.tensorrt import compiler_of, load_module

from .compile import GRAPH, PLAN, Event, Job
from .errors import CompilerError
from .precision import TYPES


def build_engines(
    bundle: Bundle,
    target: Target,
    profiles: Profiles,
    workers: int,
    budget: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_built: Callable[[PlanRecord, bool], None] = lambda record, kept: None,
) -> list[PlanRecord]:
    """Builds a plan for every component of `profiles`; `on_built` hears of each, and whether it was there before.

    `budget` limits the device memory of a plan's activations, in bytes. Raises UserError when the compiler is missing,
    the precision is not there yet or the bundle cannot be written, CompilerError when a component cannot be built:
    others that were finished stay.
    """
    if target.precision not in TYPES:
        raise UserError(f"{target.precision} plans cannot be built yet; choose from {', '.join(TYPES)}")
    compiler = compiler_of(load_module(target.compiler))
    jobs, built = [], []
    for component, wanted in profiles.items():
        key = plan_key(bundle, component, target, compiler, wanted, budget)
        if known := _kept(plan_path(bundle, target, component), key):
            built.append(known)
            on_built(known, True)
        else:
            inputs = bundle.manifest.components[component].inputs
            jobs.append(Job(component, key, inputs, target, tuple(wanted), budget))
    if jobs:
        jobs.sort(key=lambda job: bundle.graph(job.component).stat().st_size * len(job.profiles), reverse=True)
        built += _build(bundle, jobs, workers, on_event, lambda record: on_built(record, False))
    return built


def _kept(plan: Path, key: str) -> PlanRecord | None:
    """The record of a plan that need not be built again."""
    try:
        known = read_record(plan)
        verify_plan(plan, known, key)
    except UserError:
        return None
    return known


def _build(
    bundle: Bundle,
    jobs: Sequence[Job],  # the longest first
    workers: int,
    on_event: Callable[[Event], None],
    on_built: Callable[[PlanRecord], None],
) -> list[PlanRecord]:
    waiting, running, built = list(jobs), list[_Building](), list[PlanRecord]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_Building(bundle, waiting.pop(0)))
            ready = wait([building.pipe for building in running])
            for building in [each for each in running if each.pipe in ready]:
                said = building.receive()
                if isinstance(said, Event):
                    on_event(said)
                    continue
                building.publish(said)
                building.close()
                running.remove(building)
                built.append(said)
                on_built(said)
        return built
    finally:
        for building in running:
            building.close()


class _Building:
    """A process that builds one plan in a folder of its own: what both take is given back at the end."""

    def __init__(self, bundle: Bundle, job: Job):
        self._job, self._plan = job, plan_path(bundle, job.target, job.component)
        try:
            self._plan.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=".", dir=bundle.folder / FOLDER))
            files = {name: bundle.path(name) for name in bundle.manifest.weights}
            for name, file in (files | {str(GRAPH): bundle.graph(job.component)}).items():
                (self._folder / name).symlink_to(file.resolve())
        except OSError as error:
            raise UserError(
                f"cannot write to {self._plan.parent}: {error.strerror}; copy the bundle to a writable folder"
            ) from error
        self.pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tubelet.export.compile_process", str(theirs.fileno())],
            cwd=self._folder,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the parent alone
        )
        theirs.close()
        self.pipe.send(job)

    def receive(self) -> Event | PlanRecord:
        """What the process says next: a step, or at its end the record. Raises what went wrong there."""
        try:
            said = self.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise CompilerError(
                f"the process that built {self._job.component} ended with code {self._process.wait()}; if it was "
                f"killed for want of memory, build with --jobs 1"
            ) from error
        if isinstance(said, Exception):
            raise said
        return cast(Event | PlanRecord, said)

    def publish(self, content: PlanRecord) -> None:
        """Puts the plan in its place, and then the record that makes it valid."""
        self._plan.with_suffix(".json").unlink(missing_ok=True)
        os.replace(self._folder / PLAN, self._plan)
        write_record(self._plan, content)

    def close(self) -> None:
        """Ends the process wherever it is, and removes what it left."""
        self._process.kill()  # in the middle of a phase the compilers hear nothing
        self._process.wait()
        self.pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)
