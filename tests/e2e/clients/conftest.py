"""Real clients against a deployment: ``scripts/test-clients`` runs them, in an environment that has no kvbelt.

``KVBELT_CLIENTS_UP`` is the command that starts the deployment and prints ``ready URL``. Models are small and say
nonsense: the tests are about what the clients parse.
"""

import json
import os
import shlex
import signal
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest

UP = os.environ.get("KVBELT_CLIENTS_UP", "")
collect_ignore_glob = [] if UP else ["test_*.py"]


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Where a client's ``base_url`` points to."""
    with subprocess.Popen(shlex.split(UP), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("ready "), "the deployment did not start; its own words are above"
        yield first.split()[1] + "/v1"
        process.send_signal(signal.SIGTERM)


@pytest.fixture(scope="session")
def model(url: str) -> str:
    """The name of the deployment's model."""
    with urllib.request.urlopen(url + "/models", timeout=60) as answer:  # noqa: S310 -- ours
        return json.load(answer)["data"][0]["id"]
