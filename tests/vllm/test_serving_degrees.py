"""Prefill and decode servers with different parallel degrees, against one plain server: the same answers.

``scripts/test-vllm`` gives each side its ``--tensor-parallel-size`` or ``--pipeline-parallel-size``.
"""

import os
import uuid

import pytest

from tests.e2e.prompts import TWENTY, long_text
from tests.vllm.asking import ask, decode_leg, prefill_leg
from tests.vllm.conftest import Deployment

SIDES = tuple(os.environ.get(f"KVBELT_VLLM_{side}_ARGUMENTS", "") for side in ("PREFILL", "DECODE"))

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not any("parallel-size" in each for each in SIDES), reason="equal degrees"),
]


def test_kv_arrives_from_every_rank(deployment: Deployment) -> None:
    """A prompt's KV is used where the other side has another number of ranks."""
    prompt, transfer_id = "By some ranks: " + long_text(150, start=31), uuid.uuid4().hex
    first = prefill_leg(deployment, prompt, transfer_id)
    told = first["kv_transfer_params"]
    assert told["state"] == "open"
    choice = first["choices"][0]
    ids, ranks = choice["prompt_token_ids"] + choice["token_ids"], {key: told[key] for key in ("tp_size", "stages")}
    rest = decode_leg(deployment, ids, transfer_id, **ranks)
    assert rest["kv_transfer_params"] == {"transfer_id": transfer_id, "kv": "received"}
    _, _, (_, _, expected) = ask(deployment.plain, {"prompt": prompt})
    assert choice["token_ids"] + rest["choices"][0]["token_ids"] == expected[3]


def test_prompts_through_the_proxy(deployment: Deployment) -> None:
    """Every answer equals the plain server's, on the fast path.

    Ranks wait for each other in a spin loop. Where they share cores with other servers, leases expire meanwhile; then
    the answer is the decode server's own, and the path says so.
    """
    ways = []
    for body in TWENTY[:12]:
        _, _, expected = ask(deployment.plain, body)
        way, _, got = ask(deployment.proxy, body)
        assert got == expected
        ways.append(way)
    crossed = [way for way in ways if way.startswith(("first-token", "re-derive; reason=incomplete_text"))]
    others = [way for way in ways if way not in crossed]
    assert crossed, ways
    few_cores = len(os.sched_getaffinity(0)) < 6
    assert all(few_cores and ("peer_lost" in way or "lease" in way or "unknown_transfer" in way) for way in others), (
        ways
    )
