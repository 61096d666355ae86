"""Evidence of a deployment whose workers answer like vLLM servers, behind a real proxy."""

import asyncio

import msgspec

from kvbelt.http import Exchange
from kvbelt.ops.doctor.evidence import Evidence, PairSeen
from kvbelt.ops.doctor.gather import GatherOptions, gather_evidence
from kvbelt.ops.http_client import Address, Client
from kvbelt.wire.about import About, LinkTotals, TransportChoice
from tests.ops.doctor.deployments import about
from tests.proxy.standin import Standin
from tests.proxy.support import Deployment, async_test, eventually

METRICS = """
vllm:num_requests_waiting{engine="0"} 3.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
kvbelt_receive_buffer_bytes{engine="0"} 1000.0
"""


def says(standin: Standin, said: About) -> None:
    """Let a stand-in answer like a vLLM server."""
    standin.script.vllm_metrics = METRICS
    standin.more_health = {"engine": "vllm", "about": msgspec.to_builtins(said)}


async def looked(deployment: Deployment, later: About) -> Evidence:
    """Gather evidence; after the first question the prefill server answers ``later``."""
    prefill = deployment.prefill[0]
    asked = len(prefill.questions)
    looking = asyncio.create_task(
        gather_evidence("it", Address("127.0.0.1", deployment.proxy.port), GatherOptions(seconds=0.3, probe=False))
    )
    await eventually(lambda: len(prefill.questions) > asked)
    says(prefill, later)
    return await looking


def pair_of(evidence: Evidence) -> PairSeen:
    """The only pair."""
    (pair,) = evidence.pairs
    return pair


@async_test
async def test_a_vllm_server_is_seen_as_a_worker_of_our_own_is() -> None:
    """The evidence has its description, the bytes moved meanwhile, load and clock."""
    deployment = Deployment()
    first = about("prefill", engine="vllm", transports=[], links=[LinkTotals("d0", 2, 1000, 1.0)], unix_time=5.0)
    says(deployment.prefill[0], first)
    says(deployment.decode[0], about("decode", engine="vllm"))
    async with deployment:
        road = TransportChoice("intra-node", "write", "host", "cma/memory")
        later = about("prefill", engine="vllm", transports=[road], links=[LinkTotals("d0", 5, 4000, 3.0)])
        evidence = await looked(deployment, later)
        sender, receiver = evidence.workers
        assert sender.about == later
        assert receiver.about == about("decode", engine="vllm")
        assert sender.skew_seconds is not None
        assert sender.skew_seconds < -1e9
        assert (pair_of(evidence).link, pair_of(evidence).recent) == (LinkTotals("d0", 3, 3000, 2.0), True)
        assert {sample.waiting for sample in receiver.samples} == {3}
        assert {sample.receive_bytes for sample in receiver.samples} == {1000}


@async_test
async def test_of_several_ranks_the_slowest_link_counts() -> None:
    """Each tensor-parallel rank sends to its own receiver."""
    deployment = Deployment()
    prefill, decode = deployment.prefill[0], deployment.decode[0]
    links = [LinkTotals("d0", 1, 1000, 0.1), LinkTotals("d0-rank1", 1, 1000, 0.5)]
    for standin in (prefill, decode):
        says(standin, about(standin.role, engine="vllm", links=links))
    async with deployment:
        ranks = [{"engine_id": "d0-rank1", "init_port": 1, "alloc_port": 2}]
        decode.more_health |= {"receiver": decode.health()["receiver"] | {"ranks": ranks}}
        evidence = await looked(deployment, about("prefill", engine="vllm", links=links))
        assert (pair_of(evidence).link, pair_of(evidence).recent) == (links[1], False)


@async_test
async def test_a_worker_that_the_proxy_sees_again_was_only_late() -> None:
    """The proxy's later view counts for a worker that it had lost."""
    deployment = Deployment(health_interval_seconds=0.02, health_timeout_seconds=0.5)
    prefill, decode = deployment.prefill[0], deployment.decode[0]
    decode.script.health_status = 503
    answer_as_ever = prefill.handle

    async def state_at_proxy() -> str:
        with Client(Address("127.0.0.1", deployment.proxy.port)) as proxy:
            rows = (await proxy.get("/health")).json["workers"]
        return next(row["state"] for row in rows if row["role"] == "decode")

    async def recover_first(exchange: Exchange) -> None:
        if exchange.request.path == "/kvbelt/about":
            decode.script.health_status = 200
            while await state_at_proxy() != "ready":
                pass
        await answer_as_ever(exchange)

    prefill.handle = recover_first
    async with deployment:
        assert await state_at_proxy() == "unready"
        address = Address("127.0.0.1", deployment.proxy.port)
        evidence = await gather_evidence("it", address, GatherOptions(seconds=0.1, probe=False))
        assert [worker.state for worker in evidence.workers] == ["ready", "ready"]


@async_test
async def test_the_doctor_asks_with_the_workers_key() -> None:
    """Without it a server that asks for one is named."""
    deployment = Deployment(worker_api_key="s3cret")
    for standin in (deployment.prefill[0], deployment.decode[0]):
        says(standin, about(standin.role, engine="vllm"))
        standin.script.api_key = "s3cret"
    async with deployment:
        for key, needs in (("s3cret", False), (None, True)):
            options = GatherOptions(seconds=0.1, probe=False, worker_api_key=key)
            evidence = await gather_evidence("it", Address("127.0.0.1", deployment.proxy.port), options)
            assert [(one.needs_key, one.about is None) for one in evidence.workers] == [(needs, needs)] * 2
