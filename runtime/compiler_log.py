"""What TensorRT and TensorRT-RTX log, while they build and while they run.

Flows in: their messages. Flows out: what went wrong, as one sentence, and the lines that were asked for.
"""

from __future__ import annotations

from typing import Any


def make_logger(trt: Any, keep: tuple[str, ...] = (), but: str | None = None) -> Any:
    """An ILogger of the module. It keeps `lines` that begin with one of `keep`; an error that holds `but` is none."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR and (but is None or but not in message):
                self._errors.append(message)
            elif message.startswith(keep):
                self.lines.append(message)

        def problems(self) -> str:
            """What was logged as wrong since the last time."""
            errors, self._errors = self._errors, []
            return "; ".join(errors) or "no reason given"

    return Logger()
