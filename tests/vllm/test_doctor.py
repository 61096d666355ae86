"""``kvbelt doctor`` on real vLLM servers."""

import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from kvbelt.wire.about import About
from tests.vllm.conftest import Deployment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

#: How often the doctor may look.
PATIENCE = 6


def doctor(deployment: Deployment) -> list[dict[str, Any]]:
    """The findings of a doctor."""
    command = [sys.executable, "-m", "kvbelt", "doctor", "--json", "--url", deployment.proxy.url, "--seconds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return findings


def test_every_pair_is_measured(deployment: Deployment) -> None:
    """Every pair is measured by the doctor's prompt, and nothing is wrong."""
    pairs = len(deployment.prefill) * len(deployment.decode)
    every = f"{pairs} of {pairs} pairs carry KV"
    # A server's first prompts take longer than the doctor waits, and than a lease lasts, where few cores have many
    # servers; it says so then.
    for _ in range(PATIENCE):
        findings = doctor(deployment)
        (links,) = [one for one in findings if one["name"] == "links"]
        errors = [one for one in findings if one["severity"] == "error"]
        if links["what"] == every and not errors:
            break
    assert links["what"] == every
    assert not errors
    assert all(
        "GB/s" in line and "while the doctor looked" in line and "trial prompt" in line for line in links["evidence"]
    )


def test_a_server_tells_of_its_belt(deployment: Deployment) -> None:
    """A server reports what the handshake compares, its transports and its sizes."""
    doctor(deployment)  # something has moved since
    asked = {"model": "demo", "prompt": [1], "max_tokens": 4, "ignore_eos": True}
    asked["kv_transfer_params"] = {"kvbelt": "describe"}

    def about(server: Any) -> About:
        told = server.post("/v1/completions", asked)["kv_transfer_params"]
        return msgspec.convert(told["about"], About)

    prefill, decode = about(deployment.prefill[0]), about(deployment.decode[0])
    assert prefill.compatibility == decode.compatibility
    for said in (prefill, decode):
        assert said.backends == ["UCX"]
        assert "UCX" in said.plugins
        assert (said.engine, said.device, said.buffer_device) == ("vllm", "cpu", "cpu")
        assert said.buffer_bytes == 256 << 20
        assert said.compatibility is not None
        assert said.bytes_per_token == said.compatibility.layout.slot_bytes(1) // said.compatibility.layout.block_size
    writes = [road.transport for road in prefill.transports if road.operation == "write"]
    assert writes
    assert all(transport.startswith("cma/") for transport in writes)
    ranks = decode.compatibility.tp_size if decode.compatibility is not None else 0
    assert len(prefill.links) == ranks * len(deployment.decode)
    assert all(link.num_bytes > 0 and link.busy_seconds > 0 for link in prefill.links)
