"""The proxy's warnings about its workers, and its description of itself."""

import logging

import pytest

from kvbelt.wire.about import ABOUT
from tests.proxy.support import Deployment, async_test


def said(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> str:
    """The proxy's log lines of this level."""
    return "\n".join(one.getMessage() for one in caplog.records if one.name == "kvbelt.proxy" and one.levelno == level)


@pytest.mark.parametrize(("prefill", "warned"), [(2, False), (3, True)])
@async_test
async def test_many_more_prefill_than_decode_workers_are_warned_of_at_the_start(
    caplog, prefill: int, warned: bool
) -> None:
    """More than two prefill workers for each decode worker are warned of."""
    caplog.set_level(logging.WARNING, "kvbelt.proxy")
    async with Deployment(prefill=prefill):
        pass
    assert ("2p2d" in said(caplog, logging.WARNING)) is warned


@pytest.mark.parametrize(("engine", "level"), [("vllm", logging.WARNING), ("embedded", logging.INFO)])
@async_test
async def test_hash_seeds_that_differ_are_logged_once_at_the_start(caplog, engine: str, level: int) -> None:
    """Different hash seeds are a warning for vLLM, whose own hashes they change."""
    caplog.set_level(logging.INFO, "kvbelt.proxy")
    deployment = Deployment(prefill=2, decode=2)
    for number, standin in enumerate((*deployment.prefill, *deployment.decode)):
        standin.more_health = {"engine": engine, "hash_seed": "0" if number else "random"}
    async with deployment:
        pass
    lines = [line for line in said(caplog, level).splitlines() if "PYTHONHASHSEED" in line]
    assert len(lines) == 1
    assert "random" in lines[0]
    assert "export PYTHONHASHSEED=0" in lines[0].replace("Export", "export")


@async_test
async def test_workers_that_do_not_say_their_seed_are_left_alone(caplog) -> None:
    """Older workers, which do not report their seed, cause no warning."""
    caplog.set_level(logging.INFO, "kvbelt.proxy")
    async with Deployment(prefill=2):
        pass
    assert "PYTHONHASHSEED" not in said(caplog)


@async_test
async def test_the_proxy_says_what_it_is():
    """``/kvbelt/about`` has versions, machine and time."""
    async with Deployment() as deployment:
        reply = await deployment.get("/kvbelt/about")
        told = ABOUT.parse(reply.body, "the proxy")
        assert (told.role, bool(told.kvbelt), told.machine.pid > 0) == ("proxy", True, True)
        assert "nixl" in told.packages
