"""``kvbelt chaos`` against real processes: a minute of every fault, and a deployment that it must not pass."""

import asyncio
import sys
from pathlib import Path

import pytest

from kvbelt.ops.chaos import report
from kvbelt.ops.chaos.config import ChaosConfig
from kvbelt.ops.chaos.faults import KINDS
from kvbelt.ops.chaos.questions import RequestMix
from kvbelt.ops.chaos.result import Result
from kvbelt.ops.chaos.run import run
from kvbelt.ops.chaos.verdict import Outcome
from kvbelt.ops.terminal import Terminal
from kvbelt.ops.tiny_model import tiny_model_dir
from kvbelt.ops.topology import Topology
from kvbelt.routing.placement import Mode

pytestmark = pytest.mark.e2e


def chaos(**config) -> Result:
    """Run chaos with the tiny model, and print its report for a failed test."""

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    async def main() -> Result:
        small = {"model": tiny_model_dir(say), "questions": 24, "longest": 500, "rate": 8.0}
        return await run(ChaosConfig(**(small | config)), Terminal(show_logs=False), say, asyncio.Event())

    result = asyncio.run(main())
    sys.stdout.write("\n".join(report.lines(result)))
    return result


@pytest.mark.parametrize("placement", [Mode.SPLIT, Mode.ELASTIC])
def test_a_minute_of_every_fault(placement: Mode) -> None:
    """A 2p2d under load keeps all promises under every fault that this machine allows."""
    result = chaos(topology=Topology(2, 2), seconds=36.0, every=1.3, seed=1, placement=placement)
    assert report.held(result)
    done = {fault.injection.kind.name for fault in (*result.injected, *result.skipped)}
    assert done == {kind.name for kind in KINDS} - result.impossible.keys()
    assert result.outcomes[Outcome.RIGHT] > 100
    if placement is Mode.SPLIT:  # elastic placement splits as many as the machine's speed demands
        assert result.paths["first-token"] > 50


def test_a_broken_deployment_does_not_pass() -> None:
    """Wrong KV, unanswered requests and cut streams are found, each with its context."""
    broken = (sys.executable, str(Path(__file__).with_name("broken.py")))
    result = chaos(
        topology=Topology(1, 1),
        command=broken,
        seconds=6.0,
        seed=1,
        kinds=(),
        mix=RequestMix(deadline=1.0, hasty=0.0),
    )
    assert not report.held(result)
    assert result.outcomes[Outcome.WRONG] > 5
    assert result.outcomes[Outcome.HANG] > 1
    assert result.outcomes[Outcome.TRUNCATED] > 1
    wrong = next(failure for failure in result.failures if failure.verdict.outcome is Outcome.WRONG)
    assert wrong.request_id in wrong.record
    assert "transfer" in wrong.logs["prefill-0"]
    assert "NO" in "\n".join(report.lines(result))
