"""A bundle + a target -> all plans that are missing, built by parallel processes.

Flows in: a bundle, a target and profiles by component. Flows out: plans beside their records. A plan whose key matches
is kept, so that an interrupted build goes on where it was; what was being built then leaves nothing.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import cast

from tubelet.runtime.bundle import WEIGHTS, Bundle
from tubelet.runtime.errors import UserError
from tubelet.runtime.plans import FOLDER, PlanRecord, Target, plan_key, plan_path, read_record, verify_plan
from tubelet.runtime.profiles import Profiles
from tubelet.runtime.tensorrt import compiler_of, load_module

from .compile import Job, compile_component
from .errors import CompilerError
from .precision import TYPES


@dataclass(frozen=True)
class Event:
    """How far the building of one component is."""

    component: str
    phase: str
    done: int
    steps: int


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
        plan = plan_path(bundle, target, component)
        key = plan_key(bundle, component, target, compiler, wanted, budget)
        if known := _kept(plan, key):
            built.append(known)
            on_built(known, True)
        else:
            inputs = bundle.manifest.components[component].inputs
            jobs.append(Job(component, inputs, bundle.graph(component), plan, key, target, tuple(wanted), budget))
    if jobs:
        jobs.sort(key=lambda job: job.size, reverse=True)  # the longest first
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
    jobs: Sequence[Job],
    workers: int,
    on_event: Callable[[Event], None],
    on_built: Callable[[PlanRecord], None],
) -> list[PlanRecord]:
    scratch = _scratch(bundle, jobs[0].plan.parent)
    waiting, running, built = list(jobs), list[_Building](), list[PlanRecord]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_Building(waiting.pop(0), scratch))
            ready = wait([building.pipe for building in running])
            for building in [each for each in running if each.pipe in ready]:
                said = building.receive()
                if isinstance(said, Event):
                    on_event(said)
                    continue
                building.stop()
                running.remove(building)
                built.append(said)
                on_built(said)
        return built
    finally:
        for building in running:
            building.stop()
        shutil.rmtree(scratch, ignore_errors=True)


class _Building:
    """A process that builds one plan: the memory that it takes is its own, and its end gives all of it back."""

    def __init__(self, job: Job, scratch: Path):
        context = multiprocessing.get_context("spawn")  # the compilers start threads, which do not survive a fork
        self.pipe, theirs = context.Pipe(duplex=False)
        self._component = job.component
        self._process = context.Process(target=_compile, args=(job, scratch, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> Event | PlanRecord:
        """What the process says next: a step, or at its end the record. Raises what went wrong there."""
        try:
            said = self.pipe.recv()
        except EOFError as error:
            self._process.join()
            raise CompilerError(
                f"the process that built {self._component} ended with code {self._process.exitcode}; if it was killed "
                f"for want of memory, build with --jobs 1"
            ) from error
        if isinstance(said, Exception):
            raise said
        return cast(Event | PlanRecord, said)

    def stop(self) -> None:
        """Ends the process wherever it is: in the middle of a phase the compilers hear nothing."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _scratch(bundle: Bundle, folder: Path) -> Path:
    """A folder inside the bundle for what is unfinished, in which graphs find their weights."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".", dir=bundle.folder / FOLDER))
        (scratch / WEIGHTS).symlink_to(Path("..", "..", WEIGHTS))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; copy the bundle to a writable folder") from error
    return scratch


def _compile(job: Job, scratch: Path, pipe: Connection) -> None:
    """Runs in a process of its own. Its parent alone hears Ctrl-C, and kills it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        pipe.send(compile_component(job, scratch, lambda phase, *steps: pipe.send(Event(job.component, phase, *steps))))
    except CompilerError as error:
        pipe.send(error)
    except OSError as error:
        pipe.send(UserError(f"cannot write the plan of {job.component}: {error.strerror}; free space for it"))
