"""How long a worker's event loop is held by the largest requests."""

from time import thread_time

import pytest
from benchmarks._worst import CHATS, WORST

from kvbelt.errors import RequestError
from kvbelt.worker.app import GenerateEndpoint

#: Of the thread's own time, so that other processes do not count. The goal is 0.05; the rest is for slow machines.
MOST_SECONDS = 0.2


@pytest.mark.parametrize("name", WORST)
def test_no_request_holds_the_loop_for_long(name, ready):
    """No piece of its reading does."""
    worst = WORST[name]()
    if len(worst.body) > ready.limits.body_bytes:
        return  # refused by its length
    longest, pieces = 0.0, GenerateEndpoint(ready, chat=worst.path == CHATS)._read(worst.body)
    while True:
        began = thread_time()
        try:
            next(pieces)
        except (StopIteration, RequestError):
            break
        finally:
            longest = max(longest, thread_time() - began)
    assert longest < MOST_SECONDS
