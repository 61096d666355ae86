"""Recovery time: from the healing of a fault to the first right answer that used its target. Pure.

A restarted worker counts as healed when it is ready. If another fault made such an answer impossible meanwhile, the
time would measure that fault, and is not counted.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvbelt.ops.chaos.schedule import Injection


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that was done. Moments are seconds of one clock."""

    injection: Injection
    target: str | None  #: the process's name; None: no particular process
    address: str | None  #: of a worker, as the proxy names it; None: any right answer shows recovery
    began: float
    healed: float
    detail: str = ""

    def overlaps(self, begin: float, end: float) -> bool:
        """Whether it was active at some moment of a span."""
        return self.began <= end and begin <= self.healed


@dataclass(frozen=True, slots=True)
class Skipped:
    """A fault that could not be done, and why."""

    injection: Injection
    why: str


@dataclass(frozen=True, slots=True)
class RightAnswer:
    """A right answer: when it was complete, and which workers took part."""

    ended: float
    used: frozenset[str]


def recoveries(
    injected: Sequence[Injected], answers: Sequence[RightAnswer], workers: Collection[str]
) -> dict[int, float]:
    """Seconds from healing to the first right answer that used the target, by the injection's number.

    Left out: faults without such an answer, and those that another fault interrupted. Interrupting faults hit the
    same target, restart the proxy, or disable every worker that could work with the target.
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
