"""What the launcher counts as ready."""

import json

import pytest

from kvbelt.ops.http_client import Reply
from kvbelt.ops.supervisor import readiness
from tests.ops.support import proxy_health, worker_health


@pytest.mark.parametrize(
    ("role", "status", "body", "state"),
    [
        ("prefill", 200, worker_health(), "ready"),
        ("prefill", 503, worker_health("loading"), "loading"),
        ("decode", 200, None, "ready"),  # a vLLM server's health has no body
        ("decode", 503, None, "waiting"),
        ("proxy", 200, proxy_health("ready", "ready"), "ready"),
        ("proxy", 200, proxy_health("ready", "lost"), "waiting"),
    ],
)
def test_a_proxy_is_ready_when_all_of_its_workers_are(role, status, body, state):
    """The launcher waits for every worker, not for the first."""
    raw = b"" if body is None else json.dumps(body).encode()
    assert readiness(role, Reply(status, body=raw)) == state


def test_a_message_of_another_version_is_named():
    """The state names the missing field."""
    body = worker_health()
    del body["engine_id"]
    assert "`engine_id`" in readiness("prefill", Reply(200, body=json.dumps(body).encode()))
