"""One load: when its requests arrive, what they ask, and the client that sends them and notes when tokens come."""

import asyncio
import functools
import gc
import itertools
import json
import random
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import uvloop
from benchmarks.gpu._rows import Answer

from kvbelt.http import HttpError, Pool

#: How long the last requests may take after the last arrival. What is not answered by then is cancelled and missed.
PATIENCE_SECONDS = 45.0

#: The shape of the gamma distribution of the gaps between arrivals: vLLM's ``--burstiness``.
BURSTINESS = {"even": 100.0, "poisson": 1.0}

_LOAD = re.compile(
    r"(?P<arrivals>even|poisson):(?P<rate>\d+(?:\.\d+)?)(?:x(?P<seconds>\d+(?:\.\d+)?))?"
    r"(?::(?P<input>\d+)/(?P<output>\d+)(?:~(?P<spread>0?\.\d+))?)?(?:@(?P<seeds>\d+(?:,\d+)*))?"
)

_COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent. Every system gets the same arrivals and prompts of a seed."""

    arrivals: str
    rate: float
    seconds: float
    input_len: int = 7500
    output_len: int = 200
    spread: float = 0.0  #: lengths lie between 1 - this and 1 + this times their mean: vLLM's ``--random-range-ratio``
    seeds: tuple[int, ...] = (1,)

    @property
    def name(self) -> str:
        """Without the seeds."""
        spread = f"~{self.spread:g}" if self.spread else ""
        return f"{self.arrivals}:{self.rate:g}x{self.seconds:g}:{self.input_len}/{self.output_len}{spread}"


def parse_load(text: str) -> Load:
    """Read ``even:6``, ``poisson:4x120``, ``poisson:4x60:7500/200~0.8@1,2``.

    Raises:
        ValueError: it is none of these.
    """
    found = _LOAD.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no load; examples: even:6, poisson:4x120, poisson:4x60:7500/200~0.8@1,2")
    seconds = found["seconds"] or {"even": "30", "poisson": "120"}[found["arrivals"]]
    return Load(
        arrivals=found["arrivals"],
        rate=float(found["rate"]),
        seconds=float(seconds),
        input_len=int(found["input"] or 7500),
        output_len=int(found["output"] or 200),
        spread=float(found["spread"] or 0.0),
        seeds=tuple(int(seed) for seed in (found["seeds"] or "1").split(",")),
    )


@dataclass(frozen=True, slots=True)
class Question:
    """One request: its moment, in seconds, and its body."""

    at: float
    prompt: int
    body: bytes


@functools.lru_cache(maxsize=8)  # every system is sent the same
def questions(load: Load, seed: int, model: str) -> tuple[Question, ...]:
    """The requests of a load.

    As in ``vllm bench serve`` the gaps are scaled so that all of them together take exactly their time. Prompts are
    token ids, so servers tokenize nothing.
    """
    chance = random.Random(seed)
    shape = BURSTINESS[load.arrivals]
    number = max(1, round(load.rate * load.seconds))
    moments, moment = [], 0.0
    for _ in range(number):
        moment += chance.gammavariate(shape, 1 / (load.rate * shape))
        moments.append(moment)
    scale = number / load.rate / moment
    words = [str(token) for token in range(3, 40_000)]
    asked = []
    for at in moments:
        prompt, answer = (_length(chance, mean, load.spread) for mean in (load.input_len, load.output_len))
        ids = ",".join(chance.choices(words, k=prompt))
        asked.append(Question(at * scale, prompt, completion_body(model, ids, answer)))
    return tuple(asked)


def _length(chance: random.Random, mean: int, spread: float) -> int:
    return max(1, chance.randint(round(mean * (1 - spread)), round(mean * (1 + spread))))


def completion_body(model: str, ids: str, answer: int) -> bytes:
    body = {
        "model": model, "prompt": [], "max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(body).replace('"prompt": []', f'"prompt": [{ids}]').encode()


class Router:
    """Chooses one of several servers for each request: in turn, or the one with the fewest requests outstanding.

    It runs in the client, so a system of plain servers pays for no proxy.
    """

    def __init__(self, number: int, *, least: bool = False) -> None:
        self._outstanding = [0] * number
        self._order = list(range(number))  # the least recently chosen first
        self._least = least

    def take(self) -> int:
        """Choose a server."""
        chosen = min(self._order, key=self._outstanding.__getitem__) if self._least else self._order[0]
        self._order.remove(chosen)
        self._order.append(chosen)
        self._outstanding[chosen] += 1
        return chosen

    def give_back(self, chosen: int) -> None:
        """Its request has ended."""
        self._outstanding[chosen] -= 1


class Stream:
    """An answer's events as they come."""

    def __init__(self) -> None:
        self.moments: list[float] = []  #: of the events with text
        self.usage: dict[str, Any] = {}
        self._rest = b""

    def feed(self, data: bytes, moment: float) -> None:
        """Take what has arrived at one moment.

        Raises:
            ValueError: an event is no JSON object.
        """
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                told = json.loads(event[6:])
                if told.get("choices"):
                    self.moments.append(moment)
                self.usage = told.get("usage") or self.usage
                if "error" in told:
                    raise ValueError(str(told["error"])[:300])


async def _ask(pool: Pool, body: bytes, answer: Answer) -> None:
    """Send one request, and note what comes."""
    headers = ((b"content-type", b"application/json"), (b"x-request-id", answer.request_id.encode()))
    stream, sent = Stream(), time.perf_counter()
    try:
        response = await pool.request("POST", _COMPLETIONS, headers, body)
        if response.status != 200:
            answer.error = f"{response.status} {(await response.read(1 << 20))[:300].decode(errors='replace')}"
            return
        answer.headers = {
            name.decode(): value.decode() for name, value in response.headers.items() if name.startswith(b"x-kvbelt-")
        }
        while data := await response.chunk():
            stream.feed(data, time.perf_counter())
    except (HttpError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    except asyncio.CancelledError:
        answer.error = "not answered in time"
        raise
    finally:
        moments = stream.moments
        answer.ttft = round((moments[0] - sent) * 1000, 2) if moments else 0.0
        answer.gaps = [round((late - early) * 1000, 2) for early, late in itertools.pairwise(moments)]
        answer.tokens = stream.usage.get("completion_tokens", len(moments))
        answer.cached = (stream.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if not moments and not answer.error:
            answer.error = "an answer without tokens"


async def _send(asked: Sequence[Question], ports: Sequence[int], router: Router) -> tuple[list[Answer], float]:
    pools = [Pool("127.0.0.1", port) for port in ports]
    answers: list[Answer] = []
    tasks: set[asyncio.Task[None]] = set()
    load_id = secrets.token_hex(4)  # servers may know the ids of earlier loads
    began = time.perf_counter()

    async def one(question: Question, answer: Answer) -> None:
        try:
            await _ask(pools[answer.server], question.body, answer)
        finally:
            router.give_back(answer.server)

    try:
        for question in asked:
            await asyncio.sleep(max(0.0, began + question.at - time.perf_counter()))
            lag = time.perf_counter() - began - question.at
            answer = Answer(at=round(question.at, 4), prompt=question.prompt, server=router.take())
            answer.lag, answer.request_id = round(lag * 1000, 2), f"{load_id}-{len(answers)}"
            answers.append(answer)
            tasks.add(asyncio.create_task(one(question, answer)))
        _, late = await asyncio.wait(tasks, timeout=PATIENCE_SECONDS)
        for task in late:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
    finally:
        for pool in pools:
            pool.close()
    return answers, time.perf_counter() - began


def send(asked: Iterable[Question], ports: Sequence[int], router: Router) -> tuple[list[Answer], float]:
    """Send each request at its moment, to the ports that the router chooses. Returns the answers and the seconds."""
    # A collection in the middle would look like a slow token.
    gc.collect()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_send(list(asked), ports, router))
    finally:
        gc.enable()
