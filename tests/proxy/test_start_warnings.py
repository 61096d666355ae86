"""What the proxy says about workers that were started unwisely, and about itself."""

import logging

import pytest

from kvbelt.wire import about
from tests.proxy.support import Deployment, async_test


def said(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> str:
    """What the proxy has logged at this level."""
    return "\n".join(one.getMessage() for one in caplog.records if one.name == "kvbelt.proxy" and one.levelno == level)


@pytest.mark.parametrize(("prefill", "warned"), [(2, False), (3, True)])
def test_many_more_prefill_than_decode_workers_are_warned_of_at_the_start(caplog, prefill: int, warned: bool) -> None:
    """The seed's third anti-pattern."""

    @async_test
    async def start() -> None:
        async with Deployment(prefill=prefill):
            pass

    with caplog.at_level(logging.WARNING, "kvbelt.proxy"):
        start()
    assert ("1p3d" in said(caplog, logging.WARNING)) is warned


@pytest.mark.parametrize(("engine", "level"), [("vllm", logging.WARNING), ("embedded", logging.INFO)])
def test_hash_seeds_that_differ_are_said_once_at_the_start(caplog, engine: str, level: int) -> None:
    """The seed's second anti-pattern: a warning where vLLM hashes, for it is the engine's own."""

    @async_test
    async def start() -> None:
        deployment = Deployment(prefill=2, decode=2)
        for number, standin in enumerate((*deployment.prefill, *deployment.decode)):
            standin.more_health = {"engine": engine, "hash_seed": "0" if number else "random"}
        async with deployment:
            pass

    with caplog.at_level(logging.INFO, "kvbelt.proxy"):
        start()
    lines = [line for line in said(caplog, level).splitlines() if "PYTHONHASHSEED" in line]
    assert len(lines) == 1
    assert "random" in lines[0]
    assert "export PYTHONHASHSEED=0" in lines[0].replace("Export", "export")


def test_workers_that_do_not_say_their_seed_are_left_alone(caplog) -> None:
    """Those of an older version."""

    @async_test
    async def start() -> None:
        async with Deployment(prefill=2):
            pass

    with caplog.at_level(logging.INFO, "kvbelt.proxy"):
        start()
    assert "PYTHONHASHSEED" not in said(caplog)


@async_test
async def test_the_proxy_says_what_it_is():
    """``/kvbelt/about``: versions, machine and time, as a worker does."""
    async with Deployment() as deployment:
        reply = await deployment.get("/kvbelt/about")
        told = about.parse(reply.body)
        assert (told.role, bool(told.kvbelt), told.machine.pid > 0) == ("proxy", True, True)
        assert "nixl" in told.packages
