"""``kvbelt verify``: compares a running deployment's answers with a reference's, field by field.

The report goes to standard output, progress to standard error. Exit status: 0 if all is equal, 1 if something differs,
2 if something could not be asked.
"""

import argparse
import asyncio
import sys
import time
import uuid
from collections.abc import Collection
from contextlib import AsyncExitStack

from kvbelt import __version__
from kvbelt.errors import SettingsError, resembling
from kvbelt.ops.arguments import add_worker_key, count, worker_key_of
from kvbelt.ops.parser import add_examples
from kvbelt.ops.proxy_client import add_url_argument, argument_of, url_of
from kvbelt.ops.verify import report
from kvbelt.ops.verify.ask import AT_ONCE, Asked, Progress, Round, Server, ask_round, engine_of, server, workers
from kvbelt.ops.verify.cases import CASES, cases_of, questions
from kvbelt.ops.verify.judge import judge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_url_argument(parser)
    add(
        "--against", type=argument_of, metavar="URL",
        help="a server of the same model that gives the right answers (default: a decode worker's whole answers)",
    )  # fmt: skip
    add_worker_key(parser)
    add("--quick", action="store_true", help="greedy only, in fewer ways, and the reference once: for CI")
    add("--fields", type=_fields, metavar="NAME[,NAME]", help="only the cases of these (default: all)")
    add("--seed", type=count, default=0, metavar="N", help="of prompts and their order")
    add("--json", action="store_true", help="print the result as JSON")
    add_examples(
        parser,
        ("kvbelt verify", "every field, against the deployment's own decode worker"),
        ("kvbelt verify --against http://10.0.0.7:8000", "against another server of the same model"),
        ("kvbelt verify --quick --json", "in fewer ways, for CI"),
    )


def run(args: argparse.Namespace) -> int:
    result = asyncio.run(
        verify(
            url_of(args),
            args.against,
            key=worker_key_of(args),
            fields=args.fields,
            quick=args.quick,
            seed=args.seed,
            progress=_progress(),
        )
    )
    if args.json:
        sys.stdout.buffer.write(report.as_json(result))
    else:
        print("\n".join(report.lines(result)))
    return report.status(result)


async def verify(
    url: str,
    against: str | None,
    *,
    key: str | None = None,
    fields: Collection[str] | None = None,
    quick: bool,
    seed: int,
    progress: Progress,
) -> report.Result:
    """Ask everything and judge.

    Args:
        url: the deployment's proxy.
        against: the reference; None: a decode worker of the deployment.
        key: of servers that ask for one.
        fields: only the cases of these; None: all.
        quick: greedy only, and in fewer ways.
        seed: of prompts and their order.
        progress: gets the round, and how many of how many requests are done.

    Raises:
        KVBeltError: the deployment or its reference cannot be asked.
    """
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(server(url, "the deployment", key))
        of_role = await workers(proxy)
        against = against or of_role.get("decode")
        if against is None:
            raise SettingsError(f"{url} names no decode worker that is ready; name a reference with --against URL")
        reference = await stack.enter_async_context(server(against, "the reference", key))
        prefill = None
        if "prefill" in of_role:
            prefill = await stack.enter_async_context(server(of_role["prefill"], "the prefill worker", key))
        cases = cases_of(fields)
        all_questions = questions(cases, seed, quick=quick)

        async def ask(rounds: list[Round]) -> list[Asked]:
            return [one for each in rounds for one in await ask_round(each, all_questions, seed, progress)]

        expected = await ask(_of_reference(reference, quick=quick))
        got = await ask(_of_subject(proxy, prefill, quick=quick))
        engine = await engine_of(reference)
        if not engine and prefill is not None:  # the reference is a proxy
            engine = await engine_of(prefill)
        return report.Result(
            kvbelt=__version__,
            engine=engine,
            reference=against,
            seed=seed,
            quick=quick,
            requests=len(expected) + len(got),
            seconds=time.monotonic() - began,
            judged=judge(cases, expected, got),
        )


def _of_reference(one: Server, *, quick: bool) -> list[Round]:
    crowd = [
        Round("reference, in company", one, streamed=False, at_once=AT_ONCE),
        Round("reference, in company, streamed", one, streamed=True, at_once=AT_ONCE),
    ]
    if quick:
        return crowd
    alone = "reference, alone"
    return [Round(alone, one, streamed=False), Round(f"{alone}, streamed", one, streamed=True), *crowd]


def _of_subject(proxy: Server, prefill: Server | None, *, quick: bool) -> list[Round]:
    run = uuid.uuid4().hex  # a second run finds nothing of the first
    alone, again, crowd = "new prompts, alone", "cached prompts", "new prompts, in company"
    rounds = [
        Round(crowd, proxy, streamed=False, salts=f"{run} 1", at_once=AT_ONCE),
        Round(f"{again}, in company, streamed", proxy, streamed=True, salts=f"{run} 1", cached=True, at_once=AT_ONCE),
    ]
    if not quick:
        rounds += [
            Round(alone, proxy, streamed=False),
            Round(f"{alone}, streamed", proxy, streamed=True, salts=f"{run} 2"),
            Round(f"{again}, alone", proxy, streamed=False, salts=f"{run} 2", cached=True),
            Round(f"{crowd}, streamed", proxy, streamed=True, at_once=AT_ONCE),
        ]
    if prefill is not None:
        rounds.append(Round("the prefill worker, whole", prefill, streamed=False, at_once=AT_ONCE))
    return rounds


def _fields(text: str) -> frozenset[str]:
    known = list(dict.fromkeys(case.field for case in CASES))
    for name in text.split(","):
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no case of a field {name!r}{resembling(name, known)}")
    return frozenset(text.split(","))


def _progress() -> Progress:
    live = sys.stderr.isatty()

    def tell(name: str, done: int, of: int) -> None:
        if live or done == of:
            end = "\n" if done == of else ""
            print(f"\r\033[K{name}: {done} of {of}" if live else f"{name}: {of} asked", end=end or "\n"[live:],
                  file=sys.stderr, flush=True)  # fmt: skip

    return tell
