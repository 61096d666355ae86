"""What a worker says about its engine's steps: in ``/health``, and unasked to the proxy."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from kvbelt.engine.engine import Engine
from kvbelt.wire.steps import StepsNow

TELL_SECONDS = 0.1  #: between two reports to the proxy, at least


def steps_of(engine: Engine) -> StepsNow:
    return msgspec.convert(engine.steps(), StepsNow, from_attributes=True)


async def tell_changes(
    look: Callable[[], StepsNow],
    tell: Callable[[StepsNow], None],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """``tell`` what ``look`` finds changed, until cancelled."""
    told = None
    while True:
        now = look()
        if now != told:
            tell(now)
            told = now
        await sleep(TELL_SECONDS)
