"""``Compute`` for the two kinds of device."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch


class CpuCompute:
    """Work is done when its call returns."""

    def mark(self) -> None:
        """There is no queue."""
        return

    def after(self, mark: None, call: Callable[[], None]) -> None:  # noqa: ARG002
        """At once."""
        call()

    def close(self) -> None:
        """Nothing to end."""


class CudaCompute:
    """A mark is an event on the current stream. A thread of its own sleeps until one has happened."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queue: deque[tuple[Any, Callable[[], None]] | None] = deque()
        self._filled = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, name="kvbelt-compute", daemon=True)
        self._thread.start()

    def mark(self) -> torch.cuda.Event:
        """The end of what is queued now."""
        # blocking: who waits for it sleeps.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def after(self, mark: torch.cuda.Event, call: Callable[[], None]) -> None:
        """In the order of the calls."""
        self._queue.append((mark, call))
        self._filled.release()

    def close(self) -> None:
        """End the thread; what still waits is not called."""
        self._queue.appendleft(None)
        self._filled.release()
        self._thread.join()

    def _main(self) -> None:
        torch.cuda.set_device(self._device)
        while True:
            self._filled.acquire()
            item = self._queue.popleft()
            if item is None:
                return
            mark, call = item
            mark.synchronize()
            call()
