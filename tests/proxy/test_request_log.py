"""The proxy's log has one line a request with its TTFT, and neither prompts nor answers."""

import logging

import pytest

from kvbelt.proxy.observe.records import Record
from kvbelt.proxy.observe.request_log import RequestLog, fields_of
from tests.proxy.support import Deployment, async_test

PROMPT = "a word that no log line has: xylophone"


def record_of(number, ttft=0.01):
    """A request that has ended."""
    return Record(f"r{number}", "/v1/completions", 0.0, 0.0, stream=True, first_token=ttft, ended=0.1, status=200)


@async_test
async def test_each_request_has_a_line(caplog):
    """The line has the request id, status, path, prefill worker, transfer id and times."""
    caplog.set_level(logging.INFO, "kvbelt.requests")
    async with Deployment() as deployment:
        await deployment.ask({"prompt": "hello", "max_tokens": 6, "temperature": 0})
        worker = deployment.prefill[0]
    (line,) = [one for one in caplog.records if one.name == "kvbelt.requests"]
    assert line.getMessage().startswith("TTFT ")
    assert ", first-token, 127.0.0.1:" in line.getMessage()
    assert (line.request_id, line.status, line.path) == ("r1", 200, "first-token")
    assert line.prefill == f"127.0.0.1:{worker.port}"
    assert line.transfer_id
    assert 0 < line.ttft_ms <= line.total_ms


@async_test
async def test_a_request_without_a_token_has_one_too(caplog):
    """The line has the status in place of the TTFT."""
    caplog.set_level(logging.INFO, "kvbelt.requests")
    async with Deployment() as deployment:
        await deployment.ask(b"{", request_id="bad")
    (line,) = [one for one in caplog.records if one.name == "kvbelt.requests"]
    assert (line.getMessage(), line.request_id) == ("no token: status 400", "bad")


@pytest.mark.parametrize(("path", "ttft"), [("first-token", "30.0 ms"), ("local", "unknown")])
def test_a_whole_answer_is_not_its_first_token(path, ttft, caplog):
    """The line of an answer in one piece has the time of each, and does not guess an unknown TTFT."""
    caplog.set_level(logging.INFO, "kvbelt.requests")
    record = Record("r", "/v1/completions", 0.0, 0.0, path=path, prefill_answered=0.03, first_token=0.09, ended=0.1)
    RequestLog(2).ended(record)
    assert caplog.records[-1].getMessage() == f"TTFT {ttft}, whole answer 100.0 ms, {path}"
    assert getattr(caplog.records[-1], "ttft_ms", None) == (30.0 if path == "first-token" else None)


@async_test
async def test_beyond_the_rate_requests_are_counted(caplog):
    """One line a second has their number, mean and maximum."""
    caplog.set_level(logging.INFO, "kvbelt.requests")
    now = [0.0]
    log = RequestLog(2, clock=lambda: now[0])
    for number in range(5):
        log.ended(record_of(number, ttft=0.01 * (number + 1)))
    log.close()
    texts = [one.getMessage() for one in caplog.records]
    assert texts == [
        "TTFT 10.0 ms, whole answer 100.0 ms",
        "TTFT 20.0 ms, whole answer 100.0 ms",
        "TTFT of 3 more: 40.0 ms on average, 50.0 ms at most",
    ]
    now[0] = 1.0
    log.ended(record_of(9))
    assert caplog.records[-1].request_id == "r9"


@async_test
async def test_a_rate_of_zero_is_silence(caplog):
    """No request is logged or counted."""
    caplog.set_level(logging.INFO, "kvbelt.requests")
    log = RequestLog(0)
    log.ended(record_of(1))
    log.close()
    assert not caplog.records


def test_what_is_not_known_is_left_out():
    """A refused request has no worker and no path."""
    refused = Record("r", "/v1/completions", began=0.0, unix_time=0.0, ended=0.1, status=400)
    assert fields_of(refused) == {"request_id": "r", "status": 400, "total_ms": 100.0}


@async_test
async def test_no_prompt_and_no_key_gets_into_the_log(caplog):
    """This holds for a refusal that quotes the prompt, for a failed worker and for an error."""
    caplog.set_level(logging.DEBUG)
    key = "k" * 32
    async with Deployment(prefill=2, admin_key=key) as deployment:
        for number, body in enumerate(
            (
                {"prompt": PROMPT, "max_tokens": 3, "temperature": 0},
                {"prompt": PROMPT, "max_tokens": 3, "stream": True},
                {"prompt": PROMPT, "max_tokens": PROMPT},
                {"prompt": {"not": PROMPT}},
            )
        ):
            await deployment.ask(body, request_id=f"s{number}")
        await deployment.ask({"messages": [{"role": "user", "content": PROMPT}]}, chat=True)
        await deployment.get(
            "/kvbelt/workers/x:1/drain", "POST", headers=((b"authorization", f"Bearer {key}".encode()),)
        )
        for prefill in deployment.prefill:
            await prefill.stop()
        await deployment.ask({"prompt": PROMPT, "max_tokens": 3, "temperature": 0}, request_id="lost")
    said = "\n".join(f"{one.getMessage()} {one.__dict__}" for one in caplog.records)
    assert "lost" in said
    assert "xylophone" not in said
    assert key not in said
