"""Calls that wait for the belt's thread, made beside the model runner, which must not wait."""

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

log = logging.getLogger("kvbelt.vllm")

ResultT = TypeVar("ResultT")


class Background(Generic[ResultT]):
    """Makes one call at a time on its own thread. All methods are the model runner's.

    Args:
        call: what is called.
        period: seconds between the calls that ``take`` begins; infinite: only ``begin`` begins one.
        clock: seconds, from any origin.
    """

    def __init__(
        self, call: Callable[[], ResultT], period: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._call = call
        self._period = period
        self._clock = clock
        self._next = clock() if period < math.inf else math.inf
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvbelt-background")
        self._under_way: Future[ResultT] | None = None

    def begin(self) -> None:
        if self._under_way is None:
            self._under_way = self._thread.submit(self._call)

    def take(self) -> ResultT | None:
        """The result of a call that has ended since the last ``take``; None also if it failed, which is logged."""
        result = None
        if self._under_way is not None and self._under_way.done():
            ended, self._under_way = self._under_way, None
            if (error := ended.exception()) is None:
                result = ended.result()
            else:
                # The result is for metrics and the doctor; the model runner serves requests without it.
                log.warning("the belt's state could not be read", exc_info=error)
        if self._under_way is None and self._clock() >= self._next:
            self._next = self._clock() + self._period
            self.begin()
        return result

    def close(self) -> None:
        self._thread.shutdown(wait=True)
