"""Requests wait at the proxy for their place, within bounds, and give it back."""

import asyncio
from dataclasses import replace
from time import monotonic

import msgspec
import pytest

from kvbelt.routing.booking import Demand
from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.placement import Mode
from tests.proxy.standin import MAX_MODEL_LEN
from tests.proxy.support import Deployment, async_test, eventually, generated
from tests.wire.messages import STEPS

#: Long enough for the next one to wait until it is computed.
LONG = {"prompt": [5] * 4000, "max_tokens": 12, "temperature": 0, "stream": True}
SHORT = {"prompt": "hello", "max_tokens": 12, "temperature": 0}


def placement(deployment):
    return deployment.proxy.context.dispatcher.placement


#: A prompt takes an hour, so no pause of this machine makes the proxy expect its end.
SLOW = msgspec.structs.replace(STEPS, costs=replace(STEPS.costs, token=1.0, samples=100))


class Busy(Deployment):
    """One worker, which is busy with a prompt until ``hold`` is set."""

    def __init__(self, **settings):
        super().__init__(prefill=0, decode=1, placement=Mode.ELASTIC, **settings)
        self.decode[0].more_health = {"steps": msgspec.to_builtins(SLOW)}
        self.hold = self.decode[0].script.before_head = asyncio.Event()

    async def __aenter__(self):
        await super().__aenter__()
        self.first = asyncio.create_task(self.ask(LONG, request_id="first"))
        await self.decode[0].arrived.wait()
        return self

    async def __aexit__(self, *exc):
        self.hold.set()
        await self.first
        await super().__aexit__(*exc)


@async_test
async def test_a_request_waits_until_a_worker_is_free():
    async with Busy() as deployment:
        second = asyncio.create_task(deployment.ask(LONG))
        await eventually(lambda: placement(deployment).waiting == 1)
        assert len(generated(deployment.decode[0])) == 1
        deployment.hold.set()
        assert await deployment.right(await second, LONG)


@async_test
async def test_a_full_queue_refuses_the_next_request():
    async with Busy(max_waiting=1) as deployment:
        second = asyncio.create_task(deployment.ask(LONG))
        await eventually(lambda: placement(deployment).waiting == 1)
        got = await deployment.ask(LONG, request_id="r3")
        assert (got.status, got.json["error"]["reason"]) == (429, "queue_full")
        assert int(got.headers[b"retry-after"]) >= 1
        assert placement(deployment).waiting == 1
        deployment.hold.set()
        assert (await second).status == 200


@async_test
async def test_a_request_waits_for_a_bounded_time():
    async with Busy(max_wait_seconds=0.05) as deployment:
        got = await deployment.ask(LONG)
        assert (got.status, got.json["error"]["reason"]) == (429, "overloaded")
        assert int(got.headers[b"retry-after"]) >= 1
        assert placement(deployment).waiting == 0


@async_test
async def test_the_deadline_ends_a_wait():
    async with Busy() as deployment:
        got = await deployment.ask(LONG, headers=((b"x-kvbelt-deadline-seconds", b"0.05"),))
        assert (got.status, got.json["error"]["reason"]) == (504, "deadline")
        assert placement(deployment).waiting == 0


@async_test
async def test_a_client_that_leaves_does_not_wait_any_more():
    async with Busy() as deployment:
        second = asyncio.create_task(deployment.ask(LONG))
        await eventually(lambda: placement(deployment).waiting == 1)
        second.cancel()
        await eventually(lambda: placement(deployment).waiting == 0)
        deployment.hold.set()
        await deployment.first
        assert len(generated(deployment.decode[0])) == 1


@async_test
async def test_those_that_wait_for_a_worker_that_is_lost_are_told():
    async with Busy() as deployment:
        second = asyncio.create_task(deployment.ask(LONG))
        await eventually(lambda: placement(deployment).waiting == 1)
        await deployment.decode[0].stop()
        got = await second
        assert (got.status, got.json["error"]["reason"]) == (503, "no_decode_worker")


@pytest.mark.parametrize("leaves_first", [False, True])
@async_test
async def test_a_client_that_leaves_in_the_moment_of_its_placement_gives_the_place_back(leaves_first):
    async with Busy() as deployment:
        dispatcher = deployment.proxy.context.dispatcher
        (booking,) = placement(deployment)._running
        demand = Demand(tokens=3000, output=12, arrived=monotonic(), levels=ServiceLevels())
        placing = asyncio.create_task(dispatcher.place(demand))
        await eventually(lambda: placement(deployment).waiting == 1)
        steps = [placing.cancel, lambda: dispatcher.first_token(booking)]
        for step in steps if leaves_first else reversed(steps):
            step()
        assert placement(deployment).waiting == 0
        await asyncio.wait([placing])
        assert placing.cancelled()
        assert placement(deployment).running == 1


@async_test
async def test_elastic_answers_whole_where_nothing_else_is_generating():
    """A prefill worker may be the one."""
    async with Deployment(placement=Mode.ELASTIC) as deployment:
        for stream in (False, True):
            got = await deployment.ask(SHORT | {"stream": stream})
            assert got.path == "local; reason=calm"
            assert await deployment.right(got, SHORT)
        assert not any("kv_transfer_params" in body for body in generated(deployment.prefill[0]))


@async_test
async def test_a_prefill_worker_answers_where_no_decode_worker_is_left():
    async with Deployment(placement=Mode.ELASTIC) as deployment:
        await deployment.decode[0].stop()
        await deployment.worker(deployment.decode[0]).check()
        got = await deployment.ask(SHORT)
        assert await deployment.right(got, SHORT)
        assert got.path == "local; reason=no_decode_worker"


@async_test
async def test_nothing_is_split_with_placement_whole():
    async with Deployment(placement=Mode.WHOLE) as deployment:
        got = await deployment.ask(SHORT)
        assert got.path == "local; reason=placement_whole"
        assert await deployment.right(got, SHORT)


@pytest.mark.parametrize("mode", Mode)
@async_test
async def test_a_restarted_worker_has_nothing_booked(mode):
    async with Deployment(placement=mode, prefill=0) as deployment:
        decode = deployment.decode[0]
        decode.script.before_head = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(SHORT))
        await decode.arrived.wait()
        decode.engine_id = "d0-again"
        await deployment.worker(decode).check()
        decode.script.before_head.set()
        assert await deployment.right(await asking, SHORT)
        (book,) = deployment.proxy.context.dispatcher._workers
        assert book.incarnation.endswith(" d0-again")


@pytest.mark.parametrize("longer", [False, True])
@async_test
async def test_what_is_too_long_for_one_worker_is_answered_by_one_with_a_larger_context(longer):
    deployment = Deployment(placement=Mode.ELASTIC)
    refusing = deployment.decode[0]
    refusing.script.status, refusing.more_health = 400, {"max_model_len": 100 if longer else MAX_MODEL_LEN}
    refusing.script.body = b'{"error": {"message": "as scripted", "code": "context_length_exceeded"}}'
    async with deployment:
        got = await deployment.ask(SHORT)
        assert len(generated(refusing)) == 1
        if longer:
            assert got.path == "local; reason=no_decode_worker; after=too_long"
            assert await deployment.right(got, SHORT)
        else:
            assert (got.status, got.json["error"]["message"]) == (400, "as scripted")


async def count_of(deployment, line):
    return line in (await deployment.get("/metrics")).body.decode()


@pytest.mark.parametrize(("mode", "action"), [(Mode.SPLIT, "split"), (Mode.WHOLE, "whole")])
@async_test
async def test_a_placement_can_be_read(mode, action):
    """In a header, the record and the metrics."""
    async with Deployment(placement=mode) as deployment:
        got = await deployment.ask(SHORT | {"stream": True})
        told, _, predicted = got.headers[b"x-kvbelt-placement"].decode().partition("; predicted-ttft-ms=")
        assert (told, int(predicted) >= 0) == (action, True)
        placing = (await deployment.record())["placing"]
        assert (placing["action"], placing["waited_ms"]) == (action, 0.0)
        assert placing["predicted_first_token_ms"] > 0
        await eventually(lambda: not deployment.proxy.context.records.open)
        reason = "" if mode is Mode.SPLIT else "placement_whole"
        assert await count_of(deployment, f'kvbelt_placements_total{{action="{action}",reason="{reason}"}} 1.0')
        for name in ("kvbelt_queue_wait_seconds", "kvbelt_ttft_prediction_error_seconds"):
            assert await count_of(deployment, f'{name}_bucket{{le="+Inf"}} 1.0')


@async_test
async def test_a_wait_can_be_read():
    async with Busy() as deployment:
        second = asyncio.create_task(deployment.ask(LONG))
        await eventually(lambda: placement(deployment).waiting == 1)
        assert await count_of(deployment, "kvbelt_proxy_requests_waiting 1.0")
        deployment.hold.set()
        assert b"; waited-ms=" in (await second).headers[b"x-kvbelt-placement"]
        record = await deployment.record()
        assert record["placing"]["waited_ms"] > 0
        proxy, waited, *_ = record["spans"]
        assert (proxy["name"], waited["name"]) == ("proxy", "wait for a worker")
        assert proxy["duration_ms"] == pytest.approx(waited["start_ms"])
