"""Draws ``docs/failures.md`` from ``tools/failures.py``, the proxy's plan and the registry in ``wire/reasons.py``.

python -m tools.draw_failures docs/failures.md

A test compares the page with what is drawn.
"""

import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from kvbelt.proxy.request.plan import TABLE
from kvbelt.proxy.request.steps import Move, Outcome, State
from kvbelt.wire.reasons import REASONS, Reason, Where
from tools.failures import GROUPS, Failure

_HEAD = """\
# Failures

The possible failures, their effect on the client, and the next attempts. Code draws this page:

```sh
python -m tools.draw_failures docs/failures.md
```

A test compares it with the code, and imports the test that shows each failure.

Rules:

1. A failure leads to another prefill worker, another decode worker, the decode worker alone, or an
   error with a reason, within the request's deadline. It never leads to a 200 with other tokens.
2. What the client was sent is never taken back. Until then, a request is tried again elsewhere:
   with at most three calls of each kind, and never twice on a worker that failed it.
3. `x-kvbelt-path: <path>[; reason=<word>][; after=<word>,…]` names the path of an answer, why it
   was taken, and which failures came before. `/kvbelt/requests/ID` shows each attempt with its
   worker, reason and times.
4. An error of the proxy itself has its reason in `error.reason`. A 503 comes with `Retry-After`.
5. A *lasting* reason follows from what two workers are. Their pair is not tried again while both
   processes live.
"""

_PLAN = """\
## Next attempts

After each outcome, the proxy's next step, and during which part of a request. The word in brackets
is the path that `x-kvbelt-path` names from then on. The table is in `proxy/request/plan.py`."""

_OF_SEND = """\
`kvbelt_transfers_ended_total{side="send",reason}`, `TransferFailed` on port 7500, and
`transfer_<reason>` where the proxy reports it. The column *then* applies before the decode call:
*elsewhere*, another prefill worker may do better; *here*, another one would fail too, and the
decode worker computes the prompt; *nothing*, no request waits."""

_SECTIONS = (
    (Where.CHOICE, "Why a request took its path", "These are no failures. `x-kvbelt-path: …; reason=` names them."),
    (
        Where.PREFILL | Where.DECODE,
        "Why an attempt failed",
        "`x-kvbelt-path: …; after=`, a request's attempts, and\n`kvbelt_proxy_failed_attempts_total{leg,reason}`.",
    ),
    (
        Where.ERROR,
        "Why the proxy answered with an error",
        "`error.reason` in the body, and `kvbelt_proxy_errors_total{reason}`.",
    ),
    (Where.SEND, "How a transfer ended for the prefill worker", _OF_SEND),
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
        "`kvbelt doctor --url`. Any reason that ends a transfer for the prefill worker may occur as well.",
    ),
    (
        Where.CONTROL,
        "Why a message or a peer was refused",
        "`kvbelt_refused_messages_total{socket,reason}` ([security.md](security.md)).",
    ),
)

_WIDTH = 100
_MANY = 8  # states that are not listed one by one

#: Outcomes of steps that went well.
WELL = frozenset(
    {
        Outcome.SPLIT, Outcome.ONE_TOKEN, Outcome.UNSPLIT, Outcome.FIRST_TOKEN, Outcome.LAST_TOKEN,
        Outcome.UNFIT, Outcome.SENT, Outcome.KEPT, Outcome.STREAM, Outcome.WHOLE, Outcome.DONE,
    }
)  # fmt: skip


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for title, failures in GROUPS.items():
        parts += [f"## {title}\n", *map(_failure, failures)]
    parts.append(f"{_PLAN}\n")
    parts += [_next(outcome) for outcome in Outcome if outcome not in WELL]
    parts.append("## The reasons\n")
    for where, title, text in _SECTIONS:
        listed = [reason for reason in REASONS if reason.where & where]
        parts.append(f"### {title}\n\n{text}\n\n{_list(listed, where)}\n")
    return "\n".join(parts)


def _failure(failure: Failure) -> str:
    file, _, test = failure.shown_by.partition("::")
    facts = [("Client", failure.client), ("Freed", failure.freed)]
    if failure.outcomes:
        facts.append(("Next", ", ".join(f"[{one}](#{_anchor(_title(one))})" for one in failure.outcomes)))
    facts.append(("Metrics", _words(failure.metrics)))
    if failure.reasons:
        facts.append(("Reasons", _words(failure.reasons)))
    facts.append(("Shown by", f"[{test.removeprefix('test_').replace('_', ' ')}](../tests/{file})"))
    lines = (_filled(f"- *{name}:* {text}") for name, text in facts)
    return f"### {failure.title}\n\n" + "\n".join(lines) + "\n"


def _title(outcome: Outcome) -> str:
    return f"After: {outcome}"


def _anchor(title: str) -> str:
    return "".join(one for one in title.lower().replace(" ", "-") if one.isalnum() or one in "-_")


def _next(outcome: Outcome) -> str:
    """Where an outcome leads, with the states together from which it leads to the same."""
    states: dict[str, list[str]] = {}
    for state in State:
        if (move := TABLE[state].get(outcome)) is not None:
            states.setdefault(_step(move), []).append(state)
    most = max(states, key=lambda step: len(states[step]))
    if len(states[most]) > _MANY:
        states.pop(most)
        states[most] = ["all else"]
    lines = (_filled(f"- *{step}*, during: {'; '.join(during)}") for step, during in states.items())
    return f"### {_title(outcome)}\n\n" + "\n".join(lines) + "\n"


def _step(move: Move) -> str:
    step = move.step
    what = f"{step.do}: {step.status} `{step.reason}`" if step.reason else str(step.do)
    if step.again:
        what += " once more"
    return f"{what} (`{move.path}`)" if move.path is not None else what


def _filled(line: str) -> str:
    return textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _words(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _list(reasons: Iterable[Reason], where: Where) -> str:
    remedies = bool(where & Where.SEND)
    lines = ["| reason | meaning | then |", "|---|---|---|"] if remedies else ["| reason | meaning |", "|---|---|"]
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
