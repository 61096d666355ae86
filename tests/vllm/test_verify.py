"""Over the belt every field gives what one plain vLLM server gives: ``kvbelt verify`` asks for all of them."""

import asyncio
import os
from pathlib import Path

import pytest

from kvbelt.ops.verify.command import verify
from kvbelt.ops.verify.report import EQUAL, as_json, lines, status
from tests.vllm.conftest import Deployment

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        "--max-num-batched-tokens" not in os.environ.get("KVBELT_VLLM_ARGUMENTS", ""),
        reason="vLLM's CPU engine dies of a seed beside a prompt in several steps, as the tests' prefill servers have",
    ),
]


def test_every_field_is_answered_as_by_plain_vllm(deployment: Deployment, tmp_path: Path) -> None:
    """Refusals, too. ``verify.json`` has what was found."""
    found = asyncio.run(
        verify(deployment.proxy.url, deployment.plain.url, quick=True, seed=1, progress=lambda *_: None)
    )
    (tmp_path / "verify.json").write_bytes(as_json(found))
    assert status(found) == EQUAL, "\n".join(lines(found))
