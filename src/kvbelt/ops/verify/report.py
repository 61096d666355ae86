"""The result of a run, as lines for a terminal and as JSON. Pure."""

from collections.abc import Sequence

import msgspec

from kvbelt.ops.tables import table
from kvbelt.ops.verify.cases import CHAT, COMPLETIONS
from kvbelt.ops.verify.judge import DIFFERS, EXACT, NOISE, REFUSED, REWORDED, UNASKED, CaseResult, Judged

EQUAL, DIFFERENT, NOT_ASKED = 0, 1, 2  # exit statuses


class Result(msgspec.Struct, frozen=True, kw_only=True):
    kvbelt: str  #: version
    engine: str  #: of the reference, and its version; empty: it does not tell
    reference: str
    seed: int
    quick: bool
    requests: int
    seconds: float
    judged: Judged


def status(result: Result) -> int:
    outcomes = {case.outcome for case in result.judged.cases}
    return DIFFERENT if DIFFERS in outcomes else NOT_ASKED if UNASKED in outcomes else EQUAL


def as_json(result: Result) -> bytes:
    return msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"


def from_json(text: bytes) -> Result:
    return msgspec.json.decode(text, type=Result)


def cell(cases: Sequence[CaseResult]) -> str:
    """What becomes of one field at one endpoint. Empty: it was not tried there."""
    outcomes = {case.outcome for case in cases}
    for bad in (DIFFERS, UNASKED, NOISE):
        if bad in outcomes:
            return {DIFFERS: "DIFFERS", UNASKED: "not asked", NOISE: "within noise"}[bad]
    if EXACT in outcomes:
        by = sorted({case.path.partition(";")[0] for case in cases if case.outcome == EXACT and case.path})
        return f"exact: {', '.join(by)}" if by else "exact"
    return "refused" if outcomes & {REFUSED, REWORDED} else ""


def by_field(result: Result) -> dict[str, dict[str, list[CaseResult]]]:
    """Cases by field and endpoint."""
    found: dict[str, dict[str, list[CaseResult]]] = {}
    for case in result.judged.cases:
        found.setdefault(case.field, {COMPLETIONS: [], CHAT: []})[case.endpoint].append(case)
    return found


def lines(result: Result) -> list[str]:
    rows = [(field, cell(of[COMPLETIONS]), cell(of[CHAT])) for field, of in by_field(result).items()]
    shown = table(("field", COMPLETIONS, CHAT), rows)
    for case in result.judged.cases:
        if case.outcome not in (EXACT, REFUSED):
            shown += ["", *_details(case)]
    return [*shown, "", *_summary(result)]


def _details(case: CaseResult) -> list[str]:
    name = f"{case.endpoint}, {case.field}" + (f" ({case.what})" if case.what else "")
    told = [f"{name}: {case.outcome} {case.why}".rstrip()]
    for one in case.differences:
        far = f" ({one.how_far})" if one.how_far else ""
        told.append(f"  {one.round}, {one.variant}: {one.field}{far}")
        told += [f"    got       {one.got}", f"    expected  {one.expected}"]
    return told


def _summary(result: Result) -> list[str]:
    judged = result.judged
    outcomes = [case.outcome for case in judged.cases]
    counted = ", ".join(
        f"{outcomes.count(name)} {name}" for name in (EXACT, REFUSED, REWORDED, NOISE, DIFFERS, UNASKED)
    )
    paths: dict[str, int] = {}
    for case in judged.cases:
        for path, count in case.paths.items():
            paths[path] = paths.get(path, 0) + count
    taken = ", ".join(f"{path} {count:,}" for path, count in sorted(paths.items()))
    noise = judged.noise
    told = [
        f"{len(outcomes)} cases: {counted}",
        f"answers: {judged.differ:,} of {judged.answers:,} differ",
        f"second answers of the reference: {noise.differ:,} of {noise.answers:,} differ from its first",
        f"roads: {taken or 'none told'}",
    ]
    if not paths.keys() & {"first-token", "re-derive"}:
        told.append("no request was split: start the proxy with --placement split to try the belt")
    told.append(
        f"{result.requests:,} requests in {result.seconds:.0f} s, seed {result.seed}, against {result.reference}"
    )
    told.append({EQUAL: "equal", DIFFERENT: "it differs", NOT_ASKED: "not everything could be asked"}[status(result)])
    return told
