"""The questions of a run: prompts of every length, shared prefixes, greedy and sampled. Pure.

Each question has one right answer (temperature 0, or a seed), which is compared token for token.
"""

import random
from dataclasses import dataclass
from typing import Any

_TEXT = (
    "river stone lantern seven paper winter harbour engine copper violet orchard signal bridge cotton mirror thunder "
    "candle forest marble ribbon sailor velvet window yellow amber basket castle dragon ember falcon garden hammer"
)
_WORDS = _TEXT.split()

#: Lengths of answers, in tokens: mostly short, some long enough to be interrupted.
_MAX_TOKENS = (1, 2, 3, 5, 8, 8, 13, 21, 34, 48)

#: A disconnecting client leaves after this time, on average.
_LEAVE_SECONDS = 0.08

#: Shares of the kinds of questions.
_CHAT, _SAMPLED, _SHARED, _TWO, _STOPS = 0.35, 0.3, 0.4, 0.06, 0.6


@dataclass(frozen=True, slots=True)
class Sizes:
    """Prompt lengths in tokens, and characters of text per token."""

    short: int = 12
    longest: int = 600
    characters: float = 4.0


@dataclass(frozen=True, slots=True)
class Question:
    """A question. Streaming and deadline are chosen for each request."""

    number: int
    chat: bool
    long: bool
    body: dict[str, Any]

    @property
    def route(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"


def make_questions(seed: int, count: int, sizes: Sizes, *, model: str, chats: bool) -> list[Question]:
    """Make ``count`` questions, at least a quarter of them long. ``chats``: the model can chat."""
    chance = random.Random(seed)
    prefixes = [_text(chance, sizes, sizes.longest * share) for share in (0.2, 0.4, 0.6)]
    return [_question(chance, number, sizes, prefixes, model, chats=chats) for number in range(count)]


def _question(
    chance: random.Random, number: int, sizes: Sizes, prefixes: list[str], model: str, *, chats: bool
) -> Question:
    long = number % 4 == 0
    tokens = chance.uniform(0.7, 0.95) * sizes.longest if long else chance.triangular(sizes.short, sizes.longest / 3)
    text = _text(chance, sizes, tokens)
    if not long and chance.random() < _SHARED:
        text = f"{chance.choice(prefixes)} {_text(chance, sizes, sizes.short)}"
    chat = chats and chance.random() < _CHAT
    body: dict[str, Any] = {"model": model, "max_tokens": chance.choice(_MAX_TOKENS), "temperature": 0}
    if chance.random() < _SAMPLED:
        body |= {"temperature": 0.8, "top_p": 0.95, "seed": chance.getrandbits(31)}
        if chance.random() < _TWO / _SAMPLED:
            body["n"] = 2
    # Most answers run to their limit; the others end where the model ends them.
    if chance.random() < _STOPS:
        body["ignore_eos"] = True
    asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    return Question(number, chat, long, body | asked)


def _text(chance: random.Random, sizes: Sizes, tokens: float) -> str:
    wanted = max(4, int(tokens * sizes.characters))
    text = ""
    while len(text) < wanted:
        text += f"{chance.choice(_WORDS)} {chance.randrange(1000)} "
    return text[:wanted].strip()


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """One request for a question."""

    question: Question
    request_id: str
    stream: bool
    deadline: float  #: seconds
    leave_after: float | None = None  #: seconds until the client disconnects; None: it stays

    def body(self) -> dict[str, Any]:
        body = {**self.question.body, "return_token_ids": True, "stream": self.stream}
        return body | {"stream_options": {"include_usage": True}} if self.stream else body


@dataclass(frozen=True, slots=True)
class RequestMix:
    """The random mix of requests."""

    deadline: float = 20.0  #: seconds; of most requests
    hasty: float = 0.12  #: share with a short deadline
    hasty_seconds: tuple[float, float] = (0.3, 2.0)
    streamed: float = 0.6  #: share

    def request(
        self, chance: random.Random, question: Question, request_id: str, *, leaving: bool = False
    ) -> ClientRequest:
        """``leaving``: half of the clients disconnect, mostly within a tenth of a second."""
        deadline = chance.uniform(*self.hasty_seconds) if chance.random() < self.hasty else self.deadline
        leave = chance.expovariate(1 / _LEAVE_SECONDS) if leaving and chance.random() < 0.5 else None
        return ClientRequest(question, request_id, chance.random() < self.streamed, deadline, leave)
