"""Which deployments run."""

import os
import subprocess

import msgspec
import pytest

from kvbelt.cli import main
from kvbelt.ops.proxy_client import ProxyClient
from kvbelt.ops.running import RunningDeployment, RunningWorker, announced, deployment_at, running_deployments
from kvbelt.security.admin_key import load_admin_key, write_admin_key
from tests.ops.served import serving


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
    with announced(msgspec.structs.replace(deployment, pid=dead.pid)):
        assert running_deployments() == []
        assert list((tmp_path / "running").iterdir()) == []


def test_every_command_finds_the_deployment_that_runs(deployment, tmp_path, capsys):
    """At whatever port; and a worker is drained by its name as well as by its address."""
    key = write_admin_key(tmp_path / "admin.key")
    with serving(decode=2, admin_key=load_admin_key(key)) as served:
        address = f"127.0.0.1:{served.deployment.decode[0].port}"
        process = RunningWorker("decode-0", "decode", address)
        runs = msgspec.structs.replace(deployment, url=served.url, admin_key_file=str(key), processes=(process,))
        with announced(runs):
            served.call(served.deployment.ask({"prompt": "hello", "max_tokens": 2}, request_id="asked"))
            commands = (["top", "--once"], ["why", "--list"], ["workers", "list"], ["doctor", "--seconds", "0.1"])
            for words in commands:
                main(words)
                said = capsys.readouterr().out
                assert address in said or served.url in said
            assert main(["workers", "drain", "decode-0"]) == 0
            assert ProxyClient(served.url).worker(address).standing == "draining"
            assert main(["workers", "undrain", "decode-0"]) == 0
            assert main(["workers", "drain", "decode-7"]) == 2
            assert "there are decode-0" in capsys.readouterr().err


def test_which_of_several_is_asked_must_be_said(deployment, capsys):
    """Unless one has the default address."""
    both = [msgspec.structs.replace(deployment, pid=pid, url=f"http://127.0.0.1:{pid}") for pid in (1, os.getpid())]
    with announced(both[0]), announced(both[1]):
        assert main(["top", "--once"]) == 2
        assert "2 deployments run, at http://127.0.0.1:" in capsys.readouterr().err
