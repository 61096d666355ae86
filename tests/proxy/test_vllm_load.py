"""How busy vLLM servers are, which say so in their metrics only."""

import pytest

from kvbelt.proxy.vllm_load import load_of
from tests.metrics.scrape import value_in
from tests.proxy.support import Deployment, async_test, eventually

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
    """KV memory is a share: the mean of theirs."""
    assert load_of(METRICS.encode()) == {"running": 7, "waiting": 13, "blocks_total": 10_000, "blocks_free": 6250}


@pytest.mark.parametrize(
    "text", [b"", b"<html>", b"vllm:num_requests_running{} 1.2.3\n", b"x_vllm:num_requests_running 3"]
)
def test_what_says_nothing_of_it_is_no_load(text: bytes) -> None:
    """Whatever it is."""
    assert load_of(text) == {}


@async_test
async def test_the_queue_of_vllm_servers_is_in_the_proxy_s_metrics() -> None:
    """As that of our own workers is: the alerts are the same."""
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
