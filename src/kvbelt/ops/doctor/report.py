"""Findings as text and as JSON."""

import json
import textwrap
from collections.abc import Iterator, Sequence

from kvbelt.ops.doctor.finding import Finding, FindingKind, Severity, status_of

_COLOURS = {Severity.ERROR: "31", Severity.WARNING: "33", Severity.NOTE: "2"}
_BOLD = "1"
_WIDTH = 118
_HANG = 12


def lines(findings: Sequence[Finding], about: str, *, colour: bool = False) -> Iterator[str]:
    yield about
    first = True
    for finding in findings:
        head = finding.severity.value
        if first and finding.kind is FindingKind.CAUSE and finding.severity is not Severity.NOTE:
            head = f"{head}, look here first"
        first = False
        yield ""
        yield _paint(f"{head}: {finding.what}", _COLOURS[finding.severity], colour=colour) + f"  [{finding.name}]"
        for evidence in finding.evidence:
            yield from _wrapped("seen", evidence)
        yield from _wrapped("why", finding.why)
        if finding.change:
            yield from _wrapped("change", finding.change)
    yield ""
    yield _paint(summary(findings), _BOLD, colour=colour)


def summary(findings: Sequence[Finding]) -> str:
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    warnings = sum(finding.severity is Severity.WARNING for finding in findings)
    if not errors and not warnings:
        return "no problem found"
    found = f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
    return f"{found}; the first finding is the most likely cause"


def as_json(findings: Sequence[Finding], about: str) -> str:
    body = {
        "about": about,
        "status": status_of(list(findings)),
        "findings": [
            {
                "name": finding.name,
                "severity": finding.severity,
                "kind": finding.kind,
                "what": finding.what,
                "evidence": list(finding.evidence),
                "why": finding.why,
                "change": finding.change,
            }
            for finding in findings
        ],
    }
    return json.dumps(body, indent=2, ensure_ascii=False)


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"  {label + ':':<{_HANG - 2}}",
        subsequent_indent=" " * _HANG,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _paint(text: str, code: str, *, colour: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if colour else text
