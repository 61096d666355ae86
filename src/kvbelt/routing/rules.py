"""The modes of placement, and the constants of its decision."""

from dataclasses import dataclass
from enum import StrEnum


class Mode(StrEnum):
    ELASTIC = "elastic"
    SPLIT = "split"  #: whole only where a request cannot be split
    WHOLE = "whole"  #: as plain servers behind a router


@dataclass(frozen=True, slots=True)
class Rules:
    """Constants of the decision, in seconds or as shares."""

    #: A worker gets its next prompt so long before it is free, because a request takes time to reach the engine.
    ahead: float = 0.03
    #: A worker gets a prompt at once if it can compute it within this share of the TTFT level. So an engine has several
    #: short prompts, which share the cost of a step.
    soon: float = 0.4
    #: A request that will miss its deadline waits at most so many TTFT levels; then it is the next.
    patience: float = 1.5
    #: Cost of a split beyond its prefill: the gap before the second token.
    handover: float = 0.02
    #: Cost of each second by which prefill delays a running decode. It decides only between plans that break equally
    #: many levels. A larger value leaves decode workers idle while prompts wait.
    delay: float = 0.02
    #: Cost of one more decode, in TTFT levels, for the share of their level that it takes from the decodes beside it.
    #: It spreads decodes where each of them lengthens a step, as on a CPU.
    crowd: float = 6.0
    #: An idle prefill worker answers whole while at most so many requests are expected to run on each worker.
    calm: float = 0.7
    #: A worker that had so many times the mean work does not get requests for a hot prefix that it holds.
    hot: float = 1.25
    #: A worker without a request for so long is measured again: it may have been throttled, or relieved.
    old: float = 10.0
    #: At most this share of requests measures a worker again.
    probes: float = 0.05


DEFAULT_RULES = Rules()
