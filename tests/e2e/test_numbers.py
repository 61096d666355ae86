"""Every surface tells the same times of a request."""

import re
import uuid
from pathlib import Path

import httpx
import pytest

from kvbelt.cli import main
from kvbelt.ops.bars import milliseconds
from kvbelt.ops.deployment import SyncDeployment
from kvbelt.ops.top_frame import frame
from kvbelt.wire.console import CONSOLE_STATE
from kvbelt.wire.request_record import REQUEST_LIST, REQUEST_RECORD, RequestRecord
from tests.e2e.asking import get, until
from tests.e2e.prompts import long_text
from tests.metrics.scrape import value_in

pytestmark = pytest.mark.e2e

LINE = re.compile(r"TTFT (?P<ttft>[\d.]+ ms|unknown), whole answer (?P<whole>[\d.]+) ms")


def observed(url: str) -> tuple[float, float, float]:
    """Number and sum in milliseconds of the proxy's two histograms of TTFT, whose sums must agree."""
    text = get(f"{url}/metrics").text
    count, total = value_in(text, "lmcache_ttft_count"), value_in(text, "lmcache_ttft_sum")
    assert 1000 * value_in(text, "kvbelt_ttft_seconds_sum") == pytest.approx(total)
    return count, total, value_in(text, "kvbelt_proxy_request_seconds_sum")


def nth(values: list[float], percent: int) -> float:
    """By nearest rank."""
    return sorted(values)[-(-len(values) * percent // 100) - 1]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_all_surfaces_agree(
    stream: bool,
    two_p_two_d: SyncDeployment,
    two_p_two_d_logs: Path,
    client: httpx.Client,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """TTFT is the first token's, and the whole answer's time is named so: log, why, metrics, top and console."""
    url, name = two_p_two_d.url, f"numbers-{uuid.uuid4().hex[:8]}"
    count, total, seconds = observed(url)
    body = {"prompt": long_text(200, start=int(stream)), "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    reply = client.post(f"{url}/v1/completions", json=body | {"stream": stream}, headers={"x-request-id": name})
    assert reply.headers["x-kvbelt-path"].startswith("first-token")

    def record() -> RequestRecord:
        return REQUEST_RECORD.parse(get(f"{url}/kvbelt/requests/{name}").content, "the proxy")

    until(lambda: record().complete, what="its transfer's end")
    said = record()
    first, whole = said.timings_ms.first_token, said.timings_ms.total
    assert first is not None
    assert whole is not None
    assert first < whole
    # the metrics
    then = observed(url)
    assert then[0] - count == 1
    assert then[1] - total == pytest.approx(first, abs=0.01)
    assert then[2] - seconds == pytest.approx(whole / 1000, abs=1e-5)

    # the log
    def logged() -> re.Match[str] | None:
        log = (two_p_two_d_logs / "proxy.log").read_text(encoding="utf-8")
        return LINE.search(next((line for line in log.splitlines() if f"request_id={name}" in line), ""))

    line = until(logged, what="its line in the log")
    assert (line["ttft"], line["whole"]) == (f"{first:.1f} ms", f"{whole:.1f}")
    # kvbelt why
    assert main(["why", name, "--url", url]) == 0
    shown = capsys.readouterr().out
    assert f"first token after {milliseconds(first)} ms, whole answer after {milliseconds(whole)} ms" in shown
    # the console, and kvbelt top
    state = CONSOLE_STATE.parse(get(f"{url}/kvbelt/console.json?window=60").content, "the proxy")
    row = next(row for row in state.requests if row.request_id == name)
    assert (row.first_token_ms, row.total_ms) == (first, whole)
    recent = REQUEST_LIST.parse(get(f"{url}/kvbelt/requests?limit=1000").content, "the proxy").requests
    known = [(one.time + ttft / 1000, ttft) for one in recent if (ttft := one.timings_ms.first_token) is not None]
    values = [ttft for _, ttft in sorted(known)[-state.live.first_token_ms.count :]]
    assert (state.live.first_token_ms.p50, state.live.first_token_ms.p99) == (nth(values, 50), nth(values, 99))
    row_of_top = next(line for line in frame(state, url=url) if line.startswith("first token"))
    assert row_of_top.split() == [
        "first", "token", milliseconds(nth(values, 50)), "ms", milliseconds(nth(values, 99)), "ms",
    ]  # fmt: skip
