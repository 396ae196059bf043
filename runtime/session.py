"""One device as all engines of a pipeline share it: a stream, scratch memory, and one user at a time.

Flows in: a device. Flows out: what contexts and loops queue their work with. Knows nothing of engines.
"""

from __future__ import annotations

import threading

from .memory import Buffer, Device


class Scratch:
    """What contexts compute in: they run one after the other, so one block serves all, the largest that one needs."""

    def __init__(self, device: Device):
        self._device, self._size = device, 0
        self._buffer: Buffer | None = None

    def reserve(self, size: int) -> int:
        """The block's address, which changes when it has to grow. Raises DeviceError when memory is short."""
        if self._buffer is None or size > self._size:
            self.release()
            self._buffer, self._size = self._device.allocate(size), size
        return self._buffer.pointer

    def release(self) -> None:
        if self._buffer is not None:
            self._buffer.close()
        self._buffer = None


class Session:
    """Work of several threads goes to one stream, in order; each holds `lock` while it queues."""

    def __init__(self, device: Device):
        self.device, self.stream, self.scratch = device, device.stream(), Scratch(device)
        self.lock = threading.RLock()

    def close(self) -> None:
        self.scratch.release()
        self.stream.close()
        self.device.close()
