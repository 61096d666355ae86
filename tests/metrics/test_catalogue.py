"""The catalogue, docs/metrics.md and the exported metrics agree."""

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tools.draw_metrics import RULES, redrawn

from kvbelt.about import on_this_host
from kvbelt.channels.nixl import NixlChannel
from kvbelt.metrics import CATALOGUE, GROUPS, By, Histogram, Kind, counter, gauge, histogram, render
from kvbelt.proxy.observe.metrics import Metrics
from kvbelt.routing.pairs import Pairs
from kvbelt.vllm.figures import families_of, host_families
from kvbelt.vllm.host_scheduler import HostScheduler
from tests.channels.memory import MemoryChannel, MemoryNetwork
from tests.metrics.scrape import expected, names_in, value_in
from tests.proxy.support import Deployment, async_test, done
from tests.transfer.belts import Side

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_is_drawn() -> None:
    """``python -m tools.draw_metrics docs/metrics.md`` changes nothing."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == redrawn(page, ROOT / RULES)


@async_test
async def test_a_running_proxy_exports_its_part_of_the_catalogue() -> None:
    """It exports every name of its part with the right kind, and no other."""
    async with Deployment() as deployment:
        await deployment.ask({"prompt": "x", "max_tokens": 3, "stream": True})
        text = (await deployment.get("/metrics")).body.decode()
    assert set(names_in(text)) == expected(By.PROXY)
    assert all(CATALOGUE[name].kind is kind for name, kind in names_in(text).items())


def test_a_vllm_server_exports_its_part_of_the_catalogue() -> None:
    """It exports the metrics of the belt and of host memory; all others are vLLM's."""
    with Side("p", "prefill", MemoryChannel("p", MemoryNetwork())) as side:
        families = [*families_of(side.belt, NixlChannel("p")), *host_families(HostScheduler(4, 10))]
    assert set(names_in(render(families).decode())) == expected(By.VLLM)


def test_a_name_stands_in_the_catalogue_once() -> None:
    """Counters end in _total, nothing else does, and each has a meaning."""
    specs = [spec for group in GROUPS for spec in group.specs]
    assert len(specs) == len(CATALOGUE)
    for spec in specs:
        assert spec.name.endswith("_total") is (spec.kind is Kind.COUNTER)
        assert spec.help.endswith(".")
        assert re.fullmatch(r"[a-z][a-z0-9_]+", spec.name)


def test_what_is_not_in_the_catalogue_is_not_exported() -> None:
    """A known name with another kind is refused, too."""
    with pytest.raises(LookupError, match="kvbelt_unheard_of"):
        gauge("kvbelt_unheard_of", 1)
    with pytest.raises(LookupError, match="no counter named kvbelt_kv_blocks"):
        counter("kvbelt_kv_blocks", 1)


def test_a_histogram_s_buckets_are_cumulative() -> None:
    """Bounds and sum have the unit of the metric's name."""
    seen = Histogram((0.1, 0.5))
    for value in (0.05, 0.1, 0.3, 7.0):
        seen.observe(value)
    text = render([histogram("lmcache_ttft", seen, 1000.0)]).decode()
    assert 'lmcache_ttft_bucket{le="100.0"} 2.0' in text
    assert 'lmcache_ttft_bucket{le="500.0"} 3.0' in text
    assert 'lmcache_ttft_bucket{le="+Inf"} 4.0' in text
    assert "lmcache_ttft_sum 7450.0" in text


def test_many_values_at_once_are_counted_as_one_by_one() -> None:
    """Values on, between and beyond the bounds are counted alike."""
    values = [0.0, 0.1, 0.1000001, 0.3, 0.5, 0.7, 9.0, 0.05]
    alone, together = Histogram((0.1, 0.5)), Histogram((0.1, 0.5))
    for value in values:
        alone.observe(value)
    together.observe_all(values[:3])
    together.observe_all(values[3:])
    together.observe_all([])
    assert list(together.cumulative()) == list(alone.cumulative())
    assert together.total == pytest.approx(alone.total)


def test_a_proxy_without_workers_is_scraped_all_the_same() -> None:
    """Every sum is 0 then."""
    assert "lmcache_prefill_queue_size 0.0" in Metrics(lambda: (), Pairs()).text().decode()


@async_test
async def test_only_a_streamed_answer_s_first_bytes_are_its_first_token() -> None:
    """A single-piece answer counts from the prefill worker's token, or not at all."""
    async with Deployment() as deployment:
        metrics = deployment.proxy.context.metrics
        ttft, tpot = metrics.ttft, metrics.tpot
        await deployment.ask({"prompt": "x", "max_tokens": 3, "stream": True}, request_id="a")
        metrics.count()
        assert (ttft.count, tpot.count) == (1, 1)
        await deployment.ask({"prompt": "x", "max_tokens": 3}, request_id="b")
        metrics.count()
        assert ttft.count == 2
        record = deployment.proxy.context.records.get("b")
        assert record is not None
        assert record.prefill_answered is not None
        assert record.first_token is not None
        before = ttft.total
        await deployment.ask({"prompt": "x", "max_tokens": 3, "seed": 1}, request_id="c")
        metrics.count()
        assert (ttft.count, ttft.total) == (2, before)
        await deployment.ask({"prompt": "x", "max_tokens": 1}, request_id="d")
        metrics.count()
        assert (ttft.count, tpot.count) == (3, 1)


@async_test
async def test_workers_and_their_states_are_labels() -> None:
    """Each worker has one state, and labels that identify it."""
    async with Deployment(prefill=2) as deployment:
        text = (await deployment.get("/metrics")).body.decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    states = [sample.labels["state"] for sample in samples if sample.name == "kvbelt_proxy_worker_state"]
    assert states == ["ready"] * 3
    engines = {sample.labels["engine_id"] for sample in samples if sample.name == "kvbelt_proxy_worker_info"}
    assert engines == {"p0", "p1", "d0"}


@async_test
async def test_what_a_pair_has_moved_is_counted_with_both_devices() -> None:
    """By names, once both workers have said who they are; other engines are left out."""
    async with Deployment() as deployment:
        prefill, decode = (deployment.worker(ones[0]) for ones in (deployment.prefill, deployment.decode))
        for worker, device in ((prefill, "cuda:2"), (decode, "cuda:GPU-7f")):
            worker.endpoint = replace(worker.endpoint, report=replace(worker.endpoint.report, device=device))
        sender, receiver = (worker.endpoint.report.engine_id for worker in (prefill, decode))
        metrics = deployment.proxy.context.metrics
        metrics.notified(msgspec.structs.replace(done(), sender=sender, receiver=receiver))
        metrics.notified(done())
        text = (await deployment.get("/metrics")).body.decode()
    labels = {"prefill_device": "cuda:2", "decode_device": "cuda:GPU-7f", "prefill": prefill.name}
    assert value_in(text, "kvbelt_pair_transfers_total", **labels) == 1
    assert value_in(text, "kvbelt_pair_transfer_bytes_total", **labels) == 1000
    assert value_in(text, "kvbelt_pair_transfers_total") == 1


@pytest.mark.parametrize(
    ("device", "visible", "named"),
    [
        ("cpu", "1", "cpu"),
        ("cuda:0", None, "cuda:0"),
        ("cuda:1", "2, 5", "cuda:5"),
        ("cuda:0", "GPU-7f", "cuda:GPU-7f"),
    ],
)
def test_a_gpu_is_named_as_its_host_does(device: str, visible: str | None, named: str) -> None:
    """Each process numbers those that it sees from 0."""
    assert on_this_host(device, visible) == named
