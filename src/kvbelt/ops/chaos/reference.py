"""What is right: every question, asked of an aggregated server before any fault, twice.

A model that chooses between two tokens of nearly equal weight may answer differently in a larger batch; a question
that the aggregated server itself does not answer the same way twice has no right answer, and is not asked.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvbelt.errors import StartError
from kvbelt.ops.chaos.client import Address, ask, get
from kvbelt.ops.chaos.questions import Asking, Question, Sizes, make_questions
from kvbelt.ops.chaos.reading import Answer, MalformedError, read_whole
from kvbelt.ops.chaos.verdict import Ending, Seen

#: A reference answer has this long; it comes from a server that nobody disturbs.
_SECONDS = 300.0

#: At once, the second time.
_CROWD = 8

_PROBE = "The river carries seven paper lanterns past the copper bridge, and the sailor counts them. " * 4


@dataclass(frozen=True, slots=True)
class Reference:
    """Questions and their right answers, by number."""

    by: str  #: who said so, for people
    questions: tuple[Question, ...]
    answers: dict[int, Answer]
    ambiguous: int  #: questions that were left out
    per_second: float  #: requests that one aggregated server answers in a second, several at once


async def learn(by: str, address: Address, *, seed: int, count: int, longest: int) -> Reference:
    """Ask everything twice: alone, and in a crowd.

    Args:
        by: who it is that says what is right, for people.
        address: of the aggregated server.
        seed: of the questions.
        count: how many.
        longest: tokens of the longest prompts, at most.

    Raises:
        StartError: it does not answer, or answers nothing the same way twice.
    """
    model = await _model(address)
    characters = await _characters(address, model)
    chats = (await ask(address, _probe(model, chat=True))).status == 200
    sizes = Sizes(longest=longest, characters=characters)
    questions = make_questions(seed, count, sizes, model=model, chats=chats)
    alone = [await _answer(address, question, "alone") for question in questions]
    crowd, seconds = await _in_a_crowd(address, questions)
    right = {
        question.number: answer
        for question, answer, other in zip(questions, alone, crowd, strict=True)
        if answer == other
    }
    if not right:
        raise StartError(f"the server at {address} answers no question the same way twice; nothing can be compared")
    kept = tuple(question for question in questions if question.number in right)
    return Reference(by, kept, right, len(questions) - len(kept), len(questions) / seconds)


async def _in_a_crowd(address: Address, questions: Sequence[Question]) -> tuple[list[Answer], float]:
    turns = asyncio.Semaphore(_CROWD)

    async def one(question: Question) -> Answer:
        async with turns:
            return await _answer(address, question, "crowd")

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(question)) for question in questions]
    return [task.result() for task in tasks], time.monotonic() - began


async def _answer(address: Address, question: Question, turn: str) -> Answer:
    asking = Asking(question, f"reference-{turn}-{question.number}", stream=False, deadline=_SECONDS)
    return _read(address, await ask(address, asking))


def _read(address: Address, seen: Seen) -> Answer:
    if seen.ending is not Ending.COMPLETE or seen.status != 200:
        what = f"status {seen.status}: {seen.body[:300]!r}" if seen.status else f"{seen.ending}: {seen.detail}"
        raise StartError(f"the aggregated server at {address} does not answer a question: {what}")
    try:
        return read_whole(seen.body)
    except MalformedError as error:
        raise StartError(f"the aggregated server at {address} answers nonsense: {error}") from None


def _probe(model: str, *, chat: bool) -> Asking:
    text = {"messages": [{"role": "user", "content": _PROBE}]} if chat else {"prompt": _PROBE}
    body = {"model": model, "max_tokens": 1, "temperature": 0, **text}
    return Asking(Question(-1, chat, long=False, body=body), "reference-probe", stream=False, deadline=_SECONDS)


async def _characters(address: Address, model: str) -> float:
    """Characters of text that make a token."""
    answer = _read(address, await ask(address, _probe(model, chat=False)))
    assert answer.usage is not None
    return len(_PROBE) / answer.usage[0]


async def _model(address: Address) -> str:
    try:
        return str(json.loads(await get(address, "/v1/models", 10.0) or b"")["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise StartError(f"nobody at http://{address} says which model there is") from None
