"""What the benchmarks beside peers share: runners in processes of their own, asked in turn for one pass each.

Flows in: a table of runners by name, of which the first is the baseline, and a folder for their models. Flows out: a
row for each runner: seconds, speed beside the baseline's, error, cold start and peak memory; or why there is none.

A runner makes its model once, in a process that ends. It serves from another one, so that its cold start (from the
process's start to the first result) and its peak memory are its own. It lives as long as its wave: the baseline and
`--at-once` others. In each round of a wave everyone makes one pass, and speeds are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from tubelet.runtime.resident import peak_resident_bytes

Array = NDArray[Any]
Pass = dict[str, float]
Row = dict[str, Any]
Rows = dict[str, Row]
GIB = 2**30


@dataclass(frozen=True)
class Loaded:
    """A runner that is ready."""

    one_pass: Callable[[], Array]  # the same each time
    once_s: float = 0.0  # seconds of what a request needs once, beside its passes


class Runner(Protocol):
    def prepare(self, folder: Path) -> None:
        """Makes what it loads, where that is not there yet."""
        ...

    def load(self, folder: Path) -> Loaded: ...


class Failure(Exception):
    """Why a runner has no numbers."""


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """With the options of `compare`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--folder", type=Path, required=True, help="where models are made, and found by the next run")
    made.add_argument("--repeats", type=int, default=repeats, help="rounds")
    made.add_argument("--at-once", type=int, default=2, help="runners in memory beside the baseline")
    made.add_argument("--limit", type=float, default=600.0, help="seconds that one answer may take")
    made.add_argument("--only", nargs="+", metavar="RUNNER", help="these and the baseline")
    made.add_argument("--prepare", metavar="RUNNER", help="in a child: makes its model")
    made.add_argument("--serve", nargs=2, metavar=("RUNNER", "RESULT"), help="in a child: makes passes")
    return made


def compare(runners: Mapping[str, Runner], options: argparse.Namespace) -> Rows:
    """A row for each runner, the baseline first. In a child of this process it does not return."""
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.prepare:
        _child(partial(_prepare, runners[options.prepare], options.folder))
    if options.serve:
        name, result = options.serve
        _child(partial(_serve, runners[name], options.folder, Path(result)))
    baseline, *others = [name for number, name in enumerate(runners) if not number or name in (options.only or runners)]
    rows: Rows = {}
    for name in (baseline, *others):
        print(f"make: {name}", file=sys.stderr, flush=True)
        with _Child("--prepare", name) as child, _telling(rows, name):
            child.answer()
    ready = [name for name in others if name not in rows]
    for at in range(0, max(1, len(ready)), options.at_once):
        if baseline not in rows or "s" in rows[baseline]:
            rows |= _wave([baseline, *ready[at : at + options.at_once]], options.repeats, options.limit)
    return {name: rows[name] for name in (baseline, *others) if name in rows}


def _wave(names: Sequence[str], rounds: int, limit: float) -> Rows:
    """Rows of runners that live together; the first is the baseline."""
    rows: Rows = {}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        results = {name: Path(folder, f"{number}.npy") for number, name in enumerate(names)}
        children: dict[str, _Child] = {}
        for name, result in results.items():
            children[name] = stack.enter_context(_Child("--serve", name, str(result)))
            with _telling(rows, name):
                rows[name] = {**children[name].answer(limit), "cold_s": children[name].age(), "passes": []}
        for _ in range(rounds):
            for name in [name for name in names if "failed" not in rows[name]]:
                with _telling(rows, name):
                    rows[name]["passes"].append(children[name].ask(limit))
                    print(f"{name}: {rows[name]['passes'][-1]}", file=sys.stderr, flush=True)
        if "failed" in rows[names[0]]:
            return rows
        for name in [name for name in names if "failed" not in rows[name]]:
            rows[name]["error"] = _distance(np.load(results[name]), np.load(results[names[0]]))
            rows[name] |= _medians(rows[name]["passes"], rows[names[0]]["passes"])
    return rows


def _medians(passes: Sequence[Pass], reference: Sequence[Pass]) -> Row:
    """Of a runner's passes, and of the same rounds' of the baseline."""
    both = list(zip(passes, reference, strict=True))
    return {
        "s": statistics.median(each["s"] for each in passes),
        "cpu_s": statistics.median(each["cpu_s"] for each in passes),
        "speed": statistics.median(its["s"] / each["s"] for each, its in both),
        "cpu_speed": statistics.median(its["cpu_s"] / each["cpu_s"] for each, its in both),
        "peak_gib": passes[-1]["peak"] / GIB,
    }


@contextmanager
def _telling(rows: Rows, name: str) -> Iterator[None]:
    """A runner's failure becomes its row."""
    try:
        yield
    except Failure as failure:
        rows[name] = {"failed": str(failure)}
        print(f"{name}: {failure}", file=sys.stderr, flush=True)


class _Child:
    """This script again, as a child that answers in lines of JSON."""

    def __init__(self, *mode: str):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed in __exit__
        self._start = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, *sys.argv, *mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def age(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self._start

    def ask(self, limit: float) -> dict[str, Any]:
        """One more pass."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer(limit)

    def answer(self, limit: float | None = None) -> dict[str, Any]:
        """What it says next. Raises Failure where that is an error, or nothing, or not within so many seconds."""
        if not select.select([self._process.stdout], [], [], limit)[0]:
            self._process.kill()
            raise Failure(f"no answer within {limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = self._log.read().strip().splitlines()[-1:]
            raise Failure(f"its process ended with {self._process.wait()}: {''.join(said)}"[:300])
        told = json.loads(line)
        if "failed" in told:
            raise Failure(told["failed"])
        return told


def _child(work: Callable[[TextIO], None]) -> NoReturn:
    """Does the work of a child, whose answers go where the parent reads and all that libraries print elsewhere."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        work(answers)
    except Exception as error:  # of any library: it is what the row says
        traceback.print_exc()
        _answer(answers, {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
    answers.close()
    os._exit(0)  # some libraries hang or crash at their end


def _prepare(runner: Runner, folder: Path, answers: TextIO) -> None:
    runner.prepare(folder)
    _answer(answers, {})


def _serve(runner: Runner, folder: Path, result: Path, answers: TextIO) -> None:
    loaded = runner.load(folder)
    np.save(result, loaded.one_pass())
    _answer(answers, {"once_s": loaded.once_s})
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loaded.one_pass()
        seconds = {"s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        _answer(answers, {**seconds, "peak": peak_resident_bytes()})


def _answer(answers: TextIO, told: Mapping[str, Any]) -> None:
    answers.write(json.dumps(told) + "\n")
    answers.flush()


def _distance(found: Array, expected: Array) -> float:
    """L2 of the difference over L2 of what was expected."""
    expected = expected.astype(np.float32)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def show(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Prints rows under the headings of columns: the name of a value, and how it is formatted."""
    width = max(map(len, rows))
    print(" " * width, *(f"{heading:>10}" for heading in columns))
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:{width}}  no numbers: {row['failed']}")
        else:
            print(f"{name:{width}}", *(f"{row[heading]:>10{form}}" for heading, form in columns.items()))


def cpu_model() -> str:
    """The CPU's name and how many cores there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]}, {len(named)} cores"
