"""What the console and kvbelt top colour, and the thresholds that it follows."""

import re

import msgspec
import pytest

from kvbelt.metrics import thresholds
from kvbelt.proxy.observe.alarms import alarms
from kvbelt.proxy.observe.live import live_stats
from kvbelt.proxy.observe.records import Records
from kvbelt.wire.console import Percentiles
from kvbelt.wire.load import NO_LOAD
from kvbelt.wire.workers import PairRow, WorkerRow
from tests.metrics.scrape import rules_of

RULES = {rule["alert"]: rule["expr"] for rule in rules_of("alerts.yml")}
CALM = live_stats(Records(1), 0.0, 10.0)


def worker(role="decode", **changed):
    """One that is ready."""
    made = WorkerRow(
        worker=f"{role[0]}:1", role=role, state="ready", detail="", standing="active", warming=False, engine_id=None,
        model="m", max_model_len=None, load=NO_LOAD, buffers=None, in_flight=0,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changed)


def loaded(role="decode", **load):
    """One with a load."""
    return worker(role, load=msgspec.structs.replace(NO_LOAD, **load))


@pytest.mark.parametrize(
    ("alert", "threshold"),
    [
        ("DisaggHighTTFT", thresholds.TTFT_P99_MS),
        ("PrefillerOverload", thresholds.QUEUE),
        ("KVBeltDecodeOverload", thresholds.QUEUE),
        ("KVBeltDecodeKVFull", thresholds.KV_FREE_RATIO),
        ("KVBeltTransferSlow", thresholds.TRANSFER_EXPOSED_MS / 1e3),
    ],
)
def test_thresholds_are_those_of_the_alerts(alert, threshold):
    assert float(re.search(r"[<>] ([0-9.]+)$", RULES[alert]).group(1)) == threshold


@pytest.mark.parametrize(
    ("workers", "alert", "place"),
    [
        ([loaded(waiting=11)], "KVBeltDecodeOverload", ("waiting", "d:1", "decode")),
        ([loaded("prefill", waiting=11)], "PrefillerOverload", ("waiting", "p:1", "prefill")),
        ([loaded(blocks_total=100, blocks_free=4)], "KVBeltDecodeKVFull", ("kv", "d:1", "decode")),
        ([worker(), worker("prefill", state="lost")], "KVBeltWorkerLost", ("state", "p:1", "prefill")),
        ([worker(), worker("prefill", state="unready")], "KVBeltWorkerNotReady", ("state", "p:1", "prefill")),
    ],
)
def test_trouble_of_a_worker_names_its_place(workers, alert, place):
    (found,) = alarms(workers, [], CALM)
    assert (found.alert, (found.subject, found.worker, found.role)) == (alert, place)
    assert found.what
    assert found.change


@pytest.mark.parametrize("workers", [[loaded(waiting=10, blocks_total=100, blocks_free=5)], [loaded("prefill")]])
def test_a_value_at_its_threshold_is_no_trouble(workers):
    assert alarms(workers, [], CALM) == []


@pytest.mark.parametrize(
    ("figure", "alert"), [("first_token_ms", "DisaggHighTTFT"), ("transfer_exposed_ms", "KVBeltTransferSlow")]
)
def test_slow_requests_are_trouble_of_their_figure(figure, alert):
    slow = msgspec.structs.replace(CALM, **{figure: Percentiles(3, 20.0, 501.0, 501.0)})
    (found,) = alarms([worker()], [], slow)
    assert (found.subject, found.alert) == (figure, alert)


def test_one_late_transfer_of_many_is_no_trouble():
    """As in KVBeltTransferSlow, which looks at a tenth of them."""
    assert RULES["KVBeltTransferSlow"].startswith("kvbelt:transfer_exposed_seconds:p90")
    late = msgspec.structs.replace(CALM, transfer_exposed_ms=Percentiles(50, 20.0, 900.0, 30.0))
    assert alarms([worker()], [], late) == []


def test_the_worst_comes_first():
    pair = PairRow(prefill="p:1", decode="d:1", state="refused", reason="refused_dtype", detail="")
    found = alarms([worker("prefill", state="lost"), loaded("decode", waiting=11)], [pair], CALM)
    assert [one.severity for one in found] == ["critical", "critical", "warning"]
    assert alarms([], [], CALM)[0].subject == "workers"


def test_every_alarm_is_an_alert():
    """An operator who has seen the one finds the other."""
    down = [worker("prefill", state="lost"), worker(state="unready")]
    assert {one.alert for one in alarms(down, [], CALM)} <= RULES.keys()
