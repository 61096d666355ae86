"""Findings as text and as JSON."""

import json
import textwrap
from collections.abc import Iterator, Sequence

from kvbelt.ops.doctor.finding import Finding, FindingKind, Severity, status_of

_COLOURS = {Severity.ERROR: "31", Severity.WARNING: "33", Severity.NOTE: "2"}
_BOLD = "1"
WIDTH = 118
_HANG = 12


def lines(findings: Sequence[Finding], about: str, *, colour: bool = False, width: int = WIDTH) -> Iterator[str]:
    """One line after another, none of the wrapped ones longer than ``width``."""
    yield from textwrap.wrap(about, width)
    first = True
    for finding in findings:
        head = finding.severity.value
        if first and finding.kind is FindingKind.CAUSE and finding.severity is not Severity.NOTE:
            head = f"{head}, look here first"
        first = False
        yield ""
        *before, last = textwrap.wrap(f"{head}: {finding.what}", width) or [head]
        for line in before:
            yield _paint(line, _COLOURS[finding.severity], colour=colour)
        name = f"[{finding.name}]"
        fits = len(last) + 2 + len(name) <= width
        yield _paint(last, _COLOURS[finding.severity], colour=colour) + (f"  {name}" if fits else "")
        if not fits:
            yield f"  {name}"
        for evidence in finding.evidence:
            yield from _wrapped("seen", evidence, width)
        yield from _wrapped("why", finding.why, width)
        if finding.change:
            yield from _wrapped("change", finding.change, width)
    yield ""
    for line in textwrap.wrap(summary(findings), width):
        yield _paint(line, _BOLD, colour=colour)


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


def _wrapped(label: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=f"  {label + ':':<{_HANG - 2}}",
        subsequent_indent=" " * _HANG,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _paint(text: str, code: str, *, colour: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if colour else text
