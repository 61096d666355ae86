"""What is seen of a deployment whose workers answer as vLLM servers do, behind a real proxy."""

import asyncio

import msgspec

from kvbelt.ops.doctor.evidence import Evidence, PairSeen
from kvbelt.ops.doctor.gather import Looking, look
from kvbelt.wire.about import About, Link, Road
from tests.ops.doctor.deployments import about
from tests.proxy.standin import Standin
from tests.proxy.support import Deployment, async_test, eventually

METRICS = """
vllm:num_requests_waiting{engine="0"} 3.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
kvbelt_receive_buffer_bytes{engine="0"} 1000.0
"""


def says(standin: Standin, said: About) -> None:
    """As a vLLM server does, when it is asked who it is."""
    standin.script.vllm_metrics = METRICS
    standin.more_health = {"engine": "vllm", "about": msgspec.to_builtins(said)}


async def looked(deployment: Deployment, later: About) -> Evidence:
    """The doctor's look; after its first question the prefill server says something else."""
    prefill = deployment.prefill[0]
    asked = len(prefill.questions)
    looking = asyncio.create_task(look("it", "127.0.0.1", deployment.proxy.port, Looking(seconds=0.3, probe=False)))
    await eventually(lambda: len(prefill.questions) > asked)
    says(prefill, later)
    return await looking


def pair_of(evidence: Evidence) -> PairSeen:
    """The only one."""
    (pair,) = evidence.pairs
    return pair


@async_test
async def test_a_vllm_server_is_seen_as_a_worker_of_our_own_is() -> None:
    """What it is, what has moved from it meanwhile and over which road, its load, its clock."""
    deployment = Deployment()
    first = about("prefill", engine="vllm", roads=[], links=[Link("d0", 2, 1000, 1.0)], unix_time=5.0)
    says(deployment.prefill[0], first)
    says(deployment.decode[0], about("decode", engine="vllm"))
    async with deployment:
        road = Road("intra-node", "write", "host", "cma/memory")
        later = about("prefill", engine="vllm", roads=[road], links=[Link("d0", 5, 4000, 3.0)])
        evidence = await looked(deployment, later)
        sender, receiver = evidence.workers
        assert sender.about == later
        assert receiver.about == about("decode", engine="vllm")
        assert sender.skew_seconds is not None
        assert sender.skew_seconds < -1e9
        assert (pair_of(evidence).link, pair_of(evidence).recent) == (Link("d0", 3, 3000, 2.0), True)
        assert {sample.waiting for sample in receiver.samples} == {3}
        assert {sample.receive_bytes for sample in receiver.samples} == {1000}


@async_test
async def test_of_several_ranks_the_slowest_link_counts() -> None:
    """Each tensor-parallel rank sends to its own."""
    deployment = Deployment()
    prefill, decode = deployment.prefill[0], deployment.decode[0]
    links = [Link("d0", 1, 1000, 0.1), Link("d0-rank1", 1, 1000, 0.5)]
    for standin in (prefill, decode):
        says(standin, about(standin.role, engine="vllm", links=links))
    async with deployment:
        ranks = [{"engine_id": "d0-rank1", "init_port": 1, "alloc_port": 2}]
        decode.more_health |= {"receiver": decode.health()["receiver"] | {"ranks": ranks}}
        evidence = await looked(deployment, about("prefill", engine="vllm", links=links))
        assert (pair_of(evidence).link, pair_of(evidence).recent) == (links[1], False)
