"""Servers whose connector stands in vLLM's ``MultiConnector``, with ``OffloadingConnector`` beside it.

``scripts/test-vllm`` runs the other tests of real servers with these as well.
"""

import os
import uuid

import pytest

from tests.e2e.prompts import long_text
from tests.vllm.asking import a_step, ask, decode_leg, forget_prefixes, prefill_leg
from tests.vllm.conftest import Deployment, wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.environ.get("KVBELT_VLLM_BESIDE") != "offloading", reason="no connector beside ours"),
]

LOADED = "vllm:external_prefix_cache_hits_total"


def test_what_the_other_connector_loads_is_sent(deployment: Deployment) -> None:
    """A prefill server loads a prompt from the other connector's store, sends it, and decode goes on exactly."""
    prefill, decode = deployment.prefill[0], deployment.decode[0]
    body = {"prompt": "Kept beside: " + long_text(600, start=77)}
    _, _, expected = ask(deployment.plain, body)
    for loads in (False, True):
        loaded = prefill.metric(LOADED)
        way, _, got = ask(deployment.proxy, body)
        assert got == expected
        assert way.startswith("first-token")
        a_step(prefill)
        assert (prefill.metric(LOADED) > loaded) is loads
        for server in (prefill, decode):
            forget_prefixes(server)
            a_step(server)


def test_kv_that_never_comes_is_computed(deployment: Deployment) -> None:
    """The belt promises KV before the other connector is asked; if it does not come, the answer is plain vLLM's."""
    prompt = "Promised: " + long_text(300, start=83)
    _, _, (_, _, expected) = ask(deployment.plain, {"prompt": prompt})
    first = prefill_leg(deployment, prompt, uuid.uuid4().hex)["choices"][0]
    rest = decode_leg(deployment, first["prompt_token_ids"] + first["token_ids"], uuid.uuid4().hex)
    assert rest["kv_transfer_params"]["reason"] == "unknown_transfer"
    assert first["token_ids"] + rest["choices"][0]["token_ids"] == expected[3]


def test_both_connectors_count(deployment: Deployment) -> None:
    """A server's metrics have the belt's figures and the other connector's."""
    ask(deployment.proxy, {"prompt": "Counted: " + long_text(40, start=91)})
    for servers, name in ((deployment.prefill, "sent"), (deployment.decode, "received")):
        for server in servers:
            a_step(server)
            wait_until(lambda server=server, name=name: server.metric(f"kvbelt_{name}_bytes_total") > 0)
            assert server.metric("vllm:kv_offload_lookup_sync_delay_seconds_count") > 0
