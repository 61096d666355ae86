"""The same requests to two servers: ``python -m tests.fuzz.differential --requests 2000 --seed 1 --url A --against B``.

Both must serve the same model. Whole answers are compared, errors with their words; with ``--vllm`` only what is
accepted and refused, without the differences that are on purpose (``known.py``). ``--record FILE`` keeps the answers of
``--url`` instead, and ``--against FILE`` compares with those.
"""

import argparse
import asyncio
import itertools
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.fuzz.known import Answer, known, refused
from tests.fuzz.requests import Drawn, requests

AT_ONCE = 8
#: What differs between any two answers.
_OWN = ("id", "created", "system_fingerprint", "kv_transfer_params")


async def ask(client: httpx.AsyncClient, url: str, request: Drawn) -> Answer:
    """The status, and the answer or the error. Streams are joined to what they say."""
    headers = {} if request.content_type is None else {"content-type": request.content_type}
    try:
        reply = await client.post(url + request.path, content=request.body, headers=headers)
    except httpx.HTTPError as error:
        return {"status": 0, "error": repr(error)}
    if reply.headers.get("content-type", "").startswith("text/event-stream"):
        return {"status": reply.status_code, "streamed": True, "body": _joined(reply.text)}
    try:
        body = reply.json()
    except ValueError:
        return {"status": reply.status_code, "error": reply.text[:200]}
    if reply.status_code >= 400:
        error = body.get("error", body) if isinstance(body, dict) else body
        return {"status": reply.status_code, "error": error}
    return {"status": reply.status_code, "streamed": False, "body": _without_own(body)}


async def ask_all(url: str, asked: Sequence[Drawn]) -> list[Answer]:
    """Every request, ``AT_ONCE`` at a time, in their order."""
    turns = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_keepalive_connections=0)) as client:

        async def one(request: Drawn) -> Answer:
            async with turns:
                return await ask(client, url, request)

        return await asyncio.gather(*map(one, asked))


def _without_own(body: Any) -> Any:
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if name not in _OWN}
        for choice in body.get("choices", ()):
            for call in (choice.get("message") or {}).get("tool_calls") or ():
                call.pop("id", None)
        if body.get("usage"):  # what is cached depends on the requests before
            body["usage"] = {name: value for name, value in body["usage"].items() if "details" not in name}
    return body


def _joined(text: str) -> Any:
    """What a stream's events say together, since the number of events varies."""
    said: dict[str, Any] = {"ended": text.endswith("data: [DONE]\n\n")}
    for line in text.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        event = _without_own(json.loads(line.removeprefix("data: ")))
        for choice in event.pop("choices", ()):
            _add(said, f"choice {choice['index']}", choice)
        said |= {name: value for name, value in event.items() if value is not None}
    return said


def _add(said: dict[str, Any], place: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in ("id", "index"):
                _add(said, f"{place}.{name}", inner)
    elif isinstance(value, list | str):
        before = said.get(place, value[:0])
        said[place] = before + value if isinstance(before, type(value)) else value
    elif value is not None:
        said[place] = value


def same(one: Any, other: Any) -> bool:
    """Equal, but for the last digits of log probabilities, which differ between batch shapes."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 2e-3
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def both_accept_or_refuse(ours: Answer, theirs: Answer) -> bool:
    """With the same status, where the other one's is not 200 or 500: see ``refused``."""
    if not refused(ours):
        return not refused(theirs) and ours["streamed"] == theirs["streamed"]
    return refused(theirs) and theirs["status"] in (ours["status"], 200, 500)


def differing(
    asked: Sequence[Drawn], ours: Sequence[Answer], theirs: Sequence[Answer], alike: Callable[[Answer, Answer], bool]
) -> list[tuple[Drawn, Answer, Answer]]:
    return [
        (request, one, other)
        for request, one, other in zip(asked, ours, theirs, strict=True)
        if not alike(one, other) or one["status"] in (0, 500)
    ]


def as_curl(url: str, request: Drawn) -> str:
    kind = "" if request.content_type is None else f" -H {shlex.quote('content-type: ' + request.content_type)}"
    body = request.body[:4000].decode("utf-8", "backslashreplace")
    return f"curl {url}{request.path}{kind} -d {shlex.quote(body)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.differential", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--url", required=True)
    parser.add_argument("--against", help="another URL, or a file that --record wrote")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--vllm", action="store_true", help="the other one is vLLM: compare what is accepted")
    given = parser.parse_args()
    asked = list(itertools.islice(requests(given.seed), given.requests))
    ours = asyncio.run(ask_all(given.url, asked))
    counts = Counter(answer["status"] for answer in ours)
    print(f"{len(asked)} requests to {given.url}: {dict(sorted(counts.items()))}", flush=True)  # noqa: T201
    if given.record:
        given.record.write_text("\n".join(map(json.dumps, ours)))
        return 0
    if given.against.startswith("http"):
        theirs = asyncio.run(ask_all(given.against, asked))
    else:
        theirs = [json.loads(line) for line in Path(given.against).read_text().splitlines()]
    found = differing(asked, ours, theirs, both_accept_or_refuse if given.vllm else same)
    if given.vllm:
        reasons = Counter(known(*one) for one in found)
        found = [one for one in found if known(*one) is None]
        print("on purpose:", {name: count for name, count in reasons.items() if name})  # noqa: T201
    for request, one, other in found:
        print(f"{as_curl(given.url, request)}\n  {_short(one)}\n  {_short(other)}")  # noqa: T201
    print(f"{len(found)} of {len(asked)} differ")  # noqa: T201
    return 1 if found else 0


def _short(answer: Answer) -> str:
    return json.dumps(answer)[:600]


if __name__ == "__main__":
    sys.exit(main())
