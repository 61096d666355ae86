"""Draws ``docs/failures.md`` from the rows of ``ops/failures.py`` and the registry in ``wire/reasons.py``.

python -m kvbelt.ops.draw_failures docs/failures.md

A test holds the page and what is drawn together.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from kvbelt.ops.failures import GROUPS, Failure
from kvbelt.wire.reasons import REASONS, Reason, Where

_HEAD = """\
# Failures

What can fail, when, and what becomes of it. Drawn from the code by
`python -m kvbelt.ops.draw_failures docs/failures.md`, which a test compares; each row names the test that shows it, and
every reason that stands in the code is explained below.

Rules:

1. A failure leads to another prefill worker, another decode worker, the decode worker alone, or an error with a reason,
   whichever comes first within the request's deadline. Never to a 200 with other tokens.
2. What has reached the client is never taken back. As long as nothing has, a request is tried again elsewhere: with at
   most three legs of each kind, each with a transfer id of its own, and with nobody twice.
3. `x-kvbelt-path: <path>[; reason=<word>][; after=<word>,…]` says which way an answer took, why, and what had failed
   before; `/kvbelt/requests/ID` shows each attempt with its worker, reason and times. An error of the proxy's own has
   its word in `error.reason`, and 503 comes with `Retry-After`.
4. A reason that follows from what two workers are is *lasting*: their pair is not tried again while both live.
"""

_OF_SEND = """\
`kvbelt_transfers_ended_total{side="send",reason}`, `TransferFailed` on port 7500, and `transfer_<reason>` in the words
of the proxy. *Then*, if the decode leg was not sent yet: *elsewhere*, another prefill worker may do better; *here*, it
would meet the same, and the decode worker computes the prompt; *nothing*, nobody waits any more."""

_SECTIONS = (
    (Where.CHOICE, "Why an answer took its way", "No failures: `x-kvbelt-path: …; reason=`, chosen from the start."),
    (
        Where.PREFILL | Where.DECODE,
        "Why a leg failed",
        "`x-kvbelt-path: …; after=`, a record's attempts, and `kvbelt_proxy_failed_attempts_total{leg,reason}`.",
    ),
    (
        Where.ERROR,
        "Why the proxy answered an error",
        "`error.reason` in the body, and `kvbelt_proxy_errors_total{reason}`.",
    ),
    (
        Where.SEND,
        "How a transfer ended for the prefill worker",
        _OF_SEND,
    ),
    (
        Where.RECEIVE,
        "How a transfer ended for the decode worker",
        '`kvbelt_transfers_ended_total{side="receive",reason}`, and `x-kvbelt-kv: recomputed; reason=`.',
    ),
    (
        Where.WARM,
        "Why two workers are not connected",
        "`kvbelt workers list`, `/kvbelt/workers`, and `kvbelt_proxy_pairs{state}`.",
    ),
    (
        Where.PROBE,
        "Why a link was not measured",
        "`kvbelt doctor --url`; besides these, whatever ends a transfer for the prefill worker.",
    ),
    (
        Where.CONTROL,
        "Why a message or a peer was refused",
        "`kvbelt_refused_messages_total{socket,reason}` ([security.md](security.md)).",
    ),
)


def page() -> str:
    """The whole page."""
    parts = [_HEAD, *(f"## {group.title}\n\n{_table(group.failures)}\n" for group in GROUPS), "## The reasons\n"]
    for where, title, said in _SECTIONS:
        listed = [reason for reason in REASONS if reason.where & where]
        parts.append(f"### {title}\n\n{said}\n\n{_list(listed, where)}\n")
    return "\n".join(parts)


def _table(failures: Iterable[Failure]) -> str:
    head = ["cause", "phase", "the client sees", "what is freed", "counted by", "reasons", "shown by"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for failure in failures:
        file, _, test = failure.shown_by.partition("::")
        cells = [
            failure.cause,
            failure.phase,
            failure.client,
            failure.freed,
            _words(failure.metrics),
            _words(failure.reasons),
            f"[{test.removeprefix('test_').replace('_', ' ')}](../tests/{file})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _list(reasons: Iterable[Reason], where: Where) -> str:
    remedies = bool(where & Where.SEND)
    lines = ["| reason | means | then |", "|---|---|---|"] if remedies else ["| reason | means |", "|---|---|"]
    for reason in reasons:
        lasting = " (lasting)" if reason.lasting and where & (Where.SEND | Where.WARM) else ""
        then = f" {reason.remedy if reason.name != 'done' else 'it is there'} |" if remedies else ""
        lines.append(f"| `{reason.name}` | {reason.meaning}{lasting} |{then}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Write the page to the file named, or print it."""
    if argv:
        Path(argv[0]).write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
