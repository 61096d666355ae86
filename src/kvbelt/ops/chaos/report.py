"""The report of a run, as text and as JSON. Pure."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import msgspec

from kvbelt.ops.chaos.effect import percentile
from kvbelt.ops.chaos.faults import KINDS
from kvbelt.ops.chaos.ledger import Failure
from kvbelt.ops.chaos.memory import MIB
from kvbelt.ops.chaos.result import HOLD_SECONDS, Result, invariants
from kvbelt.ops.chaos.verdict import FAILURES, Outcome
from kvbelt.ops.tables import table


def lines(result: Result) -> list[str]:
    """The whole report. Failures stand before the verdict, so that a long log ends with the verdict."""
    return [
        *_head(result),
        "",
        *_faults(result),
        "",
        *_answers(result),
        "",
        *_afterwards(result),
        *(line for failure in result.failures for line in ["", *_failure(failure, result.seed)]),
        *(
            line
            for death in result.deaths
            for line in ["", f"{death.process} exited unexpectedly:", *_indented(death.log)]
        ),
        *(
            line
            for name, why in result.not_back.items()
            for line in ["", f"{name} did not become ready again:", *_indented(why)]
        ),
        "",
        *_verdict(result),
    ]


def held(result: Result) -> bool:
    return all(invariant.held for invariant in invariants(result))


def _head(result: Result) -> Iterator[str]:
    faults, minutes = len(result.injected), result.seconds / 60
    yield (
        f"kvbelt chaos: {result.deployment}, model {result.model}, seed {result.seed}, {minutes:.1f} minutes of load, "
        f"{faults} faults, {result.requests:,} requests ({result.rate:.1f} a second)"
    )
    yield (
        f"reference answers by {result.reference}: {result.questions} questions"
        + (f"; {result.ambiguous} more have no stable answer" if result.ambiguous else "")
    )


def _faults(result: Result) -> Iterator[str]:
    rows = []
    for kind in KINDS:
        done = [fault for fault in result.injected if fault.injection.kind == kind]
        missed = sum(fault.injection.kind == kind for fault in result.skipped)
        took = [result.recovered[f.injection.number] for f in done if f.injection.number in result.recovered]
        if not done and not missed and kind.name not in result.impossible:
            continue
        rows.append(
            (
                kind.name,
                len(done),
                missed,
                len(took),
                percentile(took, 50) if took else None,
                max(took) if took else None,
                result.impossible.get(kind.name, kind.what),
            )
        )
    yield from table(["fault", "done", "skipped", "recoveries", "p50 s", "max s", "what"], rows)
    yield (
        "Skipped: no eligible target was running. A recovery is the time from healing (or from the restarted "
        "worker being ready) to the first right answer that used it."
    )


def _answers(result: Result) -> Iterator[str]:
    rows: list[tuple[str, int, str]] = [("right", result.outcomes[Outcome.RIGHT], _counts(dict(result.paths)))]
    rows += [(f"honest error: {reason}", count, "") for reason, count in result.errors.most_common()]
    rows.append(("client left", result.outcomes[Outcome.LEFT], ""))
    rows += [(str(outcome), result.outcomes[outcome], "") for outcome in FAILURES]
    if result.not_sent:
        rows.append(("not sent: too many under way", result.not_sent, ""))
    yield from table(["requests", "count", "of these"], rows)


def _afterwards(result: Result) -> Iterator[str]:
    if any(not holdings.nothing for holdings in result.holdings.values()):
        yield f"held {HOLD_SECONDS:g} s after the load:"
        yield from (f"  {name}: {holdings}" for name, holdings in result.holdings.items())
    else:
        yield f"nothing was held {result.held_seconds:.1f} s after the load"
    yield (
        f"in quarantine at once, at most: {result.quarantined_most:,} bytes; "
        f"transfers waited for space in {result.queued} samples"
    )
    if (effect := result.effect) is not None and effect.ratio is not None:
        sides = " / ".join(
            f"{percentile(side, 50) * 1e3:.0f} and {percentile(side, 99) * 1e3:.0f} ms of {len(side)}"
            for side in (effect.before, effect.during)
        )
        yield (
            f"time to first token of other requests while {effect.worker} is stopped: p99 {effect.ratio:.2f} times "
            f"that before (p50 and p99 before / during: {sides})"
        )
    longest: dict[str, tuple[float, str]] = {}
    for growth in result.growths:
        text = f"{growth.first // MIB} → {growth.settled // MIB} → {growth.last // MIB}"
        longest[growth.process] = max(longest.get(growth.process, (0.0, "")), (growth.seconds, text))
    if longest:
        parts = ", ".join(f"{name} {text} in {seconds:.0f} s" for name, (seconds, text) in longest.items())
        yield f"resident MiB at the start, after a third and at the end of each process's longest run: {parts}"
    yield f"longest delay of this command itself: {result.lag:.2f} s"


def _failure(failure: Failure, seed: int) -> Iterator[str]:
    manner = "streamed" if failure.stream else "whole"
    yield f"{failure.verdict.outcome}: {failure.verdict.reason}"
    yield (
        f"  request {failure.request_id} of seed {seed}, {failure.began:.1f} s after the start, took "
        f"{failure.seconds:.2f} s of {failure.deadline:g} s, {manner}, path {failure.path or 'unknown'}"
    )
    yield f"  POST {failure.route} {msgspec.json.encode(failure.body).decode()}"
    yield f"  right: {failure.right}"
    yield f"  given: {failure.given}"
    yield f"  record: {failure.record}"
    yield f"  faults meanwhile: {'; '.join(failure.faults) or 'none'}"
    for name, log in failure.logs.items():
        yield f"  the end of {name}'s log at that moment:"
        yield from (f"  {line}" for line in _indented(log))


def _verdict(result: Result) -> Iterator[str]:
    checked = invariants(result)
    yield from table(
        ["invariant", "found", "held", ""],
        [(i.name, i.found, "yes" if i.held else "NO", i.detail) for i in checked],
    )
    broken = sum(not invariant.held for invariant in checked)
    yield ""
    if result.interrupted:
        yield "The run was interrupted; this is what it had found."
    yield f"{broken} of {len(checked)} invariants did not hold." if broken else "Every invariant held."


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _indented(text: str) -> Iterator[str]:
    return (f"    {line}" for line in text.splitlines())


def as_json(result: Result) -> bytes:
    body: dict[str, Any] = {
        "held": held(result),
        "invariants": [dataclasses.asdict(invariant) for invariant in invariants(result)],
        "result": result,
    }
    return msgspec.json.format(msgspec.json.encode(body), indent=2)
