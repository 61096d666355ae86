"""``kvbelt chaos`` against real processes: a minute of every fault, and a deployment that it must not pass."""

import asyncio
import sys
from pathlib import Path

import pytest

from kvbelt.ops.chaos import report
from kvbelt.ops.chaos.faults import KINDS
from kvbelt.ops.chaos.plan import Plan
from kvbelt.ops.chaos.questions import Manners
from kvbelt.ops.chaos.result import Result
from kvbelt.ops.chaos.run import run
from kvbelt.ops.chaos.verdict import Word
from kvbelt.ops.console import Console
from kvbelt.ops.tiny_model import tiny_model_dir
from kvbelt.ops.topology import Topology

pytestmark = pytest.mark.e2e


def chaos(**plan) -> Result:
    """One run with the tiny model; its report is printed, for whoever reads a failed test."""

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    async def main() -> Result:
        small = {"model": tiny_model_dir(say), "questions": 24, "longest": 500, "rate": 8.0}
        return await run(Plan(**(small | plan)), Console(show_logs=False), say, asyncio.Event())

    result = asyncio.run(main())
    sys.stdout.write("\n".join(report.lines(result)))
    return result


def test_a_minute_of_every_fault() -> None:
    """2p2d under load and every kind of fault that this machine allows: all promises hold."""
    result = chaos(topology=Topology(2, 2), seconds=36.0, every=1.3, seed=1)
    assert report.held(result)
    done = {fault.injection.kind.name for fault in (*result.injected, *result.skipped)}
    assert done == {kind.name for kind in KINDS} - result.impossible.keys()
    assert result.words[Word.RIGHT] > 100
    assert result.paths["first-token"] > 50


def test_a_broken_deployment_does_not_pass() -> None:
    """Wrong KV, forgotten requests and streams cut short are found, each with what is needed to look into it."""
    broken = (sys.executable, str(Path(__file__).with_name("broken.py")))
    result = chaos(
        topology=Topology(1, 1),
        command=broken,
        seconds=6.0,
        seed=1,
        kinds=(),
        manners=Manners(deadline=1.0, hasty=0.0),
    )
    assert not report.held(result)
    assert result.words[Word.WRONG] > 5
    assert result.words[Word.HANG] > 1
    assert result.words[Word.TRUNCATED] > 1
    wrong = next(failure for failure in result.failures if failure.verdict.word is Word.WRONG)
    assert wrong.request_id in wrong.record
    assert "transfer" in wrong.logs["prefill-0"]
    assert "NO" in "\n".join(report.lines(result))
