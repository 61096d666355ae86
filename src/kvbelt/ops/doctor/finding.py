"""One finding of the doctor."""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    ERROR = "error"  #: requests fail, or take many times as long as they should
    WARNING = "warning"  #: it has a cost, now or later
    NOTE = "note"  #: for information

    @property
    def status(self) -> int:
        return {Severity.ERROR: 2, Severity.WARNING: 1, Severity.NOTE: 0}[self]


class FindingKind(StrEnum):
    """Its place in the chain of causes."""

    CAUSE = "cause"
    SYMPTOM = "symptom"  #: follows from a cause; shown after all causes


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, the evidence, why it matters, and what to change."""

    name: str  #: an identifier for scripts: ``dead_worker``
    severity: Severity
    what: str  #: one line
    why: str  #: why it matters
    change: str  #: the exact line, command or flag; empty: nothing to change
    evidence: tuple[str, ...] = ()  #: the observed values
    kind: FindingKind = FindingKind.CAUSE


def in_order(findings: list[Finding]) -> list[Finding]:
    """Causes in the given order, then symptoms, then notes."""

    def place(finding: Finding) -> int:
        if finding.severity is Severity.NOTE:
            return 2
        return int(finding.kind is FindingKind.SYMPTOM)

    return sorted(findings, key=place)


def status_of(findings: list[Finding]) -> int:
    return max((finding.severity.status for finding in findings), default=0)
