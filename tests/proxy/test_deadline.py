"""A request's time ends as with ``asyncio.timeout``."""

import asyncio

import pytest

from kvbelt.proxy.request.deadline import Deadline
from tests.http.support import async_test


async def waits(seconds: float) -> None:
    with Deadline(seconds):
        await asyncio.Event().wait()


@async_test
async def test_what_takes_too_long_ends_with_a_timeout():
    """The task goes on: it is not cancelled any more."""
    with pytest.raises(TimeoutError):
        await waits(0.0)
    assert asyncio.current_task().cancelling() == 0


@async_test
async def test_a_task_that_is_cancelled_in_time_is_cancelled():
    task = asyncio.create_task(waits(60.0))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@async_test
async def test_a_task_that_is_cancelled_at_its_deadline_is_cancelled():
    """Its client is gone: nobody waits for the error."""

    async def cancelled_at_once() -> None:
        with Deadline(0.0):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                asyncio.current_task().cancel()
                raise

    task = asyncio.create_task(cancelled_at_once())
    with pytest.raises(asyncio.CancelledError):
        await task


@async_test
async def test_an_error_in_time_is_that_error():
    with pytest.raises(ZeroDivisionError), Deadline(60.0):
        _ = 1 / 0
