"""How long the proxy's event loop is held by the largest requests."""

from time import thread_time

import pytest
from benchmarks._worst import CHATS, WORST

from kvbelt.errors import RequestError
from kvbelt.limits import DEFAULTS
from kvbelt.proxy.request.body import ClientBody
from kvbelt.routing.prefixes import Prefix
from kvbelt.routing.token_count import TokenCounts

#: Of the thread's own time, so that other processes do not count. The goal is 0.05; the rest is for slow machines.
MOST_SECONDS = 0.2


@pytest.mark.parametrize("name", WORST)
def test_no_request_holds_the_loop_for_long(name):
    """No piece of its reading does."""
    worst = WORST[name]()
    if len(worst.body) > DEFAULTS.body_bytes:
        return  # refused by its length

    def reading():
        yield from DEFAULTS.looking_through(worst.body)
        yield
        client = ClientBody(worst.body, chat=worst.path == CHATS, limits=DEFAULTS, context=2048)
        size = TokenCounts().size_of(client.fields.model, client.prompt)
        Prefix(client.prompt, size.tokens, client.fields.beside_prompt)

    longest, pieces = 0.0, reading()
    while True:
        began = thread_time()
        try:
            next(pieces)
        except (StopIteration, RequestError):
            break
        finally:
            longest = max(longest, thread_time() - began)
    assert longest < MOST_SECONDS
