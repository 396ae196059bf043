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
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.runtime.bundle import WEIGHTS, Bundle
from tubelet.runtime.errors import UserError
from tubelet.runtime.plans import FOLDER, PlanRecord, Target, is_whole, plan_key, plan_path, read_record
from tubelet.runtime.profiles import Profiles

from .compile import Job, compile_component, compiler_of
from .errors import CompilerError


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

    `budget` limits the device memory of a plan's activations, in bytes. Raises UserError when the compiler is missing
    or the bundle cannot be written, CompilerError when a component cannot be built: others that were finished stay.
    """
    compiler = compiler_of(target)
    jobs, built = [], []
    for component, wanted in profiles.items():
        plan = plan_path(bundle, target, component)
        key = plan_key(bundle, component, target, compiler, wanted, budget)
        known = read_record(plan)
        if known is not None and known.key == key and is_whole(plan, known):
            built.append(known)
            on_built(known, True)
        else:
            inputs = bundle.manifest.components[component].inputs
            jobs.append(Job(component, inputs, bundle.graph(component), plan, key, target, tuple(wanted), budget))
    if jobs:
        jobs.sort(key=lambda job: job.size, reverse=True)  # the longest first
        built += _build(bundle, jobs, workers, on_event, lambda record: on_built(record, False))
    return built


def _build(
    bundle: Bundle,
    jobs: Sequence[Job],
    workers: int,
    on_event: Callable[[Event], None],
    on_built: Callable[[PlanRecord], None],
) -> list[PlanRecord]:
    scratch = _scratch(bundle, jobs[0].plan.parent)
    context = multiprocessing.get_context("spawn")  # the compilers start threads, which do not survive a fork
    events = context.Queue()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _ignore_signals, (events,))
    try:
        running: set[Future[PlanRecord]] = {pool.submit(_compile, job, scratch) for job in jobs}
        built = []
        while running:
            finished, running = wait(running, timeout=0.1, return_when="FIRST_COMPLETED")
            while not events.empty():
                on_event(events.get())
            for future in finished:
                built.append(future.result())
                on_built(built[-1])
        return built
    except BrokenProcessPool as error:
        raise CompilerError("a building process was killed, perhaps for want of memory; build with --jobs 1") from error
    finally:
        for process in set(multiprocessing.active_children()) - others:  # in the middle of a phase they hear nothing
            process.kill()
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(bundle: Bundle, folder: Path) -> Path:
    """A folder inside the bundle for what is unfinished, in which graphs find their weights."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".", dir=bundle.folder / FOLDER))
        (scratch / WEIGHTS).symlink_to(Path("..", "..", WEIGHTS))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; copy the bundle to a writable folder") from error
    return scratch


_events: Any = None  # of a building process: where its steps go


def _ignore_signals(events: Any) -> None:
    """Prepares a building process: its parent alone hears Ctrl-C, and kills it."""
    global _events
    _events = events
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _compile(job: Job, scratch: Path) -> PlanRecord:
    def on_step(phase: str, done: int, steps: int) -> None:
        _events.put(Event(job.component, phase, done, steps))

    return compile_component(job, scratch, on_step)
