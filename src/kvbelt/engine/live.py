"""A request under way, and what may outlive it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from kvbelt.engine.answer import Answer
from kvbelt.engine.api import GenerationRequest, Timing
from kvbelt.engine.scheduler import Sequence


@dataclass(slots=True, eq=False)
class Live:
    """One request under way."""

    sequence: Sequence
    answer: Answer
    seed: int
    submitted: float
    started: float | None = None  #: when its first step was planned
    first_token: float | None = None
    load_seconds: float = 0.0
    loaded_tokens: int = 0
    incoming_released: bool = False
    announced: int = 0  #: blocks of the prompt that ``outgoing`` was told of, in every layer
    outgoing_broken: bool = False

    @property
    def request(self) -> GenerationRequest:
        """What was asked."""
        return self.sequence.request

    def timing(self) -> Timing:
        """What is known by now."""
        started = self.submitted if self.started is None else self.started
        prefill = 0.0 if self.first_token is None else self.first_token - started - self.load_seconds
        return Timing(
            queue=started - self.submitted,
            load=self.load_seconds,
            prefill=prefill,
            computed_tokens=self.sequence.prompt_len - self.loaded_tokens,
            loaded_tokens=self.loaded_tokens,
            preemptions=self.sequence.preemptions,
        )


@dataclass(eq=False)
class Hold:
    """Blocks of a finished request; see ``BlockHold``."""

    block_ids: tuple[int, ...]
    _give_back: Callable[["Hold"], None]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _released: bool = False

    def release(self) -> None:
        """Give the blocks back; a second time does nothing."""
        with self._lock:
            if self._released:
                return
            self._released = True
        self._give_back(self)
