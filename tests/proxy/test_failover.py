"""A failed request is tried on another prefill worker, another decode worker, and then by the decode worker alone."""

import asyncio

import pytest

from kvbelt.wire.notification import TransferFailed, encode
from tests.proxy.support import Deployment, async_test, eventually, generated, in_time

BODY = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
STREAM = BODY | {"stream": True}
REDERIVED = BODY | {"stream": True, "seed": 3, "temperature": 1.0}
ONE_TOKEN = BODY | {"max_tokens": 1}
FAST_HEALTH = {"health_interval_seconds": 0.02, "health_timeout_seconds": 0.2}


def failing(reason):
    """A prefill worker's report of a failed transfer."""
    return {"transfer_id": "t", "state": "failed", "reason": reason}


def reasons(record):
    """The leg and the reason of each attempt; the reason is None if it did not fail."""
    return [(attempt["leg"], attempt["reason"]) for attempt in record["attempts"]]


# The prefill worker fails: another one reads the prompt.


async def break_prefill(deployment, how):
    """Make the first prefill worker fail from now on."""
    broken = deployment.prefill[0]
    if how == "unreachable":
        await broken.stop()
    elif how == "lost":
        broken.script.die_before_head = True
    elif how == "5xx":
        broken.script.status = 503
    elif how == "bad_answer":
        broken.script.status, broken.script.body = 200, b"nonsense"


@pytest.mark.parametrize("how", ["unreachable", "lost", "5xx", "bad_answer"])
@pytest.mark.parametrize("body", [BODY, STREAM, REDERIVED], ids=["whole", "stream", "re-derive"])
@async_test
async def test_another_prefill_worker_takes_over(how, body):
    """The second worker sends the KV under a new transfer id, and the header names the earlier failure."""
    async with Deployment(prefill=2) as deployment:
        await break_prefill(deployment, how)
        got = await deployment.ask(body)
        assert got.path.endswith(f"; after=prefill_{how}")
        assert not got.path.startswith("local")
        assert await deployment.right(got, body)
        sent = generated(deployment.prefill[1])[0]["kv_transfer_params"]["transfer_id"]
        assert generated(deployment.decode[0])[0]["kv_transfer_params"]["transfer_id"] == sent
        tried = generated(deployment.prefill[0])
        assert all(one["kv_transfer_params"]["transfer_id"] != sent for one in tried)
        record = await deployment.record()
        assert reasons(record) == [("prefill", f"prefill_{how}"), ("prefill", None), ("decode", None)]
        assert record["transfer_id"] == sent
        line = f'kvbelt_proxy_failed_attempts_total{{leg="prefill",reason="prefill_{how}"}} 1.0'
        assert line in (await deployment.get("/metrics")).body.decode()


@async_test
async def test_a_prefill_worker_and_the_decode_worker_may_be_lost_together():
    """The request is placed anew on two others."""
    async with Deployment(prefill=2, decode=2, **FAST_HEALTH) as deployment:
        (broken, _), (lost, _) = deployment.prefill, deployment.decode
        broken.script.before_head, broken.script.status = asyncio.Event(), 503
        asking = asyncio.create_task(deployment.ask(BODY))
        await broken.arrived.wait()
        lost.script.health_hangs = True
        await eventually(lambda: not deployment.worker(lost).ready)
        broken.script.before_head.set()
        got = await asking
        assert got.path == "first-token; after=prefill_5xx"
        assert await deployment.right(got, BODY)


@pytest.mark.parametrize("how", ["unreachable", "lost", "5xx"])
@async_test
async def test_another_prefill_worker_gives_the_only_token(how):
    """A request for one token is answered by the second prefill worker alone."""
    async with Deployment(prefill=2) as deployment:
        await break_prefill(deployment, how)
        got = await deployment.ask(ONE_TOKEN)
        assert got.path == f"prefill-only; after=prefill_{how}"
        assert await deployment.right(got, ONE_TOKEN)
        assert not deployment.decode[0].requests


@async_test
async def test_a_prefill_worker_that_is_stopped_is_replaced_when_its_health_is_silent():
    """A stopped worker keeps its connections open. Another one is asked, and later requests avoid it."""
    async with Deployment(prefill=2, **FAST_HEALTH) as deployment:
        stopped = deployment.prefill[0]
        stopped.script.before_head = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(STREAM))
        await stopped.arrived.wait()
        stopped.script.health_hangs = True
        got = await asking
        assert got.path == "first-token; after=prefill_lost"
        assert await deployment.right(got, STREAM)
        for _ in range(3):
            assert (await deployment.ask(STREAM)).path == "first-token"
        assert len(stopped.requests) == 1


@async_test
async def test_when_every_prefill_worker_fails_the_decode_worker_does_it_all():
    """Each prefill worker is asked once."""
    async with Deployment(prefill=2) as deployment:
        for prefill in deployment.prefill:
            prefill.script.status = 503
        got = await deployment.ask(BODY)
        assert got.path == "local; reason=prefill_5xx; after=prefill_5xx"
        assert await deployment.right(got, BODY)
        assert [len(prefill.requests) for prefill in deployment.prefill] == [1, 1]


@async_test
async def test_the_number_of_legs_is_bounded():
    """A request that breaks every worker that takes it reaches no more than the allowed number."""
    async with Deployment(prefill=4, decode=4, max_attempts=2) as deployment:
        for worker in (*deployment.prefill, *deployment.decode):
            worker.script.die_before_head = True
        got = await deployment.ask(BODY)
        assert (got.status, got.json["error"]["reason"]) == (503, "decode_lost")
        assert got.headers[b"retry-after"] == b"1"
        assert sum(len(worker.requests) for worker in deployment.prefill) == 2
        assert sum(len(worker.requests) for worker in deployment.decode) == 2


# The transfer fails before the decode leg.


@pytest.mark.parametrize("body", [BODY, STREAM, REDERIVED], ids=["whole", "stream", "re-derive"])
@async_test
async def test_a_transfer_that_failed_early_is_tried_from_another_prefill_worker(body):
    """The other worker computes the prompt again and sends its KV."""
    async with Deployment(prefill=2) as deployment:
        deployment.prefill[0].script.transfer_state = failing("write_failed")
        got = await deployment.ask(body)
        assert got.path.endswith("; after=transfer_write_failed")
        assert not got.path.startswith("local")
        assert await deployment.right(got, body)
        assert reasons(await deployment.record())[0] == ("prefill", "transfer_write_failed")


@pytest.mark.parametrize("reason", ["too_large", "receiver_full", "peer_lost", "stale_engine"])
@async_test
async def test_a_transfer_that_another_prefill_worker_could_not_do_either_is_not_tried_again(reason):
    """The cause lies with the decode worker, which computes the prompt itself."""
    async with Deployment(prefill=2) as deployment:
        deployment.prefill[0].script.transfer_state = failing(reason)
        got = await deployment.ask(BODY)
        assert got.path == f"local; reason=transfer_{reason}"
        assert await deployment.right(got, BODY)
        assert not deployment.prefill[1].requests


@async_test
async def test_an_answer_without_its_kv_is_kept_while_others_are_tried():
    """The first token is right without its KV, and is used when no other prefill worker is left."""
    async with Deployment(prefill=2) as deployment:
        first, second = deployment.prefill
        first.script.transfer_state = failing("write_failed")
        second.script.status = 503
        got = await deployment.ask(STREAM)
        assert got.path == "local; reason=transfer_write_failed; after=transfer_write_failed"
        assert await deployment.right(got, STREAM)
        (continued,) = generated(deployment.decode[0])
        assert isinstance(continued["prompt"][0], int)  # after the first token, which the decode worker did not make
        assert "kv_transfer_params" not in continued


@async_test
async def test_an_early_notification_counts_as_the_prefill_workers_answer():
    """A failure that the prefill worker notifies before it answers counts as one in its answer."""
    async with Deployment(prefill=2) as deployment:
        slow = deployment.prefill[0]
        slow.script.before_head = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(BODY))
        await slow.arrived.wait()
        transfer_id = generated(slow)[0]["kv_transfer_params"]["transfer_id"]
        failed = TransferFailed(
            transfer_id=transfer_id, sender="p0", receiver="d0", num_bytes=0, seconds=0.0, reason="gather_failed"
        )
        await deployment.notify(encode(failed))
        await eventually(lambda: deployment.proxy.context.metrics.failures)
        slow.script.before_head.set()
        assert (await asking).path == "first-token; after=transfer_gather_failed"


@pytest.mark.parametrize("reason", ["refused_dtype", "untrusted_key", "refused_model"])
@async_test
async def test_a_pair_that_was_refused_is_not_tried_again(reason):
    """The request that found out and later ones avoid the pair until one of the two is restarted."""
    async with Deployment(prefill=2, **FAST_HEALTH) as deployment:
        misfit = deployment.prefill[0]
        misfit.script.transfer_state = failing(reason)
        assert (await deployment.ask(BODY)).path == f"first-token; after=transfer_{reason}"
        for _ in range(3):
            assert (await deployment.ask(BODY)).path == "first-token"
        assert len(misfit.requests) == 1
        port = misfit.port
        await misfit.stop()
        misfit.engine_id, misfit.script.transfer_state = "p0-again", None
        await misfit.start(port)
        again = deployment.worker(misfit)
        await eventually(lambda: again.engine_id == "p0-again" and again.ready and not again.endpoint.warming)
        for _ in range(2):
            assert (await deployment.ask(BODY)).path == "first-token"
        assert len(misfit.requests) == 2


@async_test
async def test_a_decode_worker_that_refuses_every_prefill_worker_computes_its_prompts():
    """No prefill worker computes a prompt in vain."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.transfer_state = failing("refused_dtype")
        assert (await deployment.ask(BODY)).path == "local; reason=transfer_refused_dtype"
        assert (await deployment.ask(BODY)).path == "local; reason=pairs_refused"
        assert len(deployment.prefill[0].requests) == 1


@async_test
async def test_only_a_word_becomes_a_header():
    """A line break in a worker's reason does not begin a new header."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.transfer_state = failing("a\r\nb: c")
        assert (await deployment.ask(BODY)).path == "local; reason=transfer_failed"


# The decode worker fails.


@pytest.mark.parametrize(
    ("how", "reason"), [("unreachable", "decode_unreachable"), ("lost", "decode_lost"), ("5xx", "decode_5xx")]
)
@pytest.mark.parametrize("body", [BODY, REDERIVED, BODY | {"prompt": ["a", "b"]}], ids=["whole", "re-derive", "local"])
@async_test
async def test_another_decode_worker_takes_over(how, reason, body):
    """The whole request is repeated, since nothing was sent to the client."""
    async with Deployment(decode=2) as deployment:
        broken = deployment.decode[0]
        if how == "unreachable":
            await broken.stop()
        elif how == "lost":
            broken.script.die_before_head = True
        else:
            broken.script.status = 503
        got = await deployment.ask(body)
        assert got.path.endswith(f"; after={reason}")
        assert await deployment.right(got, body)
        assert ("decode", reason) in reasons(await deployment.record())


@pytest.mark.parametrize("body", [STREAM, REDERIVED], ids=["stream", "re-derive"])
@async_test
async def test_a_decode_worker_lost_after_its_head_is_replaced_before_anything_was_sent(body):
    """A head without a body is no answer to the client yet."""
    async with Deployment(decode=2) as deployment:
        deployment.decode[0].script.die_behind_head = True
        got = await deployment.ask(body)
        assert await deployment.right(got, body)
        assert "after=decode_lost" in got.path or b"after=decode_lost" in got.body


@async_test
async def test_a_whole_answer_cut_in_its_body_is_made_again():
    """Nothing of a cut answer has reached the client."""
    async with Deployment(decode=2) as deployment:
        broken = deployment.decode[0]
        broken.script.stop_after_tokens = (4, asyncio.Event())
        asking = asyncio.create_task(deployment.ask(BODY))
        await broken.arrived.wait()
        await broken.stop()
        got = await asking
        assert got.path == "first-token; after=decode_lost"
        assert await deployment.right(got, BODY)


@async_test
async def test_the_last_decode_workers_answer_reaches_the_client():
    """The last 5xx answer is passed on when no decode worker is left."""
    async with Deployment(decode=2) as deployment:
        for decode in deployment.decode:
            decode.script.status = 503
        got = await deployment.ask(BODY)
        assert (got.status, got.json["error"]["message"]) == (503, "as scripted")
        assert [len(decode.requests) for decode in deployment.decode] == [1, 1]


@async_test
async def test_a_restarted_decode_worker_gets_the_prompt_again():
    """The KV went to the earlier process; the prompt is computed again for the new one."""
    async with Deployment(**FAST_HEALTH) as deployment:
        prefill, decode = deployment.prefill[0], deployment.decode[0]
        prefill.script.before_head = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(BODY))
        await prefill.arrived.wait()
        decode.engine_id = "d0-again"
        await eventually(lambda: deployment.worker(decode).engine_id == "d0-again")
        prefill.script.before_head.set()
        got = await asking
        assert got.path == "first-token; after=decode_restarted"
        assert await deployment.right(got, BODY)
        sent_to = [body["kv_transfer_params"]["receiver"]["engine_id"] for body in generated(prefill)]
        assert sent_to == ["d0", "d0-again"]
        assert len(decode.requests) == 1


@async_test
async def test_no_decode_worker_left_is_503_with_a_reason():
    """The answer is 503 with Retry-After and a reason."""
    async with Deployment(decode=2) as deployment:
        for decode in deployment.decode:
            await decode.stop()
        got = await deployment.ask(BODY)
        assert (got.status, got.headers[b"retry-after"]) == (503, b"1")
        assert got.json["error"]["reason"] == "no_decode_worker"
        assert b'kvbelt_proxy_errors_total{reason="no_decode_worker"} 1.0' in (await deployment.get("/metrics")).body


# A slow worker disturbs no other.


@async_test
async def test_a_late_worker_gets_no_requests_while_there_is_another():
    """A late worker is passed over long before it counts as lost."""
    settings = {"health_interval_seconds": 0.02, "health_timeout_seconds": 20.0, "late_seconds": 0.05}
    async with Deployment(prefill=2, decode=2, **settings) as deployment:
        slow = (deployment.prefill[0], deployment.decode[0])
        for worker in slow:
            worker.script.health_hangs = True
            worker.script.before_head = asyncio.Event()
            await eventually(lambda worker=worker: deployment.worker(worker).endpoint.late)
        for _ in range(4):
            assert (await deployment.ask(STREAM)).path == "first-token"
        assert not any(worker.requests for worker in slow)


@async_test
async def test_the_only_worker_is_used_although_it_is_late():
    """A late worker is used if there is no other one."""
    settings = {"health_interval_seconds": 0.02, "health_timeout_seconds": 20.0, "late_seconds": 0.05}
    async with Deployment(**settings) as deployment:
        deployment.decode[0].script.health_hangs = True
        await eventually(lambda: deployment.worker(deployment.decode[0]).endpoint.late)
        assert (await deployment.ask(STREAM)).path == "first-token"


# The deadline.


@async_test
async def test_a_client_may_set_its_own_deadline():
    """The client's deadline limits the request and the transfer."""

    async def attempt(seconds):
        async with Deployment() as deployment:
            deployment.decode[0].script.before_head = asyncio.Event()
            got = await deployment.ask(BODY, headers=((b"x-kvbelt-deadline-seconds", b"%g" % seconds),))
            assert (got.status, got.json["error"]["reason"]) == (504, "deadline")
            assert f"{seconds:g} s" in got.json["error"]["message"]
            if not deployment.decode[0].arrived.is_set():
                return False
            assert 0 < generated(deployment.prefill[0])[0]["kv_transfer_params"]["deadline_seconds"] < seconds
            assert 0 < generated(deployment.decode[0])[0]["kv_transfer_params"]["deadline_seconds"] < seconds
            return True

    await in_time(attempt)


@pytest.mark.parametrize("said", [b"soon", b"0", b"-1", b"nan", b"inf", b""])
@async_test
async def test_a_malformed_deadline_is_refused(said):
    """The answer is 400 and names the header."""
    async with Deployment() as deployment:
        got = await deployment.ask(BODY, headers=((b"x-kvbelt-deadline-seconds", said),))
        assert (got.status, got.json["error"]["param"]) == (400, "x-kvbelt-deadline-seconds")
        assert not deployment.prefill[0].requests


@async_test
async def test_a_clients_deadline_does_not_exceed_the_proxys():
    """The proxy's own deadline is the upper limit."""
    async with Deployment(deadline_seconds=0.2) as deployment:
        deployment.decode[0].script.before_head = asyncio.Event()
        got = await deployment.ask(BODY, headers=((b"x-kvbelt-deadline-seconds", b"100"),))
        assert got.status == 504


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "stream"])
@async_test
async def test_a_deadline_missed_for_want_of_room_is_503(body):
    """The decode worker's buffer was full until the deadline, so a later request may succeed."""

    async def attempt(seconds):
        async with Deployment(deadline_seconds=2 * seconds) as deployment:
            decode = deployment.decode[0]
            decode.script.before_head = asyncio.Event()
            asking = asyncio.create_task(deployment.ask(body))
            await eventually(lambda: decode.arrived.is_set() or asking.done())
            if asking.done():
                return False
            transfer_id = generated(decode)[0]["kv_transfer_params"]["transfer_id"]
            full = TransferFailed(
                transfer_id=transfer_id, sender="p0", receiver="d0", num_bytes=0, seconds=0.0, reason="receiver_full"
            )
            await deployment.notify(encode(full))
            await eventually(lambda: deployment.proxy.context.metrics.failures or asking.done())
            if asking.done():
                return False
            got = await asking
            error = got.json["error"] if body is BODY else got.events[-1]["error"]
            assert (error["code"], error["reason"]) == (503, "receiver_full")
            if body is BODY:
                assert got.headers[b"retry-after"] == b"1"
            return True

    await in_time(attempt)


@async_test
async def test_the_prefill_worker_learns_of_a_full_buffer_before_the_decode_worker_gives_up():
    """The prefill worker's limit is the shorter one, and both leave time for an answer."""
    async with Deployment(deadline_seconds=100.0, kv_wait_seconds=200.0) as deployment:
        await deployment.ask(BODY)
        sends = generated(deployment.prefill[0])[0]["kv_transfer_params"]["deadline_seconds"]
        waits = generated(deployment.decode[0])[0]["kv_transfer_params"]["deadline_seconds"]
        assert sends < waits < 99.5


@async_test
async def test_without_further_attempts_nothing_is_tried_elsewhere():
    """With one attempt, the same failures end locally or in an error."""
    async with Deployment(prefill=2, decode=2, max_attempts=1) as deployment:
        deployment.prefill[0].script.status = 503
        assert (await deployment.ask(BODY)).path == "local; reason=prefill_5xx"
        for decode in deployment.decode:
            decode.script.die_before_head = True
        got = await deployment.ask(BODY)
        assert (got.status, got.json["error"]["reason"]) == (503, "decode_lost")


@pytest.mark.parametrize("body", [BODY, STREAM, ONE_TOKEN], ids=["whole", "stream", "one token"])
@async_test
async def test_a_request_that_a_prefill_worker_fails_at_is_not_tried_on_the_next_one(body):
    """The worker is well: it is the request, which would harm the next worker's other requests as well."""
    async with Deployment(prefill=2, decode=2) as deployment:
        deployment.prefill[0].script.status = 500
        got = await deployment.ask(body)
        assert (got.status, got.json["error"]["message"]) == (500, "as scripted")
        assert not deployment.prefill[1].requests
        assert not any(decode.requests for decode in deployment.decode)
        assert ("prefill", "prefill_5xx") in reasons(await deployment.record())


@pytest.mark.parametrize("body", [BODY, REDERIVED, BODY | {"prompt": ["a", "b"]}], ids=["whole", "re-derive", "local"])
@async_test
async def test_a_request_that_a_decode_worker_fails_at_is_not_tried_on_the_next_one(body):
    async with Deployment(decode=2) as deployment:
        deployment.decode[0].script.status = 500
        got = await deployment.ask(body)
        assert (got.status, got.json["error"]["message"]) == (500, "as scripted")
        assert not deployment.decode[1].requests
        assert ("decode", "decode_5xx") in reasons(await deployment.record())


@async_test
async def test_a_worker_that_answers_500_because_it_fails_is_replaced():
    """As a vLLM server whose engine has died."""
    async with Deployment(decode=2) as deployment:
        deployment.decode[0].script.status, deployment.decode[0].script.health_status = 500, 503
        got = await deployment.ask(BODY)
        assert got.path.endswith("; after=decode_5xx")
        assert await deployment.right(got, BODY)


@pytest.mark.parametrize("refusing", ["prefill", "decode"])
@async_test
async def test_a_refusal_is_not_tried_elsewhere_because_contexts_differ(refusing):
    """Only one for its length is, by a worker of a longer context."""
    deployment = Deployment(decode=2)
    for worker in (deployment.prefill[0], deployment.decode[0]):
        worker.more_health = {"max_model_len": 100}
    getattr(deployment, refusing)[0].script.status = 400
    async with deployment:
        got = await deployment.ask(REDERIVED)
        assert (got.status, got.json["error"]["message"]) == (400, "as scripted")
        assert not deployment.decode[1].requests
