"""From the belt's thread, whose answers are callbacks, to the event loop, which awaits them."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

AnswerT = TypeVar("AnswerT")


async def answer_of(ask: Callable[[Callable[[AnswerT], None]], None]) -> AnswerT:
    """What ``ask`` tells the callback that it is given, on whatever thread. Only the first answer counts."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[AnswerT] = loop.create_future()

    def settle(answer: AnswerT) -> None:
        if not ended.done():
            ended.set_result(answer)

    def on_end(answer: AnswerT) -> None:
        with suppress(RuntimeError):  # the loop has closed: the process is ending and nobody waits for this
            loop.call_soon_threadsafe(settle, answer)

    ask(on_end)
    return await ended
