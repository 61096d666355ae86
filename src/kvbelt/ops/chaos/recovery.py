"""How long a fault was felt after it was healed: until the first right answer that used whom it had befallen. Pure.

For a restart, healed means ready: the worker said so itself. Where another fault made an answer that uses the worker
impossible meanwhile, the recovery tells of that one, and is not counted.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvbelt.ops.chaos.schedule import Injection


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that was done. Moments are seconds of one clock."""

    injection: Injection
    target: str | None  #: the process's name; None: nobody's in particular
    address: str | None  #: of a worker, as the proxy names it; None: any right answer shows that it is over
    began: float
    healed: float
    detail: str = ""

    def overlaps(self, begin: float, end: float) -> bool:
        """Whether it was there at some moment between."""
        return self.began <= end and begin <= self.healed


@dataclass(frozen=True, slots=True)
class Skipped:
    """A fault that could not be done, and why."""

    injection: Injection
    why: str


@dataclass(frozen=True, slots=True)
class Good:
    """A right answer: when it was complete, and which workers had a part in it."""

    ended: float
    used: frozenset[str]


def recoveries(injected: Sequence[Injected], answers: Sequence[Good], workers: Collection[str]) -> dict[int, float]:
    """Seconds from a fault's healing to the first right answer that used its target, by the injection's number.

    Left out: before there was one, another fault befell the target, the proxy was started again, or every worker that
    it could have worked with was killed, stopped, cut off or slow; or the load ended.
    """
    in_order = sorted(answers, key=lambda answer: answer.ended)
    found: dict[int, float] = {}
    for fault in injected:
        worker = fault.address
        first = next(
            (a.ended for a in in_order if a.ended >= fault.healed and (worker is None or worker in a.used)), None
        )
        if first is not None and not _interrupted(fault, first, injected, workers):
            found[fault.injection.number] = first - fault.healed
    return found


def _interrupted(fault: Injected, until: float, injected: Sequence[Injected], workers: Collection[str]) -> bool:
    """Whether other faults made a right answer with the target impossible between healing and ``until``."""
    others = [other for other in injected if other is not fault and other.overlaps(fault.healed, until)]
    if any(other.injection.kind.name == "restart-proxy" for other in others):
        return True
    if fault.target is None:
        return False
    hurt = {other.target for other in others if other.injection.kind.needs is not None}
    partners = [worker for worker in workers if _role(worker) != _role(fault.target)]
    return any(other.target == fault.target for other in others) or (bool(partners) and hurt.issuperset(partners))


def _role(worker: str) -> str:
    return worker.partition("-")[0]
