"""The proxy's log tells a worker that is lost from one that was never there."""

import logging

from kvbelt.routing.endpoint import Standing
from tests.proxy.support import Deployment, async_test


@async_test
async def test_a_lost_worker_is_a_warning_and_one_that_was_never_there_is_not(caplog):
    """A worker that is still loading is not lost."""
    caplog.set_level(logging.INFO, "kvbelt.proxy")
    async with Deployment(decode=2) as deployment:
        gone = deployment.worker(deployment.decode[1])
        await deployment.decode[1].stop()
        await gone.check()
        port = deployment.proxy.port
        await deployment.proxy.close()
        await deployment.restart_proxy(port)
        await deployment.proxy.workers_asked()
    said = [(one.levelname, one.getMessage()) for one in caplog.records if f"worker {gone.name} (" in one.getMessage()]
    levels = [level for level, text in said if " is lost: " in text or " does not answer yet: " in text]
    assert levels == ["WARNING", "INFO"]


@async_test
async def test_a_drained_worker_that_ends_is_not_lost(caplog):
    """As in an orderly exchange: nobody needs it."""
    caplog.set_level(logging.INFO, "kvbelt.proxy")
    async with Deployment(decode=2) as deployment:
        leaving = deployment.worker(deployment.decode[1])
        leaving.set_standing(Standing.DRAINING)
        await deployment.decode[1].stop()
        await leaving.check()
    (said,) = [one for one in caplog.records if "which was drained, has ended" in one.getMessage()]
    assert said.levelname == "INFO"
    assert " is lost" not in caplog.text
