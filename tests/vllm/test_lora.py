"""LoRA adapters on real servers: the same on both sides, on one of them, and different ones under one name."""

import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.prompts import long_text
from tests.vllm.asking import ask
from tests.vllm.conftest import Deployment
from tests.vllm.servers import Server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif("enable-lora" not in os.environ.get("KVBELT_VLLM_ARGUMENTS", ""), reason="no adapters"),
]


def load(name: str, adapter: str, *servers: Server) -> None:
    """Load an adapter (tests/vllm/variants.py) under a name."""
    folder = Path(os.environ["KVBELT_VLLM_MODEL"]).parent / f"adapter-{adapter}"
    for server in servers:
        body = f'{{"lora_name": "{name}", "lora_path": "{folder}"}}'.encode()
        url = f"{server.url}/v1/load_lora_adapter"
        request = urllib.request.Request(url, body, {"content-type": "application/json"})  # noqa: S310 -- ours
        urllib.request.urlopen(request, timeout=100).close()  # noqa: S310


def prompt(model: str, number: int) -> dict[str, Any]:
    return {"model": model, "prompt": f"With {model}: " + long_text(60, start=number)}


def test_an_adapter_of_both_sides_crosses(deployment: Deployment) -> None:
    """From the second request on with the prefill server's first token."""
    load("both", "a", deployment.plain, *deployment.prefill, *deployment.decode)
    ways = []
    for number in range(2):
        body = prompt("both", number)
        way, _, got = ask(deployment.proxy, body)
        assert got == ask(deployment.plain, body)[2]
        assert got != ask(deployment.plain, body | {"model": "demo"})[2]
        ways.append(way)
    assert ways[0].startswith("re-derive; reason=new_adapter")
    assert ways[1].startswith(("first-token", "re-derive; reason=incomplete_text"))


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_an_adapter_of_one_side_is_served_whole(deployment: Deployment, side: str) -> None:
    load(side, "b", deployment.plain, *getattr(deployment, side))
    way, _, got = ask(deployment.proxy, prompt(side, 5))
    assert got == ask(deployment.plain, prompt(side, 5))[2]
    assert "model_missing" in way


def test_different_adapters_of_one_name_share_no_kv(deployment: Deployment) -> None:
    """The answer is the decode server's."""
    load("other", "a", *deployment.prefill)
    load("other", "b", deployment.plain, *deployment.decode)
    way, _, got = ask(deployment.proxy, prompt("other", 7))
    assert got == ask(deployment.plain, prompt("other", 7))[2]
    assert way == "local; reason=adapter_differs"
