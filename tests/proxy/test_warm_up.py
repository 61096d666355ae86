"""Pairs are connected before the first request, and no worker waits long for its connections."""

import asyncio

from kvbelt.proxy.workers import warm_up as warming
from tests.proxy.support import Deployment, async_test, eventually, generated

BODY = {"prompt": "hello", "max_tokens": 6, "temperature": 0}
FAST_HEALTH = {"health_interval_seconds": 0.02, "health_timeout_seconds": 0.2}
REFUSAL = {"state": "failed", "reason": "refused_dtype", "detail": "dtype is float32 here and bfloat16 there"}


async def pairs(deployment):
    """The proxy's pairs: (prefill, decode) ports to (state, reason, detail)."""
    said = (await deployment.get("/kvbelt/workers")).json["pairs"]
    ports = [tuple(int(pair[role].rpartition(":")[2]) for role in ("prefill", "decode")) for pair in said]
    return {key: (pair["state"], pair["reason"], pair["detail"]) for key, pair in zip(ports, said, strict=True)}


@async_test
async def test_every_pair_is_connected_before_the_first_request(monkeypatch):
    """Each prefill worker connects to each decode worker."""
    monkeypatch.setattr(warming, "GRACE_SECONDS", 1000.0)  # no pause of this machine makes a pair slow
    async with Deployment(prefill=2, decode=2) as deployment:
        for prefill in deployment.prefill:
            assert set(prefill.told) == {"d0", "d1"}
            assert not prefill.requests
        assert {state for state, _, _ in (await pairs(deployment)).values()} == {"warm"}
        assert len(await pairs(deployment)) == 4


@async_test
async def test_a_decode_worker_that_comes_back_is_connected_again():
    """Every prefill worker gets the new incarnation's address."""
    async with Deployment(prefill=2, **FAST_HEALTH) as deployment:
        decode = deployment.decode[0]
        port = decode.port
        await decode.stop()
        decode.engine_id = "d0-again"
        await decode.start(port)
        await eventually(lambda: all("d0-again" in prefill.told for prefill in deployment.prefill))
        await eventually(lambda: not deployment.worker(decode).endpoint.warming)
        assert deployment.worker(decode).ready
        assert len(await pairs(deployment)) == 2  # the earlier life is forgotten


@async_test
async def test_a_prefill_worker_that_comes_back_is_connected_again():
    """A new incarnation has no connections."""
    async with Deployment(decode=2, **FAST_HEALTH) as deployment:
        prefill = deployment.prefill[0]
        port = prefill.port
        await prefill.stop()
        prefill.engine_id, prefill.told = "p0-again", []
        await prefill.start(port)
        await eventually(lambda: set(prefill.told) == {"d0", "d1"})


async def with_a_stuck_handshake(deployment):
    """Restart the first prefill worker, whose handshake does not end now."""
    stuck = deployment.prefill[0]
    port = stuck.port
    await stuck.stop()
    stuck.engine_id, stuck.script.peers_hang = "p0-again", asyncio.Event()
    await stuck.start(port)
    await eventually(lambda: deployment.worker(stuck).engine_id == "p0-again")
    return stuck


@async_test
async def test_a_worker_that_is_not_connected_yet_is_passed_over(monkeypatch):
    monkeypatch.setattr(warming, "ANSWER_SECONDS", 1000.0)
    async with Deployment(prefill=2, warm_seconds=1000.0, **FAST_HEALTH) as deployment:
        stuck = await with_a_stuck_handshake(deployment)
        for _ in range(2):
            assert (await deployment.ask(BODY)).path == "first-token"
        assert not stuck.requests
        assert deployment.worker(stuck).endpoint.warming


@async_test
async def test_a_worker_is_passed_over_for_a_while_only():
    """After ``warm_seconds`` it gets requests, although its handshake has not ended."""
    async with Deployment(prefill=2, warm_seconds=0.05, **FAST_HEALTH) as deployment:
        stuck = await with_a_stuck_handshake(deployment)
        await eventually(lambda: not deployment.worker(stuck).endpoint.warming)
        for _ in range(2):
            assert (await deployment.ask(BODY)).path == "first-token"
        assert len(stuck.requests) == 1


@async_test
async def test_one_slow_pair_keeps_no_worker_from_serving():
    """A decode worker takes requests soon after its first pair is warm."""
    async with Deployment(prefill=2, decode=2, warm_seconds=30.0, **FAST_HEALTH) as deployment:
        decode = deployment.decode[0]
        deployment.prefill[0].script.peers_hang = asyncio.Event()
        port = decode.port
        await decode.stop()
        decode.engine_id = "d0-again"
        await decode.start(port)
        await eventually(lambda: "d0-again" in deployment.prefill[1].told)
        await eventually(lambda: deployment.worker(decode).ready)
        assert not deployment.prefill[0].script.peers_hang.is_set()


@async_test
async def test_the_only_worker_is_used_before_it_is_connected():
    """The first request then makes the connection."""
    async with Deployment(warm_seconds=30.0, **FAST_HEALTH) as deployment:
        decode, prefill = deployment.decode[0], deployment.prefill[0]
        prefill.script.peers_hang = asyncio.Event()
        port = decode.port
        await decode.stop()
        decode.engine_id = "d0-again"
        await decode.start(port)
        await eventually(lambda: deployment.worker(decode).endpoint.warming)
        assert (await deployment.get("/health")).status == 503  # a client that waits for a warm deployment waits on
        assert (await deployment.ask(BODY)).path == "first-token"


@async_test
async def test_a_refusal_is_shown_with_both_values_and_logged_once(caplog):
    """No prompt is computed for the refused pair."""
    async with Deployment(prefill=2) as deployment:
        misfit, other = deployment.prefill
        worker = deployment.worker(misfit)
        misfit.script.peers_refusal = REFUSAL
        for _ in range(3):
            await deployment.proxy.context.warmer._warm(worker, [deployment.worker(deployment.decode[0])])
        key = (misfit.port, deployment.decode[0].port)
        assert (await pairs(deployment))[key] == ("refused", "refused_dtype", REFUSAL["detail"])
        assert caplog.text.count(REFUSAL["detail"]) == 1
        for _ in range(3):
            assert (await deployment.ask(BODY)).path == "first-token"
        assert not misfit.requests
        assert len(other.requests) == 3


@async_test
async def test_a_vllm_server_gets_its_receivers_in_a_request():
    """It has no route for peers, so its connector reads them from a request."""
    async with Deployment(**FAST_HEALTH) as deployment:
        prefill = deployment.prefill[0]
        port = prefill.port
        await prefill.stop()
        prefill.engine_id, prefill.told = "p0-again", []
        prefill.script.peers_status, prefill.script.peers_by_request = 404, True
        prefill.more_health = {"engine": "vllm"}
        await prefill.start(port)
        await eventually(lambda: deployment.proxy.context.fleet.pairs.get("p0-again", "d0"))
        assert prefill.told == ["d0"]
        assert not prefill.missed  # vLLM would log each of them
        assert [state for state, _, _ in (await pairs(deployment)).values()] == ["warm"]
        assert not prefill.requests


@async_test
async def test_a_handshake_that_goes_on_is_asked_about_again(monkeypatch):
    """The pair is neither failed nor warm until then."""
    monkeypatch.setattr(warming, "RETRY_SECONDS", 0.02)
    async with Deployment(**FAST_HEALTH) as deployment:
        prefill = deployment.prefill[0]
        port = prefill.port
        await prefill.stop()
        prefill.engine_id, prefill.told = "p0-again", []
        prefill.script.peers_refusal = {"state": "failed", "reason": "not_yet", "detail": ""}
        await prefill.start(port)
        await eventually(lambda: len(prefill.told) > 2)
        assert not await pairs(deployment)
        prefill.script.peers_refusal = None
        await eventually(lambda: deployment.proxy.context.fleet.pairs.get("p0-again", "d0"))


@async_test
async def test_a_server_without_the_route_and_without_a_connector_is_fine():
    """The pair is unwarmed and connects on first use."""
    async with Deployment(**FAST_HEALTH) as deployment:
        prefill = deployment.prefill[0]
        port = prefill.port
        await prefill.stop()
        prefill.engine_id, prefill.script.peers_status = "p0-again", 404
        await prefill.start(port)
        await eventually(lambda: deployment.proxy.context.fleet.pairs.get("p0-again", "d0"))
        ((state, reason, _),) = (await pairs(deployment)).values()
        assert (state, reason) == ("unwarmed", None)
        assert (await deployment.ask(BODY)).path == "first-token"


@async_test
async def test_a_pair_that_failed_is_tried_again(monkeypatch):
    monkeypatch.setattr(warming, "RETRY_SECONDS", 0.02)
    async with Deployment(**FAST_HEALTH) as deployment:
        prefill, decode = deployment.prefill[0], deployment.decode[0]
        port = decode.port
        prefill.script.peers_refusal = {"state": "failed", "reason": "peer_unreachable", "detail": "no answer"}
        await decode.stop()
        decode.engine_id = "d0-again"
        await decode.start(port)
        known = deployment.proxy.context.fleet.pairs
        await eventually(lambda: (pair := known.get("p0", "d0-again")) and pair.state == "failed")
        prefill.script.peers_refusal = None
        await eventually(lambda: known.get("p0", "d0-again").state == "warm")


@async_test
async def test_a_warm_pair_is_kept_in_use():
    """The proxy warms it again, so that the prefill worker does not close it as idle."""
    async with Deployment(rewarm_seconds=0.02) as deployment:
        await eventually(lambda: deployment.prefill[0].told.count("d0") > 3)


@async_test
async def test_a_worker_that_answers_nonsense_is_a_failure_that_is_shown():
    """The pair shows what was wrong, and requests are answered."""
    async with Deployment() as deployment:
        prefill = deployment.prefill[0]
        prefill.script.peers_refusal = {"state": "perhaps"}
        worker, decode = deployment.worker(prefill), deployment.worker(deployment.decode[0])
        await deployment.proxy.context.warmer._warm(worker, [decode])
        ((state, reason, detail),) = (await pairs(deployment)).values()
        assert (state, reason) == ("failed", "prefill_bad_answer")
        assert "perhaps" in detail
        assert (await deployment.ask(BODY)).path == "first-token"
        assert generated(prefill)
