"""One thing that the doctor has found."""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad it is."""

    ERROR = "error"  #: requests fail, or take many times as long as they should
    WARNING = "warning"  #: it costs something, or will
    NOTE = "note"  #: worth knowing, nothing to do

    @property
    def status(self) -> int:
        """What it makes of the exit status."""
        return {Severity.ERROR: 2, Severity.WARNING: 1, Severity.NOTE: 0}[self]


class Kind(StrEnum):
    """What it is in the chain of causes."""

    CAUSE = "cause"
    SYMPTOM = "symptom"  #: it follows from something; shown after every cause


@dataclass(frozen=True, slots=True)
class Finding:
    """What, what was seen, why it matters, what to change."""

    name: str  #: one word, for scripts: ``dead_worker``
    severity: Severity
    what: str  #: one line
    why: str  #: why it matters
    change: str  #: the exact line, command or flag to change; empty: nothing
    evidence: tuple[str, ...] = ()  #: the values seen
    kind: Kind = Kind.CAUSE


def in_order(findings: list[Finding]) -> list[Finding]:
    """Causes as they came (the table of checks is in the order of causes), then symptoms, then notes."""

    def place(finding: Finding) -> int:
        if finding.severity is Severity.NOTE:
            return 2
        return int(finding.kind is Kind.SYMPTOM)

    return sorted(findings, key=place)


def status_of(findings: list[Finding]) -> int:
    """The exit status: 0 nothing wrong, 1 warnings, 2 errors."""
    return max((finding.severity.status for finding in findings), default=0)
