"""Merged answers against plain vLLM's, field by field, from recorded answers of real servers.

``recorded/vllm-0.32.json`` has what a plain server, a prefill server and a decode server of vLLM 0.32.0 answered to one
request each (SmolLM2-135M, greedy). ``tests/vllm/test_fields.py`` compares running servers.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvbelt.proxy.request.merge import DONE, FirstTokenMerger
from kvbelt.proxy.request.prefill_answer import PrefillAnswer

#: In ``system_fingerprint``: a server with a connector has another one than a plain server.
_CONFIGURATION = re.compile(r"-[0-9a-f]{8}(?=\")")

RECORDED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "recorded" / "vllm-0.32.json").read_text())


def named(recorded: dict[str, Any]) -> str:
    """The fields that the answer's shape depends on."""
    body = recorded["body"]
    return " ".join(sorted({"prompt", "messages", "stream", "return_token_ids", "stream_options"} & body.keys()))


def merger_of(recorded: dict[str, Any]) -> FirstTokenMerger:
    """As the proxy makes it for this request."""
    body = recorded["body"]
    return FirstTokenMerger(
        PrefillAnswer(recorded["prefill"].encode()),
        chat="messages" in body,
        include_usage="stream_options" in body,
        token_ids="return_token_ids" in body,
    )


def compared(answer: bytes | str) -> list[dict[str, Any]]:
    """A whole answer, or a stream's events, without what differs between any two answers or servers."""
    text = _CONFIGURATION.sub("", answer.decode() if isinstance(answer, bytes) else answer)
    if text.startswith("{"):
        found = [json.loads(text)]
    else:
        *events, last, rest = text.split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        found = [json.loads(event.removeprefix("data: ")) for event in events]
    return [{name: value for name, value in one.items() if name not in ("id", "created")} for one in found]


@pytest.mark.parametrize("recorded", RECORDED, ids=named)
def test_a_merged_answer_has_plain_vllm_s_fields(recorded: dict[str, Any]) -> None:
    """Every field of every event, nulls included."""
    merger = merger_of(recorded)
    if recorded["body"].get("stream"):
        got = merger.opening(None) + merger.relayed(recorded["decode"].encode())
    else:
        got = merger.whole(recorded["decode"].encode())
    assert compared(got) == compared(recorded["plain"])


@pytest.mark.parametrize("recorded", RECORDED, ids=named)
def test_so_has_an_answer_of_the_first_token_alone(recorded: dict[str, Any]) -> None:
    """As if it had ended the answer, which plain vLLM's limit of one token has done."""
    merger = merger_of(recorded)
    got = merger.opening("length") + merger.ending() if "stream" in recorded["body"] else merger.whole(None, "length")
    assert compared(got) == compared(recorded["plain_one"])
    assert got.endswith(DONE) == ("stream" in recorded["body"])
