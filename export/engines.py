"""A bundle + a target -> all plans that are missing, built by parallel processes.

Flows in: a bundle, a target and profiles by component. Flows out: plans beside their records. A plan whose key matches
is kept, so that an interrupted build goes on where it was; what was being built then leaves nothing.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import cast

from tubelet.runtime.bundle import Bundle
from tubelet.runtime.cuda import CudaDevice
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
from tubelet.runtime.precision import refusal
from tubelet.runtime.profiles import Profiles
from tubelet.runtime.tensorrt import compiler_of, load_module

from .compile import GRAPH, PLAN, Event, Job
from .errors import CompilerError
from .estimate import activation_budget
from .processes import Child, Ended
from .repeatable import repeatable_processes
from .working_folder import locked, working_folder


def build_engines(
    bundle: Bundle,
    target: Target,
    profiles: Profiles,
    workers: int,
    memory_gb: float | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_built: Callable[[PlanRecord, bool], None] = lambda record, kept: None,
) -> list[PlanRecord]:
    """Builds a plan for every component of `profiles`; `on_built` hears of each, and whether it was there before.

    `memory_gb`, of the smallest GPU that loads the plans, limits what their activations may take. Raises UserError when
    the compiler is missing, the bundle was not made for the precision, the GPU at hand is not the target's or the
    bundle cannot be written; CompilerError when the memory is too small, and when components cannot be built, after all
    others were.
    """
    for component in profiles:
        if (reason := refusal(bundle, target, component)) is not None:
            raise UserError(reason)
    compiler = compiler_of(load_module(target.compiler))
    if target.compiler == "tensorrt":
        target = _for_this_gpu(target)
    components = bundle.manifest.components
    jobs, built = [], []
    for component, wanted in profiles.items():
        budget = None
        if memory_gb is not None:
            budget = activation_budget(components, component, target.precision, memory_gb)
        key = plan_key(bundle, component, target, compiler, wanted, budget)
        if known := _kept(plan_path(bundle, target, component), key):
            built.append(known)
            on_built(known, True)
        else:
            jobs.append(Job(component, key, components[component].inputs, target, tuple(wanted), budget))
    if jobs:
        jobs.sort(key=lambda job: bundle.graph(job.component).stat().st_size * len(job.profiles), reverse=True)
        folder = bundle.folder / FOLDER
        try:
            folder.mkdir(exist_ok=True)
            built += _build(bundle, jobs, workers, on_event, on_built)
        except OSError as error:
            raise UserError(
                f"cannot build in {folder}: {error.strerror}; copy the bundle to a writable folder"
            ) from error
    return built


def _for_this_gpu(target: Target) -> Target:
    """The target with the GPU of this machine, which TensorRT builds for whatever it is asked."""
    with CudaDevice() as device:
        if (device.architecture,) != target.architectures:
            raise UserError(
                f"{target} must be built on such a GPU, this machine's is {device.name}, {device.architecture}; "
                f"build there, or for tensorrt:{device.architecture}"
            )
        return dataclasses.replace(target, gpu=device.name)


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
    on_built: Callable[[PlanRecord, bool], None],
) -> list[PlanRecord]:
    waiting, running, built, failed = list(jobs), list[_Building](), list[PlanRecord](), list[str]()
    with working_folder(bundle.folder / FOLDER) as folder:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop(0)
                    running.append(_Building(bundle, job, folder / job.component))  # before it starts, to be ended
                    running[-1].start()
                ready = wait([building.pipe for building in running])
                for building in [each for each in running if each.pipe in ready]:
                    try:
                        said = building.receive()
                        if isinstance(said, Event):
                            on_event(said)
                            continue
                        record, kept = building.publish(said)
                        built.append(record)
                        on_built(record, kept)
                    except (CompilerError, UserError) as error:
                        failed.append(str(error))
                    building.close()
                    running.remove(building)
        finally:
            for building in running:
                building.close()
    if failed:
        raise CompilerError("; ".join(failed))
    return built


class _Building:
    """A process that builds one plan in a folder of its own. Takes nothing until it starts; `close` gives all back."""

    def __init__(self, bundle: Bundle, job: Job, folder: Path):
        self._bundle, self._job, self._folder = bundle, job, folder
        self._child = Child("tubelet.export.compile_process")
        self.pipe = self._child.pipe

    def start(self) -> None:
        self._folder.mkdir()
        files = {name: self._bundle.path(name) for name in self._bundle.manifest.weights}
        for name, file in (files | {str(GRAPH): self._bundle.graph(self._job.component)}).items():
            (self._folder / name).symlink_to(file.resolve())
        with repeatable_processes() as environment:
            self._child.start(self._folder, environment)
        self.pipe.send(self._job)  # a process that we do not know yet gets none, and ends

    def receive(self) -> Event | PlanRecord:
        """What the process says next: a step, or at its end the record. Raises what went wrong there."""
        try:
            said = self._child.receive()
        except Ended as error:
            hint = "; if that was for want of memory, build with --jobs 1" if error.code == -signal.SIGKILL else ""
            raise CompilerError(f"the process that built {self._job.component} {error}{hint}") from error
        if isinstance(said, Exception):
            raise said
        return cast(Event | PlanRecord, said)

    def publish(self, content: PlanRecord) -> tuple[PlanRecord, bool]:
        """Puts the plan in its place, and then the record that makes it valid; unless another process just did."""
        plan = plan_path(self._bundle, self._job.target, self._job.component)
        plan.parent.mkdir(exist_ok=True)
        with locked(plan.parent.parent):
            if known := _kept(plan, self._job.key):
                return known, True
            plan.with_suffix(".json").unlink(missing_ok=True)
            os.replace(self._folder / PLAN, plan)
            write_record(plan, content)
        return content, False

    def close(self) -> None:
        """Ends the process wherever it is, and removes what it left."""
        self._child.close()
        shutil.rmtree(self._folder, ignore_errors=True)
