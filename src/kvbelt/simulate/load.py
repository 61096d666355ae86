"""When requests arrive, and how long they are. The same seed gives the same requests."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import floor
from pathlib import Path
from random import Random

import msgspec

from kvbelt.routing.levels import ServiceLevels

#: The shape of the gamma distribution of the gaps between arrivals: vLLM's ``--burstiness``.
BURSTINESS = {"even": 100.0, "poisson": 1.0, "bursts": 0.2}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, uniform between (1 - spread) and (1 + spread) times the mean, as vLLM's ``--random-range-ratio``."""

    prompt: int = 7500
    output: int = 200
    spread: float = 0.0
    share: float = 1.0  #: weight among the lengths of a load

    def draw(self, chance: Random) -> tuple[int, int]:
        return _draw(chance, self.prompt, self.spread), max(2, _draw(chance, self.output, self.spread))


def _draw(chance: Random, mean: int, spread: float) -> int:
    return max(1, chance.randint(floor(mean * (1 - spread)), round(mean * (1 + spread)))) if spread else mean


@dataclass(slots=True, eq=False)
class Request:
    """One request and its result. Times are in seconds; gaps are (seconds, number)."""

    number: int
    at: float
    prompt: int
    output: int
    conversation: int | None = None
    shared: int = 0  #: prompt tokens that equal the turn before
    held: int = 0  #: prompt tokens that every worker holds
    splittable: bool = True
    levels: ServiceLevels | None = None  #: None: those of the deployment
    first_token: float | None = None  #: seen by the client
    last_token: float = 0.0  #: seen by the client
    gaps: list[tuple[float, int]] = field(default_factory=list)  #: between the engine's tokens
    generated: int = 0
    action: str = ""
    ended: bool = False


#: Maps a request that has ended, and the moment, to the conversation's next request.
Following = Callable[[Request, float], Request | None]


@dataclass(frozen=True, slots=True)
class Load:
    rate: float = 4.0  #: requests a second; with turns, conversations
    seconds: float = 150.0
    burstiness: float = 1.0
    lengths: Sequence[Lengths] = (Lengths(),)
    seed: int = 1
    turns: int = 1  #: of a conversation
    think: float = 10.0  #: mean seconds between an answer and the next turn
    growth: int = 500  #: new prompt tokens of each later turn
    hot: float = 0.0  #: share of requests that have one beginning, for nine tenths of the prompt; not with turns

    def requests(self) -> list[Request]:
        """The first requests of all conversations. As in ``vllm bench serve`` the gaps are scaled to fill the time."""
        chance = Random(self.seed)
        number = max(1, round(self.rate * self.seconds))
        moments, moment = [], 0.0
        for _ in range(number):
            moment += chance.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))
            moments.append(moment)
        scale = number / self.rate / moment
        shares = [lengths.share for lengths in self.lengths]
        made = []
        hot = Random(self.seed + 2)
        for index, at in enumerate(moments):
            lengths = self.lengths[0] if len(self.lengths) == 1 else chance.choices(self.lengths, shares)[0]
            prompt, output = lengths.draw(chance)
            request = Request(index, at * scale, prompt, output, index if self.turns > 1 else None)
            if hot.random() < self.hot:
                request.conversation, request.shared = _HOT, min(prompt - 1, self.lengths[0].prompt * 9 // 10)
            made.append(request)
        return made

    def following(self) -> Following:
        """A function that makes later turns."""
        chance, left = Random(self.seed + 1), dict[int, int]()

        def follow(request: Request, now: float) -> Request | None:
            talk = request.conversation
            if talk is None:
                return None
            left[talk] = left.get(talk, self.turns) - 1
            if left[talk] <= 0:
                return None
            shared = request.prompt + request.output
            at = now + chance.expovariate(1 / self.think)
            return Request(request.number, at, shared + self.growth, request.output, talk, shared)

        return follow


_HOT = -1  # the conversation of all requests with the hot prefix


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    arrival: float
    prompt_tokens: int
    output_tokens: int
    conversation: str | None = None


def read_trace(file: Path) -> list[Request]:
    """Read a line of JSON a request: ``arrival`` in seconds, ``prompt_tokens``, ``output_tokens``, ``conversation``.

    A request shares with the one before it of the same conversation that one's whole prompt and answer.

    Raises:
        ValueError: a line is something else, or arrivals are not in order.
    """
    return trace_of(file.read_bytes().splitlines(), file.name)


def trace_of(lines: Iterable[bytes], name: str) -> list[Request]:
    made: list[Request] = []
    talks: dict[str, Request] = {}
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=_Line)
        except msgspec.DecodeError as error:
            raise ValueError(f"{name}, line {number}: {error}; a line is {_EXAMPLE}") from error
        if line.prompt_tokens < 1 or line.output_tokens < 1 or line.arrival < (made[-1].at if made else 0.0):
            raise ValueError(
                f"{name}, line {number}: arrivals must not go back, and tokens be at least 1; it is {text.decode()}"
            )
        request = Request(len(made), line.arrival, line.prompt_tokens, max(2, line.output_tokens))
        if line.conversation is not None:
            before = talks.get(line.conversation)
            request.conversation = before.conversation if before is not None else len(talks)
            request.shared = min(request.prompt, before.prompt + before.output) if before is not None else 0
            talks[line.conversation] = request
        made.append(request)
    if not made:
        raise ValueError(f"{name} has no requests; a line is {_EXAMPLE}")
    return made


_EXAMPLE = '{"arrival": 0.5, "prompt_tokens": 7500, "output_tokens": 200, "conversation": "a"}'
