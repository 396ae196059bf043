"""The Typer application: entry point, consoles, signals, and how a command declares options that it shares."""

from __future__ import annotations

import dataclasses
import inspect
import io
import signal
import sys
import typing
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.console import Console

from ..errors import UserError
from ..memory import DeviceError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Runs compiled video diffusion transformers without PyTorch.",
)
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: runs a command; a usage error exits with 2 by typer's own hand, a UserError by ours.

    A device that fails exits with 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name need not be valid text
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    try:
        app()
    except Stopped:
        err.print("interrupted: nothing unfinished is kept")
        raise
    except UserError as error:
        err.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
    except DeviceError as error:
        err.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)


class Stopped(SystemExit):
    """A signal asked the command to end."""


def _stop(number: int, frame: object) -> NoReturn:
    """Unwinds the stack, so that writers remove their temporary files; further signals must not stop them at it.

    Prints nothing: what it interrupts may be printing.
    """
    for each in STOPPING:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(128 + number)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a command. A parameter whose type is a dataclass becomes one option for each of its fields."""
    hints = typing.get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in groups:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))
            continue
        kind = groups[parameter.name]
        fields = typing.get_type_hints(kind, include_extras=True)
        parameters += [
            inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=fields[f.name])
            for f in dataclasses.fields(kind)
        ]

    def run(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{f.name: values.pop(f.name) for f in dataclasses.fields(kind)})
        function(**values)

    registered: Any = run  # typer reads these four
    registered.__name__, registered.__doc__ = function.__name__, function.__doc__
    registered.__signature__ = inspect.Signature(parameters)
    registered.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command()(registered)
    return function
