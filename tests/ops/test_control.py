"""A process of a running launcher is started again by a command."""

import asyncio
import io
import os
import signal

from kvbelt.cli import main
from kvbelt.ops.control import controlled
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.terminal import Terminal
from tests.http.support import eventually


def test_a_worker_that_has_died_is_restarted_by_its_name(spec, tmp_path, monkeypatch, capsys):
    """``kvbelt workers restart`` returns when it is ready, under a new pid; an unknown name is refused."""
    monkeypatch.setenv("KVBELT_CACHE", str(tmp_path))
    shown = io.StringIO()

    async def kill_and_restart():
        async with (
            Deployment(spec, Terminal(shown)) as deployment,
            controlled(deployment, deployment._terminal, "m", os.getpid()),
        ):
            before = deployment.process("decode-0").pid
            os.kill(before, signal.SIGKILL)
            await eventually(lambda: "kvbelt workers restart decode-0" in shown.getvalue())
            command = ["workers", "restart", "--url", deployment.url]
            unknown = await asyncio.to_thread(main, [*command, "decode-9"])
            known = await asyncio.to_thread(main, [*command, "decode-0"])
            return unknown, known, deployment.process("decode-0").pid != before

    assert asyncio.run(kill_and_restart()) == (2, 0, True)
    said = capsys.readouterr()
    assert "decode-0 is ready" in said.out
    assert "prefill-0, decode-0, proxy" in said.err
