"""vLLM servers in a deployment."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from kvbelt.errors import StartError
from kvbelt.ops import up
from kvbelt.ops.extras import require_engine, require_vllm_of
from kvbelt.ops.ports import seed_ports
from kvbelt.ops.processes import DeploymentSpec, process_specs, write_configs, write_keys
from kvbelt.ops.topology import Topology
from kvbelt.ops.vllm_server import vllm_env
from kvbelt.vllm.settings import load_settings


def planned(tmp_path: Path, topology: str):
    """The processes of a deployment of vLLM servers on CPU."""
    spec = DeploymentSpec(
        Topology.parse(topology),
        tmp_path / "model",
        engine="vllm",
        device="cpu",
        threads=1,
        worker_args=("--enforce-eager",),
    )
    ports = seed_ports(spec.topology)
    keys = write_keys(spec, tmp_path)
    return process_specs(spec, ports, write_configs(spec, ports, tmp_path, keys), keys)


def test_servers_have_their_roles(tmp_path: Path) -> None:
    """The connector's role is the worker's, and its file is one that the connector reads."""
    prefill, decode, proxy = planned(tmp_path, "1p1d")
    for process, kv_role, role in ((prefill, "kv_producer", "prefill"), (decode, "kv_consumer", "decode")):
        transfer = json.loads(process.argv[process.argv.index("--kv-transfer-config") + 1])
        assert transfer["kv_role"] == kv_role
        assert process.argv[-1] == "--enforce-eager"
        settings = load_settings(kv_role, {}, "cpu", process.env)
        assert settings.role == role
        assert settings.keys is not None
        assert settings.keys.trusted[settings.keys.own.public] == process.name
    assert (settings.init_ports, settings.alloc_ports) == ((7300,), (7400,))
    assert "vllm" not in " ".join(proxy.argv)


def test_an_aggregated_server_has_no_connector(tmp_path: Path) -> None:
    """It is a plain vLLM server."""
    server, _ = planned(tmp_path, "0p1d")
    assert "--kv-transfer-config" not in server.argv


def test_the_workers_key_is_on_no_command_line(tmp_path: Path) -> None:
    """Every user of the machine can read those."""
    spec = DeploymentSpec(
        Topology(1, 1),
        tmp_path,
        engine="vllm",
        device="cpu",
        worker_api_key="s3cret",
        proxy_args=("--worker-api-key-file", "f"),
    )
    prefill, decode, proxy = process_specs(spec, seed_ports(spec.topology), {})
    assert prefill.env["VLLM_API_KEY"] == decode.env["VLLM_API_KEY"] == "s3cret"
    assert "VLLM_API_KEY" not in proxy.env
    assert not any("s3cret" in argument for one in (prefill, decode, proxy) for argument in one.argv)


def test_cores_are_dealt_out() -> None:
    """Each server is bound to its own cores as far as there are enough."""
    binds = [
        vllm_env(config=None, device="cpu", threads=2, place=place, cores=6, kv_gb=1.5)["VLLM_CPU_OMP_THREADS_BIND"]
        for place in range(4)
    ]
    assert binds == ["0-1", "2-3", "4-5", "0-1"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_nothing_is_started() -> None:
    """One line says what is missing, and in which environment."""
    with pytest.raises(StartError, match=r"--engine vllm needs vLLM"):
        require_engine("kvbelt up --engine vllm", "vllm")


def another_python(folder: Path, *modules: str) -> Path:
    """An interpreter whose environment has these modules as well."""
    for module in modules:
        (folder / "site" / module).mkdir(parents=True)
        (folder / "site" / module / "__init__.py").touch()
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}/site:$PYTHONPATH" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_another_environments_vllm_is_used(tmp_path: Path) -> None:
    """Its Python runs the servers, as if its environment were active; the proxy runs here."""
    python = another_python(tmp_path, "vllm", "nixl")
    assert require_vllm_of(python) == importlib.metadata.version("torch")
    spec = DeploymentSpec(Topology(1, 1), tmp_path, engine="vllm", device="cpu", vllm_python=python)
    prefill, decode, proxy = process_specs(spec, seed_ports(spec.topology), {})
    for server in (prefill, decode):
        assert server.argv[:2] == (str(python), "-m")
        assert server.env["PATH"] == f"{tmp_path}:{os.environ['PATH']}"
    assert str(tmp_path) not in proxy.argv[0]
    assert "PATH" not in proxy.env


def test_an_environment_without_what_servers_need_is_refused(tmp_path: Path) -> None:
    """One line names its Python, what is missing, and the command that installs it."""
    (tmp_path / "other").mkdir()
    for python, said in (
        (tmp_path / "nowhere", "cannot be run: No such file"),
        (Path("/bin/ls"), r"says .* instead of what it has"),
        (another_python(tmp_path / "other"), r"\(vllm\b.* -m pip install 'kvbelt\[vllm\]'"),
    ):
        with pytest.raises(StartError, match=said) as refused:
            require_vllm_of(python)
        assert str(python) in str(refused.value)
        assert "\n" not in str(refused.value)


def test_embedded_workers_take_no_other_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flag is refused without ``--engine vllm``."""
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    assert up.run(parser.parse_args(["1p1d", "--vllm-python", str(tmp_path)])) == 2
    assert "--vllm-python is for --engine vllm" in capsys.readouterr().err
