"""Denoising steps on a GPU: everything is uploaded once, and a step is one captured graph.

Flows in: `Steps` and a loaded denoiser. Flows out: the sampler's state, when it is asked for. A step copies its row of
the time table and its row of `guided_step`'s arguments to fixed addresses, within the device; the graph, the engine and
then `guided_step`, reads them there, so that it is the same for all steps and for all requests of the same shapes.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES, to_float, to_plan
from .kernels_cuda import Launch, StreamKernels, step_bytes
from .loop import Steps
from .memory import DeviceArray, DeviceError, Extent, Graph, Resource
from .session import Session

Head = tuple[str, Extent, Extent]  # a launch without its arguments: kernel, grid, block
Shapes = Mapping[str, tuple[int, ...]]
IDLE = 8  # workspaces kept at most: each has a context and a graph, whose memory is not known


class Execution(Protocol):
    """An engine's context with its tensors."""

    def reserve(self) -> int:
        """The address of the scratch memory that the next run uses."""
        ...

    def enqueue(self) -> None: ...


class Denoiser(Protocol):
    """What a loaded engine offers a loop."""

    @property
    def dtypes(self) -> Mapping[str, str]: ...
    def execution(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Execution: ...


class Workspace:
    """Static named buffers for inputs of these shapes, an execution on them, and the graph of a step."""

    def __init__(self, session: Session, dtypes: Mapping[str, str], shapes: Shapes):
        """`shapes` are those of the denoiser's inputs and of `velocity`."""
        self._session = session
        self.shapes, self.dtypes, self.nbytes = shapes, dtypes, _nbytes(dtypes, shapes)
        self.inputs = {
            name: DeviceArray.empty(session.device, shape, DTYPES[dtypes[name]]) for name, shape in shapes.items()
        }
        self.velocity = self.inputs.pop("velocity")
        self.update = DeviceArray.empty(session.device, (step_bytes(),), np.uint8)  # guided_step's arguments
        self.eager: str | None = None  # why there is no graph, where capturing failed
        self._execution: Execution | None = None
        self._graph: Graph | None = None
        self._captured: tuple[int, Head] | None = None  # the scratch memory and the kernel that the graph has

    def run(self, denoiser: Denoiser, head: Head) -> None:
        """Queues the denoiser and then `guided_step`: as a graph, from the second time on."""
        if self._execution is None:
            self._execution = denoiser.execution(self.inputs, {"velocity": self.velocity})
        execution, stream = self._execution, self._session.stream

        def queue() -> None:
            symbol, grid, block = head
            execution.enqueue()
            stream.launch(f"{symbol}_at", grid, block, struct.pack("P", self.update.pointer))

        now = execution.reserve(), head
        if self._graph is not None and self._captured == now:
            self._graph.launch(stream)
            return
        queue()  # a capture needs a run before it
        if self.eager is None:
            try:
                self._graph, self._captured = stream.capture(queue), now
            except DeviceError as error:
                self.eager = str(error)

    def unload(self) -> None:
        """Lets go of the engine; the next run makes another execution."""
        self._execution = self._graph = None


def _nbytes(dtypes: Mapping[str, str], shapes: Shapes) -> int:
    return sum(DTYPES[dtypes[name]].itemsize * math.prod(shape) for name, shape in shapes.items())


class Workspaces:
    """A workspace for every loop.

    Those given back wait for loops of the same shapes, with their graphs; the one that waits longest goes when all
    would take more than `limit` bytes.
    """

    def __init__(self, session: Session, limit: int):
        self._session, self._limit = session, limit
        self._idle: list[Workspace] = []  # last the one that was given back last
        self._all: weakref.WeakSet[Workspace] = weakref.WeakSet()

    def take(self, dtypes: Mapping[str, str], shapes: Shapes) -> Workspace:
        for workspace in self._idle:
            if workspace.shapes == shapes:
                self._idle.remove(workspace)
                return workspace
        size = _nbytes(dtypes, shapes)
        while self._idle and (len(self._idle) >= IDLE or self._taken() + size > self._limit):
            del self._idle[0]
        workspace = Workspace(self._session, dtypes, shapes)
        self._all.add(workspace)
        return workspace

    def give_back(self, workspace: Workspace) -> None:
        """From whatever thread and at any time, as finalizers are called: it frees nothing."""
        self._idle.append(workspace)

    def _taken(self) -> int:
        return sum(workspace.nbytes for workspace in self._all)

    def unload(self) -> None:
        """Lets go of the engine and of all workspaces that wait."""
        self._idle.clear()
        for workspace in self._all:
            workspace.unload()


class DeviceLoop(Resource):
    """Steps on the session's device. `denoiser` loads the engine if need be; it is called with the session locked."""

    def __init__(self, session: Session, workspaces: Workspaces, denoiser: Callable[[], Denoiser], steps: Steps):
        """Raises DeviceError when memory is short."""
        self._session, self._denoiser = session, denoiser
        on_host = {name: value for name, value in steps.inputs.items() if not isinstance(value, DeviceArray)}
        self.steps = dataclasses.replace(steps, inputs=on_host)  # of the others the workspace has a copy
        shapes = {name: tuple(value.shape) for name, value in steps.inputs.items()}
        shapes["velocity"] = (steps.batch, *steps.state.shape[1:])
        with session.lock:
            self._workspace = workspaces.take(denoiser().dtypes, shapes)
            super().__init__(workspaces.give_back, self._workspace)
            self._upload(steps)

    @property
    def eager(self) -> str | None:
        """Why steps are queued piece by piece, None where each is a graph."""
        return self._workspace.eager

    def step(self, index: int) -> None:
        with self._session.lock:
            self._workspace.inputs["time_features"].copy_from(self._times[index], self._session.stream)
            self._workspace.update.copy_from(self._updates[index], self._session.stream)
            self._workspace.run(self._denoiser(), self._heads[index])
            self._session.stream.synchronize()

    def read(self) -> None:
        with self._session.lock:
            self._state.download(self.steps.state, self._session.stream)
            self._session.stream.synchronize()

    def write(self) -> None:
        tokens, state = self.steps.inputs["tokens"], self.steps.state
        tokens[:, :, : state.shape[2]] = state[0]
        with self._session.lock:
            self._state.upload(state, self._session.stream)
            self._place("tokens", tokens)
            self._session.stream.synchronize()

    def _upload(self, steps: Steps) -> None:
        workspace, stream = self._workspace, self._session.stream
        for name, value in steps.inputs.items():
            self._place(name, value)
        times = np.repeat(steps.time_table[:, None], steps.batch, axis=1)  # [steps,B,2,F]
        self._times = DeviceArray.from_host(to_plan(times, workspace.dtypes["time_features"]), stream)
        self._state = DeviceArray.from_host(steps.state, stream)
        pins = {} if steps.pinned is None else vars(steps.pinned)
        self._pins: dict[str, Any] = {
            name: None if a is None else DeviceArray.from_host(a, stream) for name, a in pins.items()
        }
        updates = np.empty((len(steps.matrices), *workspace.update.shape), np.uint8)
        self._heads: list[Head] = []
        for index, row in enumerate(updates):
            symbol, grid, block, arguments = self._launch(index)
            self._heads.append((symbol, grid, block))
            row[:] = np.frombuffer(arguments, np.uint8)
        self._updates = DeviceArray.from_host(updates, stream)
        stream.synchronize()

    def _launch(self, index: int) -> Launch:
        state = [self._state[i] for i in range(len(self.steps.state))]
        return StreamKernels(self._session.stream).guided_step_launch(
            state,
            self._workspace.velocity,
            self._workspace.inputs["tokens"],
            **self._pins,
            **self.steps.update(index),
        )

    def _place(self, name: str, value: NDArray[Any] | DeviceArray) -> None:
        """Queues the copy of an input to its buffer, in the plan's type."""
        buffer, stream = self._workspace.inputs[name], self._session.stream
        if isinstance(value, DeviceArray) and value.dtype == buffer.dtype:
            buffer.copy_from(value, stream)
            return
        host = to_float(value.to_host(stream)) if isinstance(value, DeviceArray) else value
        buffer.upload(to_plan(host, self._workspace.dtypes[name]), stream)
