"""Waiting on the event loop for an answer that the belt gives on its own thread."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

AnswerT = TypeVar("AnswerT")


async def answer_of(
    ask: Callable[[Callable[[AnswerT], None]], Callable[[], None] | None],
    discard: Callable[[AnswerT], None] = lambda _: None,
) -> AnswerT:
    """The answer that ``ask`` gives to its callback.

    If the wait is cancelled, the function that ``ask`` has returned is called, and the answer is discarded.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[AnswerT] = loop.create_future()

    def settle(answer: AnswerT) -> None:
        if ended.done():
            discard(answer)
        else:
            ended.set_result(answer)

    def on_end(answer: AnswerT) -> None:
        with suppress(RuntimeError):  # the loop has closed: the process is ending
            loop.call_soon_threadsafe(settle, answer)

    cancel = ask(on_end)
    try:
        return await ended
    except asyncio.CancelledError:
        if cancel is not None:
            cancel()
        if ended.done() and not ended.cancelled():
            discard(ended.result())
        raise
