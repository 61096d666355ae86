"""Metrics of real processes, and alerts on them in a real Prometheus."""

import os
import signal
from pathlib import Path

import pytest

from kvbelt.metrics import By
from kvbelt.ops.deployment import SyncDeployment
from tests.e2e.asking import ask, get, until
from tests.e2e.load import Load
from tests.e2e.prometheus import Prometheus
from tests.e2e.prompts import long_text
from tests.metrics.scrape import expected, names_in, value_in

pytestmark = pytest.mark.e2e


def test_real_processes_export_what_the_catalogue_says(one_p_one_d: SyncDeployment) -> None:
    """The proxy and both workers export their parts, and all three count an answer's bytes."""
    proxy, prefill, decode = (one_p_one_d.process(name) for name in ("proxy", "prefill-0", "decode-0"))

    def scrape(url: str) -> str:
        return get(url + "/metrics").raise_for_status().text

    def moved() -> float:
        return value_in(scrape(proxy.url), "kvbelt_proxy_transfer_size_bytes_sum")

    before = moved()
    answer = ask(one_p_one_d.url, {"prompt": long_text(60, start=77), "temperature": 0, "max_tokens": 6}, stream=True)
    assert answer.path == "first-token"
    until(lambda: moved() > before, what="the transfer's notification")
    texts = {process.name: scrape(process.url) for process in (proxy, prefill, decode)}
    assert set(names_in(texts["proxy"])) == expected(By.PROXY)
    assert set(names_in(texts["prefill-0"])) == set(names_in(texts["decode-0"])) == expected(By.WORKER)
    counted = {
        prefill: ("kvbelt_request_queue_seconds_count", "kvbelt_engine_busy_seconds_total"),
        decode: (
            "kvbelt_request_queue_seconds_count",
            "kvbelt_engine_busy_seconds_total",
            "kvbelt_request_kv_wait_seconds_count",
            "kvbelt_inter_token_seconds_count",
        ),
        proxy: ("kvbelt_proxy_decode_wait_seconds_count",),
    }
    for process, metrics in counted.items():
        for name in metrics:  # counted when the request has ended, a moment after its answer
            until(lambda at=process.url, name=name: value_in(scrape(at), name) > 0, what=f"{name} of {process.name}")


def test_alerts_fire_and_resolve_in_a_real_prometheus(two_p_two_d: SyncDeployment, tmp_path: Path) -> None:
    """A decode worker that is stopped under load is named, until it goes on."""
    victim = two_p_two_d.process("decode-1")
    body = {"prompt": long_text(700, start=13), "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    lost = {"KVBeltWorkerLost", "KVBeltTargetDown"}
    with Prometheus(two_p_two_d.processes, tmp_path) as prometheus:
        with Load(two_p_two_d.url, body, at_once=24, stream=True, salted=True):
            # At one moment: a machine that stands still for a second loses scrapes, and so, for a while, every process.
            alerts = {"DisaggHighTTFT", *lost}
            slow = {"DisaggHighTTFT"}
            until(lambda: prometheus.firing() & alerts == slow, what="slow first tokens, and no worker lost")
            os.kill(victim.pid, signal.SIGSTOP)
            try:
                until(lambda: lost <= prometheus.firing(), what="a lost worker")
                named = 'ALERTS{alertname="KVBeltWorkerLost",alertstate="firing"}'
                until(
                    lambda: (
                        [series["metric"]["worker"] for series in prometheus.query(named)]
                        == [f"{victim.host}:{victim.port}"]
                    ),
                    what="the one that is lost, named",
                )
            finally:
                os.kill(victim.pid, signal.SIGCONT)
        until(lambda: not prometheus.firing() & {"DisaggHighTTFT", *lost}, within=120, what="nothing wrong any more")
        assert prometheus.broken_rules() == []
