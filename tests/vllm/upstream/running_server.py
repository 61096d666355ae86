"""A pytest plugin for vLLM's own tests: they ask a server that runs, instead of starting one each.

It runs in their folder, whose ``tests`` is a package of that name, so it imports nothing of ours.
``KVBELT_UPSTREAM_URL`` is the server. ``KVBELT_UPSTREAM_RESULTS`` is the file for the outcomes, by test. Tests that ask
no server are left out.
"""

import importlib
import inspect
import json
import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest

utils = importlib.import_module("tests.utils")
STARTER = "RemoteOpenAIServer"
URL = urlsplit(os.environ["KVBELT_UPSTREAM_URL"])

outcomes: dict[str, str] = {}


class RunningServer(utils.RemoteOpenAIServer):  # type: ignore[misc, name-defined]
    """The server that runs, whatever model and arguments a test asks for."""

    def __init__(self, *_: object, **__: object) -> None:
        self.host, self.port, self.uds = URL.hostname, URL.port, None

    def __exit__(self, *_: object) -> None:
        pass


utils.RemoteOpenAIServer = RunningServer


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if isinstance(item, pytest.Function) and _asks_server(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _asks_server(test: pytest.Function) -> bool:
    if not hasattr(test.module, STARTER):
        return False
    return any("server" in name for name in test.fixturenames) or STARTER in inspect.getsource(test.function)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    Path(os.environ["KVBELT_UPSTREAM_RESULTS"]).write_text(json.dumps(outcomes, indent=1))
