"""``kvbelt doctor`` on real deployments, and each command of the specification's list of six."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvbelt.ops.deployment import SyncDeployment
from tests.e2e.asking import get, until
from tests.e2e.doctoring import doctor, wrong
from tests.e2e.stopping import stopped
from tests.programs import need_program

pytestmark = pytest.mark.e2e

SHORT = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 4}


def shell(command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command line in a shell."""
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=timeout, check=False)


def test_a_deployment_that_is_well(two_p_two_d: SyncDeployment) -> None:
    """There is nothing to complain of, every pair carries a trial prompt, and UCX's transport is named."""
    #: A machine that does much else is slow, and the doctor is right to say so.
    of_machine = {"cpu_full", "memory_full", "ttft_high", "levels_not_met", "prefill_workers", "late_transfers"}

    def well() -> list[dict[str, Any]] | None:
        _, findings = doctor("--url", two_p_two_d.url, "--seconds", "1")
        if not set(wrong(findings)) <= of_machine:
            sys.stdout.write(json.dumps(findings, indent=1))
            return None
        return findings

    findings = until(well, what="nothing to complain of")
    links = next(one for one in findings if one["name"] == "links")
    assert links["what"] == "4 of 4 pairs carry KV"
    assert all("GB/s" in line and "trial prompt" in line for line in links["evidence"])
    about = get(two_p_two_d.process("prefill-0").url + "/kvbelt/about").json()
    writes = [road for road in about["roads"] if road["operation"] == "write"]
    assert writes
    assert all(road["transport"].startswith("cma/") for road in writes)
    assert {link["writes"] > 0 for link in about["links"]} == {True}


def failed_transfers(deployment: SyncDeployment) -> float:
    """The failed transfers that the proxy has counted."""
    text = get(deployment.url + "/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("kvbelt_proxy_transfer_failures_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def measured_link(deployment: SyncDeployment) -> str:
    """The doctor's figures of the only link. A busy machine may give a warning, but never an error."""
    status, findings = doctor("--url", deployment.url, "--seconds", "1")
    assert status < 2, findings
    (line,) = next(one for one in findings if one["name"] == "links_measured")["evidence"]
    return str(line)


def test_every_link_of_what_runs_is_measured(one_p_one_d: SyncDeployment) -> None:
    """The workers measure WRITE, READ and latency. No transfer fails by it, and the next request is answered."""
    before = failed_transfers(one_p_one_d)
    both = r"WRITE [\d.e-]+ GB/s, READ [\d.e-]+ GB/s .*4 KiB: WRITE [\d,]+ µs, READ [\d,]+ µs$"
    until(lambda: re.search(both, measured_link(one_p_one_d)), what="both directions measured")
    assert failed_transfers(one_p_one_d) == before
    for process in ("prefill-0", "decode-0"):
        belt = get(one_p_one_d.process(process).url + "/health").json()["belt"]
        assert not belt["sends"]
        assert not belt["staging_bytes_used"]
        assert not belt["bytes_reserved"] + belt["bytes_quarantined"]
    answer = httpx.post(one_p_one_d.url + "/v1/completions", json=SHORT, timeout=60)
    assert answer.headers["x-kvbelt-path"] == "first-token"


def test_with_mooncake_a_link_is_measured_without_read(one_p_one_d_mooncake: SyncDeployment) -> None:
    """WRITE is measured as with any other channel, and the figures say that READ is not."""
    only_write = r"WRITE [\d.e-]+ GB/s .*READ not measured: kvbelt does not read with mooncake$"
    until(lambda: re.search(only_write, measured_link(one_p_one_d_mooncake)), what="WRITE measured")


def test_before_a_start_the_running_deployments_ports_are_taken(two_p_two_d: SyncDeployment) -> None:
    """Each taken port is named with the process that needs it."""
    status, findings = doctor("--no-measure", "--port", str(two_p_two_d.ports.proxy), "1p1d")
    taken = [one for one in findings if one["name"] == "port_taken"]
    assert status == 2
    assert any(f"port {two_p_two_d.ports.proxy} for the proxy" in one["what"] for one in taken)


def test_a_stopped_worker_is_the_first_finding(two_p_two_d: SyncDeployment) -> None:
    """Findings about its effects come later. After SIGCONT every worker is ready again."""
    decode = two_p_two_d.process("decode-1")
    with stopped(decode):
        status, findings = doctor("--url", two_p_two_d.url, "--seconds", "1", "--no-probe")
    assert status == 2
    assert findings[0]["name"] == "dead_worker"
    assert str(decode.port) in findings[0]["what"]
    until(lambda: _all_ready(two_p_two_d), what="every worker ready again")


def _all_ready(deployment: SyncDeployment) -> bool:
    said = get(deployment.url + "/health").json()
    return all(worker["state"] == "ready" and not worker["warming"] for worker in said["workers"])


# The six commands, with this deployment's ports


def test_command_1_ttft_in_the_proxys_log(two_p_two_d: SyncDeployment, two_p_two_d_logs: Path) -> None:
    """``tail -f proxy.log | grep TTFT`` shows a line for each request."""
    httpx.post(two_p_two_d.url + "/v1/completions", json=SHORT, headers={"x-request-id": "seed-1"}, timeout=60)
    watching = f"timeout 1 tail -n +1 -f {two_p_two_d_logs}/proxy.log | grep TTFT"
    until(lambda: "seed-1" in shell(watching).stdout, what="the request's line")


def test_command_2_nvidia_smi() -> None:
    """Without a GPU the doctor's finding is ``no GPU``."""
    if shutil.which("nvidia-smi") is None:
        _, findings = doctor("1p1d", "--no-measure")
        assert [one["what"] for one in findings if one["name"] == "no_gpu"] == ["no GPU"]
        return
    assert "NVIDIA-SMI" in shell("timeout 5 watch -n 1 -t nvidia-smi | head -5; nvidia-smi").stdout


def test_command_3_ucx_info() -> None:
    """UCX lists its transports; with a GPU also those of CUDA."""
    need_program("ucx_info")
    assert "Transport: cma" in shell("ucx_info -d").stdout
    found = shell("ucx_info -d | grep -E 'cuda_ipc|cuda_copy'")
    assert bool(found.stdout) == (found.returncode == 0)


def test_command_4_nixl_reaches_another_process() -> None:
    """``nixl.get_backend`` does not exist, so ``kvbelt doctor`` moves memory and shows the backend."""
    missing = shell(f"{sys.executable} -c \"import nixl; print(nixl.get_backend('UCX'))\"")
    assert missing.returncode != 0
    status, findings = doctor("--device", "cpu")
    nixl = next(one for one in findings if one["name"] == "nixl")
    assert status < 2, findings
    assert "WRITE" in nixl["what"]
    assert any("backends in use: UCX" in line for line in nixl["evidence"])


def test_command_5_transfers_in_the_metrics(two_p_two_d: SyncDeployment) -> None:
    """``curl -s :9100/metrics | grep nixl_transfer`` shows transfers."""
    need_program("curl")
    httpx.post(two_p_two_d.url + "/v1/completions", json=SHORT, timeout=60)
    command = f"curl -s http://localhost:{two_p_two_d.ports.proxy}/metrics | grep nixl_transfer"
    until(lambda: "nixl_transfer_total" in shell(command).stdout, what="transfers in the metrics")


def test_command_6_the_health_of_every_node(two_p_two_d: SyncDeployment) -> None:
    """A loop over the ports with jq shows every worker's health."""
    need_program("jq")
    ports = two_p_two_d.ports
    numbers = " ".join(map(str, (*ports.prefill, *ports.decode)))
    found = shell(f"for port in {numbers}; do curl -s http://localhost:$port/health | jq .; done")
    assert found.stdout.count('"status": "ok"') == 4
    assert not found.stderr
