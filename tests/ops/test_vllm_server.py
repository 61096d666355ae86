"""vLLM servers in a deployment: what is started, and that it is refused where vLLM is not."""

import importlib.util
import json
from pathlib import Path

import pytest

from kvbelt.errors import StartError
from kvbelt.ops.ports import seed_ports
from kvbelt.ops.processes import DeploymentSpec, plan, write_configs, write_keys
from kvbelt.ops.topology import Topology
from kvbelt.ops.vllm_server import require_vllm, vllm_env
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
    return plan(spec, ports, write_configs(spec, ports, tmp_path, keys), keys)


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


def test_cores_are_dealt_out() -> None:
    """Each server is bound to cores of its own as far as there are enough."""
    binds = [
        vllm_env(config=None, device="cpu", threads=2, place=place, cores=6, kv_gb=1.5)["VLLM_CPU_OMP_THREADS_BIND"]
        for place in range(4)
    ]
    assert binds == ["0-1", "2-3", "4-5", "0-1"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_nothing_is_started() -> None:
    """One line says what is missing, and where it is missing."""
    with pytest.raises(StartError, match=r"--engine vllm needs vLLM"):
        require_vllm()
