"""``kvbelt demo``: starts a deployment, streams one chat answer, and shows where its time went.

Standard output has the question, the answer and the waterfall; progress goes to standard error. Exit status: 0 if the
answer came over the belt; 1 if it did not come, was empty, or took another path; 2 if the start was refused.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvbelt.errors import KVBeltError, StartError
from kvbelt.http import HttpError, Pool, Response
from kvbelt.ops import up, waterfall
from kvbelt.ops.arguments import positive_int
from kvbelt.ops.control import controlled
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.extras import require_engine
from kvbelt.ops.http_client import Address, Client, NoAnswerError, UnreadableReplyError
from kvbelt.ops.parser import add_examples
from kvbelt.ops.ports import check_free, seed_ports
from kvbelt.ops.processes import SPLIT_ALL, DeploymentSpec
from kvbelt.ops.start_checks import require_device
from kvbelt.ops.terminal import Terminal
from kvbelt.ops.topology import Topology
from kvbelt.wire.request_record import REQUEST_RECORD, RequestRecord

QUESTION = "What is the capital of France? Answer in one sentence."

_WARM_UP = "Name a city and say in one sentence what it is known for."

_MAX_ERROR_BYTES = 1 << 20

#: The transfer's notification may arrive after the answer's last token.
_RECORD_SECONDS = 3.0
_RECORD_POLL_SECONDS = 0.05


class DemoFailedError(KVBeltError):
    """The answer is not what the demo should show."""


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """The streamed answer."""

    request_id: str
    path: str  #: ``x-kvbelt-path``
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    up.add_model_arguments(parser)
    parser.add_argument("--topology", default="1p1d", metavar="XpYd", help="X prefill and Y decode workers")
    parser.add_argument("--once", action="store_true", help="exit after the answer")
    parser.add_argument("--prompt", default=QUESTION, metavar="TEXT", help="the question")
    parser.add_argument("--max-tokens", type=positive_int, default=60, metavar="N", help="longest answer, in tokens")
    parser.add_argument("--logs", action="store_true", help="show what the processes log")
    parser.add_argument("--verbose", dest="logs", action="store_true", help=argparse.SUPPRESS)  # the older name
    add_examples(
        parser,
        ("kvbelt demo", "ask, show where the time went, and serve on until Ctrl-C"),
        ("kvbelt demo --once --prompt 'Why is the sky blue?'", "ask this, and end"),
    )


def run(args: argparse.Namespace) -> int:
    terminal = Terminal(show_logs=args.logs)

    async def serve(deployment: Deployment, stop: asyncio.Event) -> int:
        async with controlled(deployment, terminal, args.model, os.getpid()):
            return await ask_and_serve(deployment, stop)

    async def ask_and_serve(deployment: Deployment, stop: asyncio.Event) -> int:
        asking = asyncio.create_task(show(deployment, args.prompt, args.max_tokens), name="demo request")
        stopped = asyncio.create_task(stop.wait(), name="demo signals")
        try:
            await asyncio.wait([asking, stopped], return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                return 0
            asking.result()
            if not args.once:
                _print(f"\nServing on {deployment.url} until Ctrl-C; kvbelt why and kvbelt top show more.")
                await stop.wait()
            return 0
        finally:
            asking.cancel()
            stopped.cancel()
            await asyncio.gather(asking, stopped, return_exceptions=True)

    try:
        require_engine("kvbelt demo", "embedded")
        require_device(args.device)
        spec = DeploymentSpec(
            topology=Topology.parse(args.topology),
            model=Path(args.model),
            dtype=args.dtype,
            device=args.device,
            threads=args.threads,
            log_dir=args.log_dir,
            proxy_args=SPLIT_ALL,  # the one request would be answered whole
        )
        spec = up.with_model(_with_free_ports(spec, terminal), args.model, terminal)
        return asyncio.run(up.deploy(spec, terminal, serve))
    except KeyboardInterrupt:  # a signal before the loop handles signals
        return 0
    except DemoFailedError as error:
        print(f"kvbelt: {error}", file=sys.stderr)
        return 1
    except KVBeltError as error:
        return up.report(error)


def _with_free_ports(spec: DeploymentSpec, terminal: Terminal) -> DeploymentSpec:
    try:
        check_free(list(seed_ports(spec.topology).uses(spec.host)))
    except StartError as error:
        terminal.info(f"{str(error).partition(';')[0]}; taking free ports instead")
        return replace(spec, auto_ports=True)
    return spec


async def show(deployment: Deployment, prompt: str, max_tokens: int) -> None:
    """Ask, print the answer as it streams, then its waterfall.

    Raises:
        DemoFailedError: there is no answer, or it is empty, or it did not come over the belt.
    """
    process = deployment.process("proxy")
    client = Client(Address(process.host, process.port))
    pool = client.pool
    try:
        models = await client.get("/v1/models")
        model = models.json["data"][0]["id"] if models.status == 200 else "demo"
        body = {"model": model, "max_tokens": 2, "temperature": 0, "stream": True}
        # The first request connects the workers and fills caches; it is not shown.
        await _ask(pool, body | {"messages": [{"role": "user", "content": _WARM_UP}]}, show=False)
        _print(f"\n> {prompt}\n")
        body |= {"max_tokens": max_tokens, "messages": [{"role": "user", "content": prompt}]}
        answered = await _ask(pool, body)
        if not answered.text.strip():
            raise DemoFailedError("the answer was empty")
        record = await _record(client, answered.request_id)
        width = shutil.get_terminal_size((100, 24)).columns
        plain = not (sys.stdout.encoding or "").lower().startswith("utf")
        _print("\n" + "\n".join(waterfall.lines(record, width=min(width, 110), plain=plain)))
        if deployment.spec.topology.prefill and not record.over_belt:
            raise DemoFailedError(f"the answer did not come over the belt: {answered.path}")
    except (HttpError, NoAnswerError, UnreadableReplyError, LookupError, ValueError) as error:
        raise DemoFailedError(f"the request failed: {error}") from error
    finally:
        client.close()


async def _ask(pool: Pool, body: dict[str, Any], *, show: bool = True) -> DemoAnswer:
    headers = [(b"content-type", b"application/json")]
    response = await pool.request("POST", "/v1/chat/completions", headers, json.dumps(body).encode())
    if response.status != 200:
        raw = await response.read(_MAX_ERROR_BYTES)
        raise DemoFailedError(f"the proxy answered with status {response.status}: {raw.decode(errors='replace')}")
    text = ""
    async for event in _events(response):
        if "error" in event:
            _print("")
            raise DemoFailedError(f"the answer broke off: {event['error'].get('message', event['error'])}")
        for choice in event.get("choices", ()):
            piece = choice.get("delta", {}).get("content") or ""
            text += piece
            if show:
                _write(piece)
    if show:
        _print("")
    return DemoAnswer(
        response.headers.get(b"x-request-id", b"").decode(), response.headers.get(b"x-kvbelt-path", b"").decode(), text
    )


async def _events(response: Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of an event stream, without comments and [DONE]."""
    rest = b""
    while chunk := await response.chunk():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


async def _record(client: Client, request_id: str) -> RequestRecord:
    """The proxy's record of the request, once it has the end of the transfer.

    Raises:
        DemoFailedError: the proxy has no record of it.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _RECORD_SECONDS
    while True:
        answer = await client.get(f"/kvbelt/requests/{request_id}")
        record = answer.read(REQUEST_RECORD, "the proxy") if answer.status == 200 else None
        if record is not None and (record.complete or loop.time() > deadline):
            return record
        if loop.time() > deadline:
            raise DemoFailedError(f"the proxy has no record of request {request_id!r}")
        await asyncio.sleep(_RECORD_POLL_SECONDS)


def _print(line: str) -> None:
    _write(line + "\n")


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # the reader may be gone
        sys.stdout.write(text)
        sys.stdout.flush()
