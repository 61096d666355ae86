"""``kvbelt verify`` finds nothing to complain of: every field gives over the belt what one server gives."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from kvbelt.cli import main
from kvbelt.ops.deployment import SyncDeployment
from kvbelt.ops.verify.command import verify
from kvbelt.ops.verify.judge import EXACT, REWORDED
from kvbelt.ops.verify.report import EQUAL, NOT_ASKED, as_json, lines, status
from tests.http.support import free_port

pytestmark = pytest.mark.e2e

#: Why one worker answers: it computes a prompt's log probabilities or nothing else, has many prompts, or might refuse.
WHOLE = {f"local; reason={reason}" for reason in ("prompt_logprobs", "no_tokens", "many_prompts", "may_be_refused")}


def test_every_field_is_answered_as_by_one_server(
    one_p_one_d: SyncDeployment, aggregated: SyncDeployment, tmp_path: Path
) -> None:
    """Whole, streamed, cached, by the prefill worker alone; refusals in the same words. ``verify.json`` has it all."""
    found = asyncio.run(verify(one_p_one_d.url, aggregated.url, quick=True, seed=1, progress=lambda *_: None))
    (tmp_path / "verify.json").write_bytes(as_json(found))
    assert status(found) == EQUAL, "\n".join(lines(found))
    assert not [case for case in found.judged.cases if case.outcome == REWORDED]
    paths = {case.path for case in found.judged.cases if case.outcome == EXACT and case.path}
    assert {path for path in paths if path.startswith("local")} <= WHOLE
    assert {path.partition(";")[0] for path in paths} >= {"first-token", "re-derive", "local"}


def test_what_cannot_be_asked_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing listens at the URL: one line, and status 2."""
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["verify", "--url", url]) == NOT_ASKED
    assert f"the deployment at {url} cannot be asked" in capsys.readouterr().err


def test_openais_client_reads_a_streamed_call(one_p_one_d: SyncDeployment) -> None:
    """Name and arguments come in the deltas."""
    digit = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    tool: Any = {"type": "function", "function": {"name": "now", "parameters": digit}}
    asked: Any = {"messages": [{"role": "user", "content": "What time is it?"}], "max_tokens": 100, "temperature": 0}
    choice: Any = {"type": "function", "function": {"name": "now"}}
    with openai.OpenAI(base_url=one_p_one_d.url + "/v1", api_key="none") as client:
        stream = client.chat.completions.create(model="", stream=True, **asked, tools=[tool], tool_choice=choice)
        calls = [call for chunk in stream for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert [(call.index, call.type, call.function and call.function.name) for call in calls] == [(0, "function", "now")]
