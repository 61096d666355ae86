"""Reference answers: every question is asked twice of an aggregated server, before any fault.

Where two tokens have nearly equal weight, a model may answer differently in a larger batch. A question with two
different answers has no reference, and is not used.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvbelt.errors import StartError
from kvbelt.ops.chaos.client import send_request
from kvbelt.ops.chaos.completion import Completion, MalformedError, read_whole
from kvbelt.ops.chaos.questions import ClientRequest, Question, Sizes, make_questions
from kvbelt.ops.chaos.verdict import Ending, Observation
from kvbelt.ops.http_client import Address, get

#: Deadline of a reference answer; no fault disturbs that server.
_SECONDS = 300.0

#: Requests at once in the second round.
_CROWD = 8

_PROBE = "The river carries seven paper lanterns past the copper bridge, and the sailor counts them. " * 4


@dataclass(frozen=True, slots=True)
class Reference:
    """Questions with their answers, by number."""

    by: str  #: the server, for people
    questions: tuple[Question, ...]
    answers: dict[int, Completion]
    ambiguous: int  #: questions that were left out
    per_second: float  #: requests/s of one aggregated server with several at once


async def collect_reference(by: str, address: Address, *, seed: int, count: int, longest: int) -> Reference:
    """Ask everything twice: one by one, and several at once.

    Args:
        by: the server's description, for people.
        address: of the aggregated server.
        seed: of the questions.
        count: number of questions.
        longest: longest prompts, in tokens.

    Raises:
        StartError: the server does not answer, or answers nothing the same way twice.
    """
    model = await _model(address)
    characters = await _characters(address, model)
    chats = (await send_request(address, _probe(model, chat=True))).status == 200
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


async def _in_a_crowd(address: Address, questions: Sequence[Question]) -> tuple[list[Completion], float]:
    turns = asyncio.Semaphore(_CROWD)

    async def one(question: Question) -> Completion:
        async with turns:
            return await _answer(address, question, "crowd")

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(question)) for question in questions]
    return [task.result() for task in tasks], time.monotonic() - began


async def _answer(address: Address, question: Question, turn: str) -> Completion:
    request = ClientRequest(question, f"reference-{turn}-{question.number}", stream=False, deadline=_SECONDS)
    return _read(address, await send_request(address, request))


def _read(address: Address, seen: Observation) -> Completion:
    if seen.ending is not Ending.COMPLETE or seen.status != 200:
        what = f"status {seen.status}: {seen.body[:300]!r}" if seen.status else f"{seen.ending}: {seen.detail}"
        raise StartError(f"the aggregated server at {address} does not answer a question: {what}")
    try:
        return read_whole(seen.body)
    except MalformedError as error:
        raise StartError(f"the aggregated server at {address} sends a malformed answer: {error}") from None


def _probe(model: str, *, chat: bool) -> ClientRequest:
    text = {"messages": [{"role": "user", "content": _PROBE}]} if chat else {"prompt": _PROBE}
    body = {"model": model, "max_tokens": 1, "temperature": 0, **text}
    return ClientRequest(Question(-1, chat, long=False, body=body), "reference-probe", stream=False, deadline=_SECONDS)


async def _characters(address: Address, model: str) -> float:
    """Characters of text per token."""
    answer = _read(address, await send_request(address, _probe(model, chat=False)))
    assert answer.usage is not None
    return len(_PROBE) / answer.usage[0]


async def _model(address: Address) -> str:
    try:
        models = await get(address, "/v1/models", 10.0)
        return str((models.json if models is not None else {})["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise StartError(f"http://{address} does not list its model") from None
