"""What fails is tried elsewhere: another prefill worker, another decode worker, and then the decode worker alone."""

import asyncio

import pytest

from kvbelt.proxy.tries import Tries
from kvbelt.wire.notification import TransferFailed, encode
from tests.proxy.support import Deployment, async_test, eventually, generated, in_time

BODY = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
STREAM = BODY | {"stream": True}
REDERIVED = BODY | {"stream": True, "seed": 3, "temperature": 1.0}
ONE_TOKEN = BODY | {"max_tokens": 1}
FAST_HEALTH = {"health_interval_seconds": 0.02, "health_timeout_seconds": 0.2}


def failing(reason):
    """A prefill worker's word of a transfer."""
    return {"transfer_id": "t", "state": "failed", "reason": reason}


def reasons(record):
    """Why each attempt of a request failed; None: it did not."""
    return [(attempt["leg"], attempt["reason"]) for attempt in record["attempts"]]


# The prefill worker fails: another one reads the prompt.


async def break_prefill(deployment, how):
    """The first of the prefill workers fails from now on."""
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
def test_another_prefill_worker_takes_over(how, body):
    """With the KV sent from it, under a new name; the header says what had failed before."""

    @async_test
    async def replaced():
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

    replaced()


@async_test
async def test_a_prefill_worker_and_the_decode_worker_may_be_lost_together():
    """There is nobody to send KV to when the next prefill worker's turn comes: another decode worker does it alone."""
    async with Deployment(prefill=2, decode=2, **FAST_HEALTH) as deployment:
        (broken, _), (lost, _) = deployment.prefill, deployment.decode
        broken.script.before_head, broken.script.status = asyncio.Event(), 503
        asking = asyncio.create_task(deployment.ask(BODY))
        await broken.arrived.wait()
        lost.script.health_hangs = True
        await eventually(lambda: not deployment.worker(lost).ready)
        broken.script.before_head.set()
        got = await asking
        assert got.path.startswith("local")
        assert await deployment.right(got, BODY)


@pytest.mark.parametrize("how", ["unreachable", "lost", "5xx"])
def test_another_prefill_worker_gives_the_only_token(how):
    """Where one token is all that is asked for."""

    @async_test
    async def replaced():
        async with Deployment(prefill=2) as deployment:
            await break_prefill(deployment, how)
            got = await deployment.ask(ONE_TOKEN)
            assert got.path == f"prefill-only; after=prefill_{how}"
            assert await deployment.right(got, ONE_TOKEN)
            assert not deployment.decode[0].requests

    replaced()


@async_test
async def test_a_prefill_worker_that_is_stopped_is_replaced_when_its_health_is_silent():
    """Its connection stays open; another one is asked, and later requests do not meet it."""
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
    """Each is asked once."""
    async with Deployment(prefill=2) as deployment:
        for prefill in deployment.prefill:
            prefill.script.status = 500
        got = await deployment.ask(BODY)
        assert got.path == "local; reason=prefill_5xx; after=prefill_5xx"
        assert await deployment.right(got, BODY)
        assert [len(prefill.requests) for prefill in deployment.prefill] == [1, 1]


@async_test
async def test_the_number_of_legs_is_bounded():
    """A request that breaks whoever takes it does not break them all."""
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
def test_a_transfer_that_failed_early_is_tried_from_another_prefill_worker(body):
    """Its prompt is read again, and its KV is sent from there."""

    @async_test
    async def replaced():
        async with Deployment(prefill=2) as deployment:
            deployment.prefill[0].script.transfer_state = failing("write_failed")
            got = await deployment.ask(body)
            assert got.path.endswith("; after=transfer_write_failed")
            assert not got.path.startswith("local")
            assert await deployment.right(got, body)
            assert reasons(await deployment.record())[0] == ("prefill", "transfer_write_failed")

    replaced()


@pytest.mark.parametrize("reason", ["too_large", "receiver_full", "peer_lost", "stale_engine"])
def test_a_transfer_that_another_prefill_worker_could_not_do_either_is_not_tried_again(reason):
    """What is wrong with the decode worker stays wrong: it computes the prompt itself."""

    @async_test
    async def local():
        async with Deployment(prefill=2) as deployment:
            deployment.prefill[0].script.transfer_state = failing(reason)
            got = await deployment.ask(BODY)
            assert got.path == f"local; reason=transfer_{reason}"
            assert await deployment.right(got, BODY)
            assert not deployment.prefill[1].requests

    local()


@async_test
async def test_an_answer_without_its_kv_is_kept_while_others_are_tried():
    """The first token is right, whatever became of the KV: it is used when nobody else can be."""
    async with Deployment(prefill=2) as deployment:
        first, second = deployment.prefill
        first.script.transfer_state = failing("write_failed")
        second.script.status = 500
        got = await deployment.ask(STREAM)
        assert got.path == "local; reason=transfer_write_failed; after=transfer_write_failed"
        assert await deployment.right(got, STREAM)
        (continued,) = generated(deployment.decode[0])
        assert isinstance(continued["prompt"][0], int)  # after the first token, which the decode worker did not make
        assert "kv_transfer_params" not in continued


@async_test
async def test_an_early_word_of_the_prefill_worker_counts_as_its_answers():
    """It may notify before it answers."""
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
def test_a_pair_that_was_refused_is_not_tried_again(reason):
    """Neither by the request that found out nor by later ones; a new life of either is judged anew."""

    @async_test
    async def avoided():
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

    avoided()


@async_test
async def test_a_decode_worker_that_refuses_everybody_computes_its_prompts():
    """And nobody reads them in vain."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.transfer_state = failing("refused_dtype")
        assert (await deployment.ask(BODY)).path == "local; reason=transfer_refused_dtype"
        assert (await deployment.ask(BODY)).path == "local; reason=pairs_refused"
        assert len(deployment.prefill[0].requests) == 1


@async_test
async def test_what_a_worker_says_becomes_a_header_only_if_it_is_a_word():
    """A line break in it would begin a header of its own."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.transfer_state = failing("a\r\nb: c")
        assert (await deployment.ask(BODY)).path == "local; reason=transfer_failed"


# The decode worker fails.


@pytest.mark.parametrize(
    ("how", "reason"), [("unreachable", "decode_unreachable"), ("lost", "decode_lost"), ("5xx", "decode_5xx")]
)
@pytest.mark.parametrize("body", [BODY, REDERIVED, BODY | {"prompt": ["a", "b"]}], ids=["whole", "re-derive", "local"])
def test_another_decode_worker_takes_over(how, reason, body):
    """As long as nothing was said, from the beginning."""

    @async_test
    async def replaced():
        async with Deployment(decode=2) as deployment:
            broken = deployment.decode[0]
            if how == "unreachable":
                await broken.stop()
            elif how == "lost":
                broken.script.die_before_head = True
            else:
                broken.script.status = 500
            got = await deployment.ask(body)
            assert got.path.endswith(f"; after={reason}")
            assert await deployment.right(got, body)
            assert ("decode", reason) in reasons(await deployment.record())

    replaced()


@pytest.mark.parametrize("body", [STREAM, REDERIVED], ids=["stream", "re-derive"])
def test_a_decode_worker_lost_behind_its_head_is_replaced_while_nothing_of_it_was_said(body):
    """Some send the head before they begin to work."""

    @async_test
    async def replaced():
        async with Deployment(decode=2) as deployment:
            deployment.decode[0].script.die_behind_head = True
            got = await deployment.ask(body)
            assert await deployment.right(got, body)
            assert "after=decode_lost" in got.path or b"after=decode_lost" in got.body

    replaced()


@async_test
async def test_a_whole_answer_cut_in_its_body_is_made_again():
    """Nothing of it has reached the client."""
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
async def test_the_last_decode_workers_own_words_reach_the_client():
    """A refusal is better than "nobody is left"."""
    async with Deployment(decode=2) as deployment:
        for decode in deployment.decode:
            decode.script.status = 500
        got = await deployment.ask(BODY)
        assert (got.status, got.json["error"]["message"]) == (500, "as scripted")
        assert [len(decode.requests) for decode in deployment.decode] == [1, 1]


@async_test
async def test_a_decode_worker_that_was_started_again_gets_the_prompt_anew():
    """The KV went to its earlier life; the same address is asked, as another worker."""
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
async def test_nobody_left_says_so_with_a_reason():
    """503, when to ask again, and in one word why."""
    async with Deployment(decode=2) as deployment:
        for decode in deployment.decode:
            await decode.stop()
        got = await deployment.ask(BODY)
        assert (got.status, got.headers[b"retry-after"]) == (503, b"1")
        assert got.json["error"]["reason"] == "no_decode_worker"
        assert b'kvbelt_proxy_errors_total{reason="no_decode_worker"} 1.0' in (await deployment.get("/metrics")).body


# A worker that is slow disturbs nobody else.


@async_test
async def test_a_worker_that_is_late_to_say_how_it_is_gets_nothing_while_there_is_another():
    """Long before it counts as lost."""
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
    """It is not lost."""
    settings = {"health_interval_seconds": 0.02, "health_timeout_seconds": 20.0, "late_seconds": 0.05}
    async with Deployment(**settings) as deployment:
        deployment.decode[0].script.health_hangs = True
        await eventually(lambda: deployment.worker(deployment.decode[0]).endpoint.late)
        assert (await deployment.ask(STREAM)).path == "first-token"


# The deadline.


@async_test
async def test_a_client_may_set_its_own_deadline():
    """Its header travels on as the time that the KV has."""

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
def test_a_deadline_that_is_none_is_refused(said):
    """400, with what was sent."""

    @async_test
    async def refused():
        async with Deployment() as deployment:
            got = await deployment.ask(BODY, headers=((b"x-kvbelt-deadline-seconds", said),))
            assert (got.status, got.json["error"]["param"]) == (400, "x-kvbelt-deadline-seconds")
            assert not deployment.prefill[0].requests

    refused()


@async_test
async def test_a_clients_deadline_does_not_exceed_the_proxys():
    """The setting is the limit."""
    async with Deployment(deadline_seconds=0.2) as deployment:
        deployment.decode[0].script.before_head = asyncio.Event()
        got = await deployment.ask(BODY, headers=((b"x-kvbelt-deadline-seconds", b"100"),))
        assert got.status == 504


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "stream"])
def test_a_deadline_missed_for_want_of_room_is_503(body):
    """The decode worker was full the whole time, and the prefill worker has said so: asking again may help."""

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

    @async_test
    async def told():
        await in_time(attempt)

    told()


@async_test
async def test_the_prefill_worker_hears_of_a_full_buffer_before_the_decode_worker_gives_up():
    """Its time for the transfer is the shorter one, so that it is the one to say why; both leave some for an answer."""
    async with Deployment(deadline_seconds=100.0, kv_wait_seconds=200.0) as deployment:
        await deployment.ask(BODY)
        sends = generated(deployment.prefill[0])[0]["kv_transfer_params"]["deadline_seconds"]
        waits = generated(deployment.decode[0])[0]["kv_transfer_params"]["deadline_seconds"]
        assert sends < waits < 99.5


def test_tries_are_counted_by_kind():
    """Decode legs do not use up prefill legs, and who failed is remembered by kind."""
    tries = Tries(2)
    tries.made("prefill")
    tries.made("prefill")
    tries.failed("prefill", "a")
    assert not tries.may_go_on("prefill")
    assert tries.may_go_on("decode")
    assert tries.excluded("prefill") == {"a"}
    assert not tries.excluded("decode")


@async_test
async def test_without_further_attempts_nothing_is_tried_elsewhere():
    """The mechanism taken out: the same failures end locally, or in an error."""
    async with Deployment(prefill=2, decode=2, max_attempts=1) as deployment:
        deployment.prefill[0].script.status = 500
        assert (await deployment.ask(BODY)).path == "local; reason=prefill_5xx"
        for decode in deployment.decode:
            decode.script.die_before_head = True
        got = await deployment.ask(BODY)
        assert (got.status, got.json["error"]["reason"]) == (503, "decode_lost")
