"""What workers tell the proxy of their steps."""

from pathlib import Path

import pytest
import zmq

from kvbelt.ops.deployment import running
from kvbelt.wire import notification
from kvbelt.wire.notification import StepsReport
from tests.e2e.asking import ask, health, until
from tests.e2e.conftest import deployment_spec

pytestmark = pytest.mark.e2e


def test_both_workers_of_a_split_tell_what_their_steps_cost(small_model: Path) -> None:
    """Each pushes what it has learnt of its own steps to the port that its file names: here to the test."""
    with zmq.Context() as context, context.socket(zmq.PULL) as pulled:
        port = pulled.bind_to_random_port("tcp://127.0.0.1")
        spec = deployment_spec(small_model, "1p1d", curve=False, belt={"pd_proxy_port": port})
        with running(spec) as deployment:
            engines = {health(worker)["engine_id"] for worker in deployment.workers}
            assert ask(deployment.url, {"prompt": [504, 3575, 282], "max_tokens": 9}, stream=False).token_ids
            told: set[str] = set()

            def all_have_told() -> bool:
                while pulled.poll(0):
                    report = notification.decode(pulled.recv())
                    if isinstance(report, StepsReport) and report.steps.costs.samples:
                        told.add(report.engine)
                return told == engines

            until(all_have_told, what="a report of each worker")
