"""Asks a deployment and its reference, round after round, and tells what each case's answers were."""

import asyncio
import hashlib
import random
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvbelt.errors import KVBeltError
from kvbelt.ops.http_client import Address, Client, NoAnswerError
from kvbelt.ops.verify.answers import Answer, read
from kvbelt.ops.verify.cases import PATHS, Question
from kvbelt.wire.about import ABOUT
from kvbelt.wire.workers import WORKER_LIST

AT_ONCE = 8
#: A request that takes longer has no answer.
SECONDS = 180.0

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Server:
    """A proxy, a worker or another server, as it is asked."""

    what: str
    client: Client
    model: str


@dataclass(frozen=True, slots=True)
class Round:
    """Every question in one form."""

    name: str
    server: Server
    streamed: bool
    at_once: int = 1
    salts: str = ""  #: rounds with the same one share a prefix cache; empty: nothing is cached
    cached: bool = False  #: an earlier round has had the prompts


@dataclass(frozen=True, slots=True)
class Asked:
    question: Question
    round: Round
    answer: Answer | None  #: None: none came
    why: str = ""


async def ask_round(one: Round, questions: Sequence[Question], seed: int, progress: Progress) -> list[Asked]:
    """In an order of chance, so that neighbours in company are of all kinds."""
    order = [q for q in questions if (q.streamable if one.streamed else q.wholeable)]
    random.Random(f"{seed} {one.name}").shuffle(order)
    turns, done = asyncio.Semaphore(one.at_once), 0

    async def ask(question: Question) -> Asked:
        nonlocal done
        async with turns:
            asked = await _ask(one, question)
        done += 1
        progress(one.name, done, len(order))
        return asked

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(question)) for question in order]
    return [task.result() for task in tasks]


async def _ask(one: Round, question: Question) -> Asked:
    body = {"model": one.server.model, "cache_salt": _salt(one, question), **question.body}
    if one.streamed:
        body = {"stream": True, "stream_options": {"include_usage": True}, **body}
        if "stream_options" in question.case.body and question.case.body["stream_options"] is ...:
            del body["stream_options"]
    try:
        reply = await one.server.client.post(PATHS[question.endpoint], body, SECONDS)
    except NoAnswerError as error:
        return Asked(question, one, None, str(error))
    path = reply.headers.get(b"x-kvbelt-path", b"").decode("latin-1")
    return Asked(question, one, read(reply.status, path, reply.body, model=one.server.model))


def _salt(one: Round, question: Question) -> str:
    if not one.salts:
        return uuid.uuid4().hex
    name = f"{one.salts} {question.endpoint} {question.case.name} {question.variant}"
    return hashlib.sha256(name.encode()).hexdigest()[:32]  # vLLM takes 128 characters, and not each of them


@asynccontextmanager
async def server(url: str, what: str, key: str | None) -> AsyncIterator[Server]:
    """Connect to a server.

    Raises:
        KVBeltError: the URL is none, or the server does not list its model.
    """
    try:
        address = Address.of_url(url)
    except ValueError:
        raise KVBeltError(f"{url} is not a URL; say for example http://127.0.0.1:9100") from None
    with Client(address, key) as client:
        try:
            listed = await client.get("/v1/models")
            model = str(listed.json["data"][0]["id"])
        except NoAnswerError as error:
            raise KVBeltError(f"{what} at {url} cannot be asked: {error}") from None
        except (KeyError, IndexError, TypeError):
            raise KVBeltError(f"{what} at {url} lists no model (/v1/models answers {listed.status})") from None
        yield Server(what, client, model)


async def workers(proxy: Server) -> dict[str, str]:
    """The first ready worker of each role: its URL by the role. Empty: the server is no proxy."""
    try:
        reply = await proxy.client.get("/kvbelt/workers")
    except NoAnswerError:
        return {}
    if reply.status != 200:
        return {}
    found: dict[str, str] = {}
    for row in reply.read(WORKER_LIST, proxy.what).workers:
        if row.state == "ready":
            found.setdefault(row.role, f"http://{row.worker}")
    return found


async def engine_of(one: Server) -> str:
    """Engine and version, as ``vllm 0.32.0``; empty: it does not tell."""
    try:
        about, version = await one.client.get("/kvbelt/about"), await one.client.get("/version")
    except NoAnswerError:
        return ""
    if about.status == 200 and about.json.get("engine"):
        told = about.read(ABOUT, one.what)
        return f"{told.engine} {told.packages.get(told.engine, told.kvbelt)}"
    return f"vllm {version.json['version']}" if "version" in version.json else ""
