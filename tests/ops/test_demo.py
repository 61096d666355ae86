"""The demo over a proxy that stands in: what it prints, and when it fails."""

import asyncio
import dataclasses
import io
import json

import pytest

from kvbelt.ops.demo import DemoFailedError, show
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.terminal import Terminal


def chunk(text):
    """One piece of a streamed chat answer."""
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n"


@pytest.fixture
def demo(spec, tmp_path, record):
    """Run the demo's request against a stream and a record."""

    def run(stream, told=record):
        (tmp_path / "record").write_text(json.dumps(told))
        env = {"STANDIN_RECORD": str(tmp_path / "record")}
        if stream is not None:
            (tmp_path / "stream").write_text(stream)
            env["STANDIN_STREAM"] = str(tmp_path / "stream")

        async def deploy_and_show():
            async with Deployment(dataclasses.replace(spec, env=env), Terminal(io.StringIO())) as deployment:
                await show(deployment, "Where?", 10)

        asyncio.run(deploy_and_show())

    return run


def test_answer_and_waterfall_are_printed(demo, capsys):
    """The question, the answer as one text, and the request's spans."""
    demo(": a comment\n\n" + chunk("In ") + chunk("Paris, 巴黎.") + "data: [DONE]\n\n")
    shown = capsys.readouterr().out
    assert "> Where?\n\nIn Paris, 巴黎.\n" in shown
    assert "46.1 MB in 30 writes" in shown
    assert "first decode step" in shown


def test_error_status_fails_with_the_proxys_words(demo):
    with pytest.raises(DemoFailedError, match=r"status 503: .*no worker"):
        demo(None)


def test_broken_stream_fails(demo):
    """An error event in the middle fails, with its message."""
    with pytest.raises(DemoFailedError, match="broke off: decode worker lost"):
        demo(chunk("In") + 'data: {"error": {"message": "decode worker lost"}}\n\n')


def test_empty_answer_fails(demo):
    with pytest.raises(DemoFailedError, match="empty"):
        demo("data: [DONE]\n\n")


def test_answer_that_did_not_cross_fails(demo, record):
    """A right answer that took the local path fails the demo."""
    with pytest.raises(DemoFailedError, match="did not come over the belt"):
        demo(chunk("In Paris."), record | {"decision": {"path": "local", "reason": "peer_lost", "meaning": None}})
