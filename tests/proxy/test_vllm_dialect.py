"""What vLLM servers say in their own way: how busy they are, and what became of a request's KV."""

import asyncio
import json

import pytest

from kvbelt.proxy.workers.vllm_dialect import load_of, take_outcome
from kvbelt.wire.handoff import DecodeOutcome
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.load import NO_LOAD, Load
from kvbelt.wire.notification import OutcomeReport
from tests.metrics.scrape import value_in
from tests.proxy.support import Deployment, async_test, eventually, generated

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="toy, with } and {"} 3.0
vllm:num_requests_running{engine="1",model_name="toy"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="toy"} 12.0
vllm:num_requests_waiting{engine="1",model_name="toy"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="toy",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="toy"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="toy"} 0.25
"""


def test_engines_of_a_server_add_up() -> None:
    """Requests add up, and the share of KV memory is the mean."""
    assert load_of(METRICS.encode()) == Load(
        running=7, waiting=13, blocks_total=10_000, blocks_free=6250, blocks_cached=0
    )


@pytest.mark.parametrize(
    "text", [b"", b"<html>", b"vllm:num_requests_running{} 1.2.3\n", b"x_vllm:num_requests_running 3"]
)
def test_metrics_without_a_load_give_none(text: bytes) -> None:
    assert load_of(text) == NO_LOAD


@async_test
async def test_a_vllm_server_is_told_the_level_between_tokens() -> None:
    """With the question that it answers once."""
    deployment = Deployment(slo_itl_ms=40.0)
    deployment.decode[0].script.vllm_metrics = ""
    async with deployment:
        assert deployment.decode[0].described == [{"kvbelt": "describe", "itl_seconds": 0.04}]


@async_test
async def test_the_queue_of_vllm_servers_is_in_the_proxy_s_metrics() -> None:
    """The same alerts cover vLLM servers and embedded workers."""
    async with Deployment(health_interval_seconds=0.05) as deployment:
        for standin in (deployment.prefill[0], deployment.decode[0]):
            standin.script.vllm_metrics = METRICS

        async def scrape() -> str:
            return (await deployment.get("/metrics")).body.decode()

        views = [deployment.worker(standin) for standin in (deployment.prefill[0], deployment.decode[0])]
        await eventually(lambda: all(view.endpoint.report.load.waiting == 13 for view in views))
        text = await scrape()
        assert value_in(text, "lmcache_prefill_queue_size") == value_in(text, "kvbelt_decode_queue_size") == 13
        assert value_in(text, "kvbelt_proxy_worker_kv_free_ratio", role="decode") == 0.625
        assert all(view.ready for view in views)


CHAT = {"messages": [{"role": "user", "content": "a prompt of some length"}], "temperature": 0}


@pytest.mark.parametrize(
    ("defaults", "asked", "allowed"),
    [({"unless_asked": 5}, None, 4), ({"unless_asked": 5}, 7, 6), ({"unless_asked": 5, "most": 5}, 7, 4)],
    ids=["unless asked", "asked for more", "at most"],
)
@async_test
async def test_a_continuation_may_have_what_the_server_s_generation_config_leaves(
    defaults: dict, asked: int | None, allowed: int
) -> None:
    """The first token is one of them, which the decode server does not know."""
    async with of_vllm_with(defaults) as deployment:
        await deployment.ask(CHAT | {"max_tokens": asked} if asked else CHAT, chat=True)
        assert [body["max_tokens"] for body in generated(deployment.decode[0])] == [allowed]


@async_test
async def test_the_decode_server_gives_all_tokens_where_its_generation_config_penalizes() -> None:
    """Else the first token, which is in the prompt of its call, would not be penalized."""
    async with of_vllm_with({"penalties": True}) as deployment:
        assert (await deployment.ask(CHAT | {"max_tokens": 6}, chat=True)).path == "re-derive; reason=penalty"


def of_vllm_with(defaults: dict) -> Deployment:
    """1p1d whose decode server has these defaults of answers."""
    deployment = Deployment()
    deployment.decode[0].script.vllm_metrics = ""
    deployment.decode[0].more_health = {"defaults": defaults}
    return deployment


BODY = {"prompt": "a prompt of some length", "max_tokens": 6, "temperature": 0}
STREAM = BODY | {"stream": True}
LOST = "recomputed; reason=unknown_transfer"
LOCAL = "local; reason=unknown_transfer"


def of_vllm(kv: str | None = None, **settings) -> Deployment:
    """1p1d whose decode server tells of KV as vLLM does."""
    deployment = Deployment(**settings)
    deployment.decode[0].script.kv_in_answer, deployment.decode[0].script.kv = True, kv
    return deployment


def report(body: dict, kv: str = "recomputed") -> OutcomeReport:
    """A decode server's word on the KV that a decode call has asked for."""
    reason = "unknown_transfer" if kv == "recomputed" else None
    outcome = DecodeOutcome(TransferId(body["kv_transfer_params"]["transfer_id"]), kv, reason)
    return OutcomeReport(engine=EngineId("d0"), outcome=outcome)


async def shown(deployment: Deployment) -> tuple[str, str | None, str | None, float]:
    """Path, reason and KV of the record, and the requests that metrics count as local for this reason."""
    record = await deployment.record()
    text = (await deployment.get("/metrics")).body.decode()
    counted = value_in(text, "kvbelt_proxy_requests_total", path="local", reason="unknown_transfer")
    return record["decision"]["path"], record["decision"]["reason"], record["kv"], counted


@pytest.mark.parametrize("body", [BODY, BODY | {"seed": 3, "temperature": 0.5}], ids=["merged", "passed on"])
@async_test
async def test_a_whole_answer_says_that_kv_was_lost(body: dict) -> None:
    """So that the header says it, as with workers that say it in their own header."""
    async with of_vllm(LOST) as deployment:
        got = await deployment.ask(body)
        assert got.path == LOCAL
        assert got.json.get("kv_transfer_params") is None  # not the client's business
        assert await shown(deployment) == ("local", "unknown_transfer", LOST, 1)


@async_test
async def test_a_whole_answer_says_that_kv_was_received() -> None:
    async with of_vllm() as deployment:
        assert (await deployment.ask(BODY)).path == "first-token"
        assert (await deployment.record())["kv"] == "received"


@async_test
async def test_what_a_failed_worker_said_of_kv_is_not_said_of_the_next_one() -> None:
    """Each decode call has its own."""
    async with Deployment(decode=2) as deployment:
        go_on = asyncio.Event()
        for decode in deployment.decode:
            decode.script.kv, decode.script.before_head = LOST, go_on
        asking = asyncio.create_task(deployment.ask(STREAM))
        await eventually(lambda: any(decode.requests for decode in deployment.decode))
        next(decode for decode in deployment.decode if decode.requests).script.die_behind_head = True
        go_on.set()
        got = await asking
        assert b": x-kvbelt-path local; reason=decode_lost" in got.body
        assert (await deployment.record())["kv"] is None


@async_test
async def test_a_report_before_the_first_event_is_told_in_the_stream() -> None:
    """A stream's head has said ``first-token`` by then."""
    async with of_vllm() as deployment:
        decode = deployment.decode[0]
        decode.script.before_head = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(STREAM))
        await decode.arrived.wait()
        deployment.proxy.context.notified(report(decode.requests[0][2]))
        decode.script.before_head.set()
        got = await asking
        assert got.path == "first-token"
        assert b"\n\n: x-kvbelt-path local; reason=unknown_transfer\n\n" in got.body
        assert await shown(deployment) == ("local", "unknown_transfer", LOST, 1)


@pytest.mark.parametrize("kv", ["received", "recomputed"])
@async_test
async def test_a_report_during_the_stream_is_in_record_and_metrics(kv: str) -> None:
    async with of_vllm() as deployment:
        decode, go_on = deployment.decode[0], asyncio.Event()
        decode.script.stop_after_tokens = (2, go_on)
        asking = asyncio.create_task(deployment.ask(STREAM))
        await eventually(lambda: any(one.decode_first for one in deployment.proxy.context.records.open.values()))
        deployment.proxy.context.notified(report(decode.requests[0][2], kv))
        go_on.set()
        assert (await asking).path == "first-token"
        if kv == "received":
            assert await shown(deployment) == ("first-token", None, "received", 0)
        else:
            assert await shown(deployment) == ("local", "unknown_transfer", LOST, 1)


@async_test
async def test_a_report_after_the_stream_is_in_the_record() -> None:
    """It names the transfer, of a request that has ended."""
    async with of_vllm() as deployment:
        await deployment.ask(STREAM)
        assert (await deployment.record())["kv"] is None
        deployment.proxy.context.notified(report(deployment.decode[0].requests[0][2]))
        assert (await deployment.record())["kv"] == LOST


def test_another_transfer_s_outcome_is_nobody_s() -> None:
    """Nor is one that a text of the answer quotes."""
    said = {"transfer_id": "t", "kv": "received"}
    answer = json.dumps({"choices": [{"text": json.dumps({"kv_transfer_params": said})}], "usage": {}})
    assert take_outcome(answer.encode(), "t") == (None, answer.encode())
    answer = json.dumps({"choices": [], "kv_transfer_params": said, "metrics": None}).encode()
    assert take_outcome(answer, "another") == (None, answer)
    outcome, plain = take_outcome(answer, "t")
    assert outcome == DecodeOutcome(TransferId("t"), "received")
    assert json.loads(plain) == {"choices": [], "kv_transfer_params": None, "metrics": None}
