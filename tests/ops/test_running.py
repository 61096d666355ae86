"""Which deployments run."""

import os
import subprocess

import pytest

from kvbelt.ops.running import RunningDeployment, RunningWorker, announced, deployment_at, running_deployments


@pytest.fixture
def deployment(tmp_path, monkeypatch):
    """One of this process."""
    monkeypatch.setenv("KVBELT_CACHE", str(tmp_path))
    (tmp_path / "control").touch()
    return RunningDeployment(
        pid=os.getpid(),
        url="http://127.0.0.1:9100",
        topology="1p1d",
        model="demo",
        started=0.0,
        admin_key_file="admin.key",
        control=str(tmp_path / "control"),
        processes=(RunningWorker("decode-0", "decode", "127.0.0.1:7200"),),
    )


def test_a_deployment_is_found_while_it_runs(deployment):
    """By its URL, and its workers by name or address."""
    with announced(deployment):
        assert running_deployments() == [deployment]
        found = deployment_at("http://127.0.0.1:9100/")
        assert found == deployment
        assert found.named("decode-0") == found.named("127.0.0.1:7200")
    assert running_deployments() == []


def test_a_dead_launcher_is_not_counted(deployment, tmp_path):
    """A file that kill -9 has left behind is removed by the next reader."""
    with subprocess.Popen(["true"]) as dead:
        pass
    left = RunningDeployment(
        **{name: getattr(deployment, name) for name in deployment.__struct_fields__} | {"pid": dead.pid}
    )
    with announced(left):
        assert running_deployments() == []
        assert list((tmp_path / "running").iterdir()) == []
