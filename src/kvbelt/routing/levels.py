"""The service levels that a request is to be served within."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServiceLevels:
    """Seconds. None: no level."""

    ttft: float = 0.5  #: from the request's arrival to its first token
    itl: float | None = 0.05  #: between two tokens, for 99 of 100
    tpot: float | None = None  #: between two tokens, on average over the answer

    @property
    def mean_itl(self) -> float | None:
        """What running decodes are guarded by: without it, prompts beside them could take most of a worker's time."""
        if self.tpot is not None:
            return self.tpot
        return None if self.itl is None else self.itl / 2


def kept(ttft_level: float, mean_level: float | None, ttft: float, mean: float | None, pause: float) -> bool:
    """Whether an answer was within its levels, as far as is seen of it. Seconds; None: no level, or not known.

    No level names single pauses. But one that is as long as a first token may take is felt as a wait for another one.
    """
    return ttft <= ttft_level and pause <= ttft_level and (mean_level is None or mean is None or mean <= mean_level)
