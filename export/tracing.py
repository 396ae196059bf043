"""All components of a checkpoint -> their graphs, traced by processes side by side.

Flows in: a model's spec and where its tensors lie. Flows out: graphs in a folder, and a Traced of each. Tracing is
Python, which uses one CPU in a process.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import cast

from tubelet.runtime.errors import UserError
from tubelet.runtime.spec import ModelSpec

from .processes import Child, Ended
from .storage import StoredTensor

PROCESSES = 2  # more would take memory: 0.9 GiB each for the largest models


@dataclass(frozen=True)
class Source:
    """What is traced, and where graphs go."""

    spec: ModelSpec
    tensors: Mapping[str, StoredTensor]
    folder: Path


@dataclass(frozen=True)
class Traced:
    """A component's graph: its digest, and how many values each of its weights has."""

    component: str
    digest: str
    weights: Mapping[str, int]


def trace_all(source: Source, names: Sequence[str], on_start: Callable[[str], None]) -> Iterator[Traced]:
    """Traces the components of these names, and yields each when it is done.

    Raises UserError when a process is killed, as systems do that are short of memory.
    """
    waiting, working = list(names), dict[object, str]()
    with ExitStack() as stack:
        children = [stack.enter_context(closing(Child("tubelet.export.trace_process"))) for _ in range(PROCESSES)]
        for child in children:
            child.start()
            child.pipe.send(source)

        def occupy(child: Child) -> None:
            if waiting:
                working[child] = name = waiting.pop(0)
                on_start(name)
                child.pipe.send(name)

        for child in children:
            occupy(child)
        while working:
            ready = wait([child.pipe for child in children if child in working])
            for child in [each for each in children if each.pipe in ready]:
                name = working.pop(child)
                try:
                    traced = cast(Traced, child.receive())
                except Ended as error:
                    kind, hint = (UserError, "; free memory") if error.code == -signal.SIGKILL else (RuntimeError, "")
                    raise kind(f"the process that traced {name} {error}{hint}") from error
                occupy(child)
                yield traced
