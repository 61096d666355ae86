"""Each failure ends at once in the right answer or in an error, and the next request is unharmed."""

import asyncio
import json

import pytest

from kvbelt.wire.notification import TransferDone, TransferFailed, encode
from tests.http.support import SECONDS
from tests.proxy.support import Deployment, async_test, eventually, generated, in_time

BODY = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
STREAM = BODY | {"stream": True}
REDERIVED = BODY | {"stream": True, "seed": 3, "temperature": 1.0}
FAST_HEALTH = {"health_interval_seconds": 0.02, "health_timeout_seconds": 0.2}


async def right(deployment, reply, body=None):
    """Whether the reply has one server's text."""
    return await deployment.right(reply, body or BODY)


# The prefill worker fails: the decode worker computes the prompt itself.


@pytest.mark.parametrize("stream", [False, True])
@async_test
async def test_a_prefill_worker_that_is_gone_leaves_the_answer_right(stream):
    """The decode worker computes the prompt, and the next request avoids the lost worker."""
    async with Deployment() as deployment:
        await deployment.prefill[0].stop()
        got = await deployment.ask(BODY | {"stream": stream})
        assert got.path == "local; reason=prefill_unreachable"
        assert await right(deployment, got)
        # found out at once, not at the next health check
        await eventually(lambda: not deployment.worker(deployment.prefill[0]).ready)
        assert (await deployment.ask(BODY)).path == "local; reason=no_prefill_worker"


@async_test
async def test_a_prefill_worker_that_dies_over_the_prompt_leaves_the_answer_right():
    """A prefill worker that is killed before it answers is replaced by the decode worker."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.die_before_head = True
        got = await deployment.ask(STREAM)
        assert got.path == "local; reason=prefill_lost"
        assert await right(deployment, got)
        assert "prefill_lost" in (await deployment.record())["errors"][0]


@async_test
async def test_a_prefill_worker_that_stops_answering_is_lost_by_its_health():
    """A stopped worker (SIGSTOP) keeps its connections open and is found by its silent health check."""
    async with Deployment(**FAST_HEALTH) as deployment:
        script = deployment.prefill[0].script
        script.before_head = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(STREAM))
        await deployment.prefill[0].arrived.wait()
        script.health_hangs = True
        got = await asking
        assert got.path == "local; reason=prefill_lost"
        assert await right(deployment, got)
        script.health_hangs = False
        script.before_head = None
        await eventually(lambda: deployment.worker(deployment.prefill[0]).ready)
        assert (await deployment.ask(STREAM)).path == "first-token"


@async_test
async def test_a_prefill_worker_that_fails_with_5xx_leaves_the_answer_right():
    """The decode worker answers instead."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.status = 503
        got = await deployment.ask(BODY)
        assert got.path == "local; reason=prefill_5xx"
        assert await right(deployment, got)


@pytest.mark.parametrize("body", [b"{}", b"nonsense", b'{"id":"x","created":1,"model":"m","choices":[],"usage":{}}'])
@async_test
async def test_a_prefill_worker_that_answers_nonsense_leaves_the_answer_right(body):
    """A 200 that is not a completion counts as a failure."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.status = 200
        deployment.prefill[0].script.body = body
        got = await deployment.ask(BODY)
        assert got.path == "local; reason=prefill_bad_answer"
        assert await right(deployment, got)


@async_test
async def test_a_prefill_worker_that_refuses_is_quoted():
    """A 4xx is passed on, and no other worker is asked."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.status = 422
        got = await deployment.ask(STREAM)
        assert (got.status, got.json["error"]["message"]) == (422, "as scripted")
        assert not deployment.decode[0].requests


@pytest.mark.parametrize("lacking", ["prefill", "decode"])
@pytest.mark.parametrize("body", [BODY, STREAM, REDERIVED, BODY | {"max_tokens": 1}])
@async_test
async def test_a_model_that_one_worker_lacks_is_served_by_the_other(lacking, body):
    """As an adapter that is loaded into one of them. Also after its first token has left."""
    async with Deployment() as deployment:
        getattr(deployment, lacking)[0].script.status = 404
        got = await deployment.ask(body)
        assert got.status == 200
        assert await right(deployment, got, body)


@pytest.mark.parametrize("body", [BODY, STREAM, BODY | {"max_tokens": 1}])
@async_test
async def test_a_model_that_no_worker_has_is_the_workers_404(body):
    async with Deployment(prefill=2) as deployment:
        for standin in (*deployment.prefill, *deployment.decode):
            standin.script.status = 404
        got = await deployment.ask(body)
        assert (got.status, got.json["error"]["message"]) == (404, "as scripted")


@pytest.mark.parametrize("body", [BODY, STREAM, REDERIVED])
@async_test
async def test_a_transfer_that_failed_early_leaves_the_answer_right(body):
    """The prefill worker's answer reports the failure, so the decode worker does not wait for KV."""
    async with Deployment() as deployment:
        state = {"transfer_id": "t", "state": "failed", "reason": "refused_layout"}
        deployment.prefill[0].script.transfer_state = state
        got = await deployment.ask(body)
        assert got.path == "local; reason=transfer_refused_layout"
        assert await right(deployment, got, body)
        assert "kv_transfer_params" not in deployment.decode[0].requests[0][2]


@async_test
async def test_lost_kv_is_reported_in_the_header_or_in_a_comment():
    """The new path is in the header, or in an SSE comment after the first token."""
    async with Deployment() as deployment:
        deployment.decode[0].script.kv = "recomputed; reason=deadline"
        got = await deployment.ask(STREAM)
        assert got.path == "first-token"
        assert b"\n\n: x-kvbelt-path local; reason=deadline\n\n" in got.body
        assert await right(deployment, got)
        for body in (BODY, REDERIVED):
            assert (await deployment.ask(body)).path == "local; reason=deadline"
        decision = (await deployment.record())["decision"]
        assert (decision["path"], decision["reason"]) == ("local", "deadline")


@pytest.mark.parametrize("body", [BODY, STREAM, REDERIVED])
@async_test
async def test_a_prefill_worker_lost_while_its_kv_is_awaited(body):
    """The proxy asks the waiting decode worker again, without the KV."""
    async with Deployment(**FAST_HEALTH) as deployment:
        decode, prefill = deployment.decode[0], deployment.prefill[0]
        decode.script.kv_arrives = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(body))
        await decode.arrived.wait()
        prefill.script.health_hangs = True
        got = await asking
        assert "local; reason=prefill_lost" in got.path or b"local; reason=prefill_lost" in got.body
        assert await right(deployment, got, body)


@async_test
async def test_a_failed_transfer_that_the_decode_worker_did_not_learn_of():
    """The prefill worker's notification is enough, after a moment."""
    async with Deployment() as deployment:
        decode = deployment.decode[0]
        decode.script.kv_arrives = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(STREAM))
        await decode.arrived.wait()
        transfer_id = decode.requests[0][2]["kv_transfer_params"]["transfer_id"]
        failed = TransferFailed(
            transfer_id=transfer_id, sender="p0", receiver="d0", num_bytes=5, seconds=0.1, reason="peer_lost"
        )
        await deployment.notify(encode(failed))
        got = await asking
        assert b"local; reason=transfer_peer_lost" in got.body
        assert await right(deployment, got)
        assert (await deployment.record())["transfer"]["reason"] == "peer_lost"
        assert b"lmcache_nixl_transfer_failures_total 1.0" in (await deployment.get("/metrics")).body


# The decode worker fails.


@async_test
async def test_a_decode_worker_lost_after_the_first_token_is_replaced():
    """Another decode worker computes prompt and first token, and continues after it."""
    async with Deployment(decode=2) as deployment:
        deployment.decode[0].script.die_before_head = True
        got = await deployment.ask(STREAM)
        assert await right(deployment, got, STREAM)
        assert b": x-kvbelt-path local; reason=decode_lost; after=decode_lost\n\n" in got.body
        assert "kv_transfer_params" not in deployment.decode[1].requests[0][2]
        decision = (await deployment.record())["decision"]
        assert (decision["path"], decision["reason"]) == ("local", "decode_lost")


@pytest.mark.parametrize(("body", "path"), [(BODY, "first-token"), (REDERIVED, "re-derive; reason=seed")])
@async_test
async def test_a_decode_worker_lost_before_anything_was_sent_is_replaced_with_kv(body, path):
    """The other decode worker gets KV of its own, under a new transfer id."""
    async with Deployment(decode=2) as deployment:
        deployment.decode[0].script.die_before_head = True
        got = await deployment.ask(body)
        assert await right(deployment, got, body)
        assert got.path == f"{path}; after=decode_lost"
        first, second = generated(deployment.prefill[0])
        assert second["kv_transfer_params"]["receiver"]["engine_id"] == "d1"
        name = second["kv_transfer_params"]["transfer_id"]
        assert name != first["kv_transfer_params"]["transfer_id"]
        assert generated(deployment.decode[1])[0]["kv_transfer_params"]["transfer_id"] == name


@async_test
async def test_no_decode_worker_is_503_with_retry_after():
    """The answer is 503 both before the failure is known and after it."""
    async with Deployment() as deployment:
        await deployment.decode[0].stop()
        for _ in range(2):
            got = await deployment.ask(BODY)
            assert (got.status, got.headers[b"retry-after"]) == (503, b"1")
            assert got.json["error"]["type"] == "unavailable"
        await eventually(lambda: not deployment.worker(deployment.decode[0]).ready)
        assert (await deployment.get("/health")).status == 503


@async_test
async def test_no_decode_worker_after_the_first_token_is_an_error_event():
    """A stream that has begun ends with the error and [DONE]."""
    async with Deployment() as deployment:
        deployment.decode[0].script.die_before_head = True
        got = await deployment.ask(STREAM)
        assert got.status == 200
        assert got.events[-1]["error"]["code"] == 503


@pytest.mark.parametrize("body", [STREAM, REDERIVED, STREAM | {"return_token_ids": True}])
@async_test
async def test_a_decode_worker_killed_in_mid_stream_ends_it_with_an_error_event(body):
    """The client gets whole events, then the error, then [DONE]."""
    async with Deployment() as deployment:
        deployment.decode[0].script.die_after_tokens = 4
        got = await deployment.ask(body)
        assert "error" in got.events[-1]
        assert all("choices" in event for event in got.events[:-1])
        expected = (await deployment.ask_alone(BODY)).text
        assert got.text
        assert expected.startswith(got.text)
        assert b"kvbelt_proxy_broken_streams_total 1.0" in (await deployment.get("/metrics")).body


@async_test
async def test_a_stream_waits_for_a_decode_worker_that_stands_still():
    """The worker counts as lost meanwhile, and its stream is whole in the end."""
    async with Deployment(**FAST_HEALTH) as deployment:
        script, worker = deployment.decode[0].script, deployment.worker(deployment.decode[0])
        goes_on = asyncio.Event()
        script.stop_after_tokens = (4, goes_on)
        asking = asyncio.create_task(deployment.ask(STREAM))
        await eventually(lambda: streaming(deployment))
        script.health_hangs = True
        await eventually(lambda: worker.lost)
        assert not asking.done()
        script.health_hangs = False
        await eventually(lambda: worker.ready)
        goes_on.set()
        assert await deployment.right(await asking, BODY)


@pytest.mark.parametrize("end", ["killed", "another process", "deadline"])
@async_test
async def test_a_stream_of_a_silent_decode_worker_ends_with_an_error_event(end):
    """When its connection ends, it turns out to have been restarted, or the request's deadline has passed."""

    async def attempt(seconds):
        deadline = b"%g" % (seconds if end == "deadline" else 1000.0)
        async with Deployment(**FAST_HEALTH) as deployment:
            decode = deployment.decode[0]
            decode.script.stop_after_tokens = (4, asyncio.Event())
            asking = asyncio.create_task(deployment.ask(STREAM, headers=((b"x-kvbelt-deadline-seconds", deadline),)))
            await eventually(lambda: streaming(deployment) or asking.done())
            decode.script.health_hangs = True
            await eventually(lambda: deployment.worker(decode).lost)
            if end == "deadline" and asking.done():
                return False
            if end == "killed":
                await decode.stop()
            elif end == "another process":
                decode.engine_id, decode.script.health_hangs = "d0-again", False
            error = (await asking).events[-1]["error"]
            assert error["reason"] == ("deadline" if end == "deadline" else "decode_lost")
            return True

    await in_time(attempt)


def streaming(deployment):
    """Whether a decode worker's stream is on its way to the client."""
    return any(one.streaming for one in deployment.proxy.context.records.open.values())


@pytest.mark.parametrize("fields", [{}, {"seed": 1}])
@async_test
async def test_a_decode_worker_killed_under_a_whole_answer_is_502(fields):
    """The status is an error, since nothing was sent."""
    async with Deployment() as deployment:
        deployment.decode[0].script.stop_after_tokens = (4, asyncio.Event())
        asking = asyncio.create_task(deployment.ask(BODY | fields))
        await deployment.decode[0].arrived.wait()
        await deployment.decode[0].stop()
        got = await asking
        assert got.status in (502, 503)
        assert got.json["error"]["code"] == got.status


@pytest.mark.parametrize("status", [400, 429, 500, 503])
@async_test
async def test_a_decode_workers_refusal_reaches_the_client(status):
    """Status and body are passed on; after a first token, as an error event."""
    async with Deployment() as deployment:
        deployment.decode[0].script.status = status
        for body in (BODY, REDERIVED):
            got = await deployment.ask(body)
            assert (got.status, got.json["error"]["message"]) == (status, "as scripted")
        got = await deployment.ask(STREAM)
        assert got.events[-1]["error"]["message"] == "as scripted"


@pytest.mark.parametrize("body", [BODY, REDERIVED, STREAM])
@async_test
async def test_a_decode_worker_that_is_stopping_is_replaced_by_another(body):
    """Another ready decode worker answers instead of a 503."""
    async with Deployment(decode=2) as deployment:
        stopping, other = deployment.decode
        stopping.script.status = 503
        for _ in range(2):  # round robin: one of the two would be the stopping worker's
            got = await deployment.ask(body)
            assert got.status == 200
            assert got.text
        assert len(generated(stopping)) == 1
        assert len(generated(other)) == 2


@async_test
async def test_an_event_that_is_no_event_ends_the_stream_with_an_error():
    """In a chat, an event that is not JSON ends the stream with an error."""
    async with Deployment() as deployment:
        deployment.decode[0].script.bad_event = True
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "stream": True}
        got = await deployment.ask(chat, chat=True)
        assert got.events[-1]["error"]["code"] == 502
        assert deployment.worker(deployment.decode[0]).in_flight == 0


@async_test
async def test_a_fault_of_the_proxy_itself_is_an_honest_500(monkeypatch, caplog):
    """The client gets a 500, the log a line, and the next request is unharmed."""
    async with Deployment() as deployment:
        with monkeypatch.context() as patch:
            patch.setattr(deployment.proxy.context.dispatcher.placement, "arrive", lambda *_: 1 / 0)
            got = await deployment.ask(BODY)
        assert (got.status, got.json["error"]["type"]) == (500, "internal_error")
        assert "ZeroDivisionError" in caplog.text
        assert (await deployment.ask(BODY)).status == 200


@pytest.mark.parametrize("stream", [False, True])
@async_test
async def test_a_prefill_worker_lost_over_a_single_token_leaves_the_answer_right(stream):
    """The decode worker answers instead."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.die_before_head = True
        body = BODY | {"max_tokens": 1, "stream": stream}
        got = await deployment.ask(body)
        assert got.path == "local; reason=prefill_lost"
        assert await right(deployment, got, body)


@async_test
async def test_a_restarted_worker_is_used_again():
    """Old connections are dropped, and KV is sent to the new engine_id."""
    async with Deployment(**FAST_HEALTH) as deployment:
        decode = deployment.decode[0]
        await deployment.ask(BODY)
        port = decode.port
        await decode.stop()
        decode.engine_id = "second-life"
        await decode.start(port)
        await eventually(lambda: deployment.worker(decode).endpoint.report.engine_id == "second-life")
        assert (await deployment.ask(BODY)).path == "first-token"
        last = deployment.prefill[0].requests[-1][2]
        assert last["kv_transfer_params"]["receiver"]["engine_id"] == "second-life"


@async_test
async def test_a_draining_worker_gets_nothing_new():
    """A worker that answers 503 on /health is unready, not lost."""
    async with Deployment(decode=2, **FAST_HEALTH) as deployment:
        deployment.decode[0].script.health_status = 503
        await eventually(lambda: not deployment.worker(deployment.decode[0]).ready)
        for _ in range(3):
            assert (await deployment.ask(BODY)).status == 200
        assert not deployment.decode[0].requests
        states = [worker["state"] for worker in (await deployment.get("/health")).json["workers"]]
        assert states == ["ready", "unready", "ready"]


@async_test
async def test_a_worker_that_becomes_ready_is_used_before_the_next_interval():
    """A worker that is still loading is asked often, whatever the interval."""
    async with Deployment(health_interval_seconds=3600) as deployment:
        loading = deployment.decode[0]
        loading.script.health_status = 503
        worker = deployment.worker(loading)
        worker.suspect()
        await eventually(lambda: not worker.ready)
        loading.script.health_status = 200
        await eventually(lambda: worker.ready)


# The client fails, or takes too long.


@pytest.mark.parametrize("where", ["prefill", "decode head", "decode stream"])
@async_test
async def test_a_client_that_leaves_stops_the_work(where):
    """The worker that is busy with the request notices at once."""
    async with Deployment() as deployment:
        prefill, decode = deployment.prefill[0], deployment.decode[0]
        if where == "prefill":
            prefill.script.before_head = asyncio.Event()
        elif where == "decode head":
            decode.script.before_head = asyncio.Event()
        else:
            decode.script.stop_after_tokens = (4, asyncio.Event())
        worker = prefill if where == "prefill" else decode
        asking = asyncio.create_task(deployment.ask(STREAM))
        await worker.arrived.wait()
        asking.cancel()
        await asyncio.wait_for(worker.gone_event.wait(), SECONDS)
        await eventually(lambda: not deployment.proxy.context.records.open)
        assert (await deployment.record())["status"] == 499


@async_test
async def test_a_slow_client_slows_the_decode_worker():
    """A decode worker does not produce what the client does not read."""
    body = {"prompt": "x", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    async with Deployment() as deployment:
        deployment.decode[0].script.pad = 20_000
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", deployment.proxy.port, limit=1024)
        writer.write(head % len(data) + data)
        connections = deployment.proxy._server._connections
        await eventually(lambda: any(c._outlet.paused for c in connections))
        received, ended = 0, b""
        while not ended.endswith(b"0\r\n\r\n"):
            chunk = await reader.read(1 << 20)
            received += len(chunk)
            ended = (ended + chunk)[-16:]
        assert received > 4000 * 20_000
        writer.close()


@pytest.mark.parametrize(("body", "where"), [(BODY, "prefill"), (BODY, "decode"), (STREAM, "decode")])
@async_test
async def test_the_deadline_ends_what_takes_too_long(body, where):
    """The answer is 504 before the first byte and an error event after it, and the worker stops."""

    async def attempt(seconds):
        async with Deployment(deadline_seconds=seconds) as deployment:
            worker = deployment.prefill[0] if where == "prefill" else deployment.decode[0]
            worker.script.before_head = asyncio.Event()
            got = await deployment.ask(body)
            if not worker.arrived.is_set():
                return False
            if body is STREAM:
                assert got.events[-1]["error"]["code"] == 504
            else:
                assert (got.status, got.json["error"]["type"]) == (504, "timeout_error")
            await asyncio.wait_for(worker.gone_event.wait(), SECONDS)
            return True

    await in_time(attempt)


@async_test
async def test_malformed_notifications_are_counted_and_good_ones_recorded():
    """Malformed messages do not harm the notification port."""
    async with Deployment() as deployment:
        await deployment.ask(BODY)
        transfer_id = (await deployment.record())["transfer_id"]
        done = TransferDone(
            transfer_id=transfer_id, sender="p0", receiver="d0", num_bytes=2_000_000, seconds=0.001, channel="nixl",
            num_tokens=5, num_writes=3, exposed_seconds=0.0005,
        )  # fmt: skip
        for frames in ((b"",), (b"\xff" * 50,), (b"x" * 5000,), (b"two", b"frames"), (encode(done),)):
            await deployment.notify(*frames)
        context = deployment.proxy.context
        refused = {"notifications": {"malformed": 3, "oversized": 1}}
        metrics = context.metrics
        await eventually(lambda: metrics.refusals.totals() == refused and metrics.transfer_size.count == 1)
        transfer = (await deployment.record())["transfer"]
        assert (transfer["state"], transfer["bytes"], transfer["gb_per_second"]) == ("done", 2_000_000, 2.0)
        assert (transfer["channel"], transfer["exposed_ms"]) == ("nixl", 0.5)
