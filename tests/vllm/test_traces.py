"""Traces across the proxy and real vLLM servers, as a collector gets them."""

import json
import os
import urllib.request
from typing import Any

import pytest

from tests.e2e.prompts import long_text
from tests.vllm.conftest import Deployment, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

#: What vLLM calls its span of one request.
VLLM = "llm_request"


def ask(deployment: Deployment, body: dict[str, Any], flags: str = "01") -> tuple[str, str, str]:
    """A client with its own trace; returns the ids of the trace and of its span, and the path of the answer."""
    trace, span = os.urandom(16).hex(), os.urandom(8).hex()
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    data = json.dumps({"model": "demo", "temperature": 0, "max_tokens": 6, **body}).encode()
    headers = {"content-type": "application/json", "traceparent": f"00-{trace}-{span}-{flags}"}
    request = urllib.request.Request(deployment.proxy.url + path, data, headers)  # noqa: S310 -- ours
    with urllib.request.urlopen(request, timeout=200) as response:  # noqa: S310 -- ours
        response.read()
        return trace, span, response.headers["x-kvbelt-path"]


#: Between the clocks of two processes: the proxy counts from one reading of the time of day, which may be set since.
CLOCKS_NS = 50_000_000


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "Traced: " + long_text(60, start=41)},
        {"prompt": "Traced again: " + long_text(60, start=42), "stream": True},
        {"messages": [{"role": "user", "content": "A traced chat: " + long_text(60, start=43)}]},
        {"prompt": "Traced with a seed: " + long_text(60, start=44), "temperature": 0.8, "seed": 5},
    ],
    ids=["completion", "stream", "chat", "re-derive"],
)
def test_vllm_s_spans_stand_below_the_proxy_s_legs(deployment: Deployment, body: dict[str, Any]) -> None:
    """One trace has the client's span, the request, its legs, and below each leg the server's span."""
    trace, client, way = ask(deployment, body)
    assert way.startswith(("first-token", "re-derive"))
    got = deployment.collector
    wait_until(lambda: {"prefill leg", "decode leg", VLLM} <= {told.span.name for told in got.of(trace)})
    wait_until(lambda: len([told for told in got.of(trace) if told.span.name == VLLM]) == 2)
    spans = got.of(trace)
    (root,) = [told.span for told in spans if told.span.name.startswith("POST /v1/")]
    assert root.parent_span_id.hex() == client
    for kind in ("prefill", "decode"):
        (leg,) = [told.span for told in spans if told.span.name == f"{kind} leg"]
        (below,) = [told for told in spans if told.span.name == VLLM and told.service.startswith(kind)]
        assert leg.parent_span_id == root.span_id
        assert below.span.parent_span_id == leg.span_id
        assert leg.start_time_unix_nano <= below.span.start_time_unix_nano + CLOCKS_NS
        answered = below.attributes["gen_ai.usage.completion_tokens"]
        assert answered == (1 if kind == "prefill" else below.attributes["gen_ai.request.max_tokens"])
    (transfer,) = [told for told in spans if told.span.name == "transfer"]
    assert transfer.attributes["kvbelt.bytes"] > 0


def test_vllm_keeps_no_trace_that_its_client_does_not_keep(deployment: Deployment) -> None:
    """A server keeps no trace that the client does not sample, and none of the proxy's own requests."""
    unkept, _, _ = ask(deployment, {"prompt": "Not kept: " + long_text(30, start=45)}, flags="00")
    kept, _, _ = ask(deployment, {"prompt": "Kept: " + long_text(30, start=46)})
    got = deployment.collector
    # Each server tells of its requests in their order.
    wait_until(lambda: len([told for told in got.of(kept) if told.span.name == VLLM]) == 2)
    assert not got.of(unkept)
    own = [told for told in got.named(VLLM) if told.span.start_time_unix_nano < deployment.ready_ns]
    assert own == []
