"""The device's queue of work, for the two kinds of device.

``mark`` returns the end of the queue as it is now; ``after`` calls, on any thread, once the device has passed a mark.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch


class CpuCompute:
    """Work is done when its call returns, so there is no queue."""

    def mark(self) -> None:
        return

    def after(self, mark: Any, call: Callable[[], None]) -> None:  # noqa: ARG002
        call()

    def close(self) -> None:
        return


class CudaCompute:
    """A mark is an event on the current stream. One thread waits for the marks and calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queue: deque[tuple[Any, Callable[[], None]] | None] = deque()
        self._filled = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, name="kvbelt-compute", daemon=True)
        self._thread.start()

    def mark(self) -> torch.cuda.Event:
        # A thread that waits for a blocking event sleeps.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def after(self, mark: Any, call: Callable[[], None]) -> None:
        self._queue.append((mark, call))
        self._filled.release()

    def close(self) -> None:
        """End the thread. Calls that still wait are dropped."""
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
