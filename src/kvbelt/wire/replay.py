"""What the proxy asks ``python -m kvbelt.simulate.replay``, and its answer."""

import msgspec

from kvbelt.wire.health import Role
from kvbelt.wire.json_body import JsonMessage
from kvbelt.wire.steps import StepsNow


class EndedRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that was answered. Seconds; None: no such level, or not known."""

    at: float  #: when it came, on any clock
    prompt: int  #: tokens
    held: int  #: prompt tokens that its worker held already
    output: int  #: tokens
    splittable: bool
    ttft: float  #: the level, as the next two
    itl: float | None
    tpot: float | None
    split: bool
    pause: float | None  #: of a split: from its first token to the second
    within: (
        bool | None
    )  #: whether it was within its levels; None: not streamed, so that they mean nothing to its client


class ReplayWorker(msgspec.Struct, frozen=True):
    role: Role
    steps: StepsNow


class ReplayQuestion(msgspec.Struct, frozen=True):
    workers: list[ReplayWorker]
    requests: list[EndedRequest]  #: in the order in which they came
    itl: float | None  #: seconds that workers cut prompts to beside decodes
    pause: float | None  #: median seconds from first to second token of splits; None: as measured elsewhere


class ReplayAnswer(msgspec.Struct, frozen=True):
    """Shares of the streamed requests that are within their levels."""

    elastic: float
    whole: float

    @property
    def regret(self) -> float:
        """What splitting costs."""
        return self.whole - self.elastic


REPLAY_QUESTION = JsonMessage(ReplayQuestion, "the question")
REPLAY_ANSWER = JsonMessage(ReplayAnswer, "the answer")
