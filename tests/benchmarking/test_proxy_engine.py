"""The stand-in engine of benchmarks/proxy.py answers as a request asks, however its bytes arrive."""

import pytest
from benchmarks._proxy_load import Answered, Engine, health, post, prompt_ids, request


class Written:
    """A transport that keeps what is written."""

    def __init__(self):
        self.data = b""

    def write(self, data):
        self.data += data


def asked(sent, pieces, **options):
    """The answer to one request, and what the engine counts."""
    answered, written = Answered(), Written()
    engine = Engine(health("prefill"), answered, **options)
    engine.connection_made(written)
    size = -(-len(sent) // pieces)
    for at in range(0, len(sent), size):
        assert not written.data, "answered before the request's end"
        engine.data_received(sent[at : at + size])
    return written.data, answered


@pytest.mark.parametrize("pieces", [1, 2, 7, 500])
def test_a_stream_is_answered_with_a_stream(pieces):
    """A whole request, or the second half of a split one."""
    answer, answered = asked(request(prompt_ids()), pieces)
    assert b"text/event-stream" in answer
    assert answer.endswith(b"0\r\n\r\n")
    assert answered == Answered(streams=1)


@pytest.mark.parametrize("pieces", [1, 2, 7, 500])
def test_a_prefill_call_gets_ids_if_it_asks_for_them(pieces):
    """The ids are what makes the answer long."""
    told = {"prompt": prompt_ids(), "max_tokens": 1, "stream": False}
    short, answered = asked(post(**told), pieces)
    assert b"prompt_token_ids" not in short
    assert answered == Answered(one_token=1)
    with_ids, _ = asked(post(**told, return_token_ids=True), pieces)
    assert b"prompt_token_ids" in with_ids
    assert asked(post(**told), pieces, always_ids=True)[0] == with_ids
