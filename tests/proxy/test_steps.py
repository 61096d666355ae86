"""What the proxy knows of its workers' steps."""

from dataclasses import replace

import msgspec

from kvbelt.wire.ids import EngineId
from kvbelt.wire.notification import StepsReport, encode
from tests.proxy.support import Deployment, async_test, eventually
from tests.wire.messages import STEPS

LATER = msgspec.structs.replace(STEPS, decodes=9, costs=replace(STEPS.costs, samples=500))


def said(steps, engine="d0"):
    """A worker's notification."""
    return encode(StepsReport(engine=EngineId(engine), steps=steps))


def of_vllm(standin):
    """Make it a vLLM server whose description has steps."""
    standin.script.vllm_metrics = ""
    standin.more_health = {"steps": msgspec.to_builtins(STEPS)}


@async_test
async def test_the_latest_word_of_a_vllm_server_counts():
    """Its description comes first, once; health checks, which say nothing of steps, change nothing."""
    deployment = Deployment()
    of_vllm(deployment.decode[0])
    async with deployment:
        worker = deployment.worker(deployment.decode[0])
        assert worker.steps == STEPS
        await deployment.notify(said(LATER))
        await eventually(lambda: worker.steps == LATER)
        await worker.check()
        assert worker.steps == LATER
        assert len(deployment.decode[0].questions) == 1


@async_test
async def test_another_incarnation_begins_with_its_own_steps():
    """What the former one said is forgotten, and what still comes from it is ignored."""
    async with Deployment() as deployment:
        decode = deployment.decode[0]
        worker = deployment.worker(decode)
        deployment.proxy.context.notified(StepsReport(engine=EngineId("d0"), steps=STEPS))
        assert worker.steps == STEPS
        decode.engine_id = "d0-again"
        await worker.check()
        assert (worker.engine_id, worker.steps) == ("d0-again", None)
        deployment.proxy.context.notified(StepsReport(engine=EngineId("d0"), steps=STEPS))
        assert worker.steps is None
        deployment.proxy.context.notified(StepsReport(engine=EngineId("d0-again"), steps=LATER))
        assert worker.steps == LATER


@async_test
async def test_a_lost_worker_has_no_steps():
    """Until it says them again."""
    async with Deployment() as deployment:
        worker = deployment.worker(deployment.decode[0])
        deployment.proxy.context.notified(StepsReport(engine=EngineId("d0"), steps=STEPS))
        await deployment.decode[0].stop()
        await worker.check()
        deployment.proxy.context.notified(StepsReport(engine=EngineId("d0"), steps=STEPS))
        assert (worker.lost, worker.steps) == (True, None)


@async_test
async def test_a_server_of_both_roles_tells_both_of_its_workers():
    """It may be configured as a prefill worker and as a decode worker."""
    deployment = Deployment()
    deployment.prefill[0].engine_id = "d0"
    async with deployment:
        deployment.proxy.context.notified(StepsReport(engine=EngineId("d0"), steps=STEPS))
        assert [worker.steps for worker in deployment.proxy.context.fleet] == [STEPS, STEPS]
