"""``kvbelt doctor`` on real deployments, and each command of the specification's list of six."""

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvbelt.ops.deployment import RunningProcess, SyncDeployment
from tests.e2e.asking import get, until
from tests.e2e.prompts import long_text
from tests.e2e.stopping import stopped
from tests.programs import need_program

pytestmark = pytest.mark.e2e

SHORT = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 4}


def doctor(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Its exit status and findings, in order."""
    command = [sys.executable, "-m", "kvbelt", "doctor", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout, done.stderr
    said = json.loads(done.stdout)
    assert said["status"] == done.returncode
    return done.returncode, said["findings"]


def wrong(findings: list[dict[str, Any]]) -> list[str]:
    """Names of the findings that are no notes, in order."""
    return [one["name"] for one in findings if one["severity"] != "note"]


def shell(command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """As an operator types it."""
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=timeout, check=False)


def test_a_deployment_that_is_well(two_p_two_d: SyncDeployment) -> None:
    """No error; every pair was measured by a prompt of the doctor's own, and UCX's road is named."""

    def well() -> list[dict[str, Any]] | None:
        status, findings = doctor("--url", two_p_two_d.url, "--seconds", "1")
        if status != 0:  # a machine that does much else may be slow enough for a warning, and the doctor is right then
            sys.stdout.write(json.dumps(findings, indent=1))
        return findings if status == 0 else None

    findings = until(well, what="nothing to complain of")
    links = next(one for one in findings if one["name"] == "links")
    assert links["what"] == "4 of 4 pairs carry KV"
    assert all("GB/s" in line and "probe" in line for line in links["evidence"])
    about = get(two_p_two_d.process("prefill-0").url + "/kvbelt/about").json()
    writes = [road for road in about["roads"] if road["operation"] == "write"]
    assert writes
    assert all(road["transport"].startswith("cma/") for road in writes)
    assert {link["writes"] > 0 for link in about["links"]} == {True}


def failed_transfers(deployment: SyncDeployment) -> float:
    """As the proxy counts them."""
    text = httpx.get(deployment.url + "/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("kvbelt_proxy_transfer_failures_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_every_link_of_what_runs_is_measured(one_p_one_d: SyncDeployment) -> None:
    """WRITE, READ and latency, by the workers themselves; nothing fails by it, and what follows is answered."""
    before = failed_transfers(one_p_one_d)
    status, findings = doctor("--url", one_p_one_d.url, "--seconds", "1")
    assert status == 0, findings
    measured = next(one for one in findings if one["name"] == "links_measured")
    assert measured["what"].startswith("1 of 1 links measured: WRITE ")
    (line,) = measured["evidence"]
    assert re.search(r"WRITE [\d.]+ GB/s, READ [\d.]+ GB/s .*4 KiB: WRITE \d+ µs, READ \d+ µs$", line), line
    assert failed_transfers(one_p_one_d) == before
    for process in ("prefill-0", "decode-0"):
        belt = httpx.get(one_p_one_d.process(process).url + "/health").json()["belt"]
        assert not belt["sends"]
        assert not belt["staging_bytes_used"]
        assert not belt["bytes_reserved"] + belt["bytes_quarantined"]
    answer = httpx.post(one_p_one_d.url + "/v1/completions", json=SHORT, timeout=60)
    assert answer.headers["x-kvbelt-path"] == "first-token"


def test_what_mooncake_does_not_do_is_said(one_p_one_d_mooncake: SyncDeployment) -> None:
    """No READ; WRITE is measured as any other."""
    status, findings = doctor("--url", one_p_one_d_mooncake.url, "--seconds", "1")
    assert status == 0, findings
    (line,) = next(one for one in findings if one["name"] == "links_measured")["evidence"]
    assert "WRITE" in line
    assert line.endswith("READ not measured: kvbelt does not read with mooncake")


def test_before_a_start_the_running_deployments_ports_are_taken(two_p_two_d: SyncDeployment) -> None:
    """Each with the process that would want it."""
    status, findings = doctor("--no-measure", "--port", str(two_p_two_d.ports.proxy), "1p1d")
    taken = [one for one in findings if one["name"] == "port_taken"]
    assert status == 2
    assert any(f"port {two_p_two_d.ports.proxy} for the proxy" in one["what"] for one in taken)


def test_a_stopped_worker_is_the_first_finding(two_p_two_d: SyncDeployment) -> None:
    """Whatever else its absence does; afterwards everything is well again."""
    decode = two_p_two_d.process("decode-1")
    with stopped(decode):
        status, findings = doctor("--url", two_p_two_d.url, "--seconds", "1", "--no-probe")
    assert status == 2
    assert findings[0]["name"] == "dead_worker"
    assert str(decode.port) in findings[0]["what"]
    until(lambda: _all_ready(two_p_two_d), what="every worker ready again")


def test_overloaded_prefill_is_the_first_finding(two_p_two_d: SyncDeployment) -> None:
    """More long prompts at once, all the time, than two prefill workers compute in ten seconds."""
    numbers, seen = itertools.count(), threading.Event()

    def ask() -> None:
        while not seen.is_set():
            body = {"prompt": long_text(900, next(numbers)), "max_tokens": 1}
            with contextlib.suppress(httpx.ReadTimeout):  # the client leaves, and with it what it asked for
                httpx.post(two_p_two_d.url + "/v1/completions", json=body, timeout=6)

    with ThreadPoolExecutor(28) as pool:
        asking = [pool.submit(ask) for _ in range(28)]
        try:
            until(lambda: _waiting(two_p_two_d.process("prefill-0")) > 10, what="a queue")
            _, findings = doctor("--url", two_p_two_d.url, "--seconds", "1", "--no-probe")
        finally:
            seen.set()
    for one in asking:
        one.result()
    assert wrong(findings)[0] == "prefill_overloaded", findings
    until(lambda: not _waiting(two_p_two_d.process("prefill-0")), what="an empty queue")


def _waiting(process: RunningProcess) -> int:
    return get(process.url + "/health").json()["load"]["waiting"]


def _all_ready(deployment: SyncDeployment) -> bool:
    said = get(deployment.url + "/health").json()
    return all(worker["state"] == "ready" and not worker["warming"] for worker in said["workers"])


# The six commands, with this deployment's ports


def test_command_1_ttft_in_the_proxys_log(two_p_two_d: SyncDeployment, two_p_two_d_logs: Path) -> None:
    """``tail -f proxy.log | grep TTFT``: a line a request."""
    httpx.post(two_p_two_d.url + "/v1/completions", json=SHORT, headers={"x-request-id": "seed-1"}, timeout=60)
    watching = f"timeout 1 tail -n +1 -f {two_p_two_d_logs}/proxy.log | grep TTFT"
    until(lambda: "seed-1" in shell(watching).stdout, what="the request's line")


def test_command_2_nvidia_smi() -> None:
    """Where there is a GPU; the doctor says ``no GPU`` where there is none."""
    if shutil.which("nvidia-smi") is None:
        _, findings = doctor("--no-measure")
        assert [one["what"] for one in findings if one["name"] == "no_gpu"] == ["no GPU"]
        return
    assert "NVIDIA-SMI" in shell("timeout 5 watch -n 1 -t nvidia-smi | head -5; nvidia-smi").stdout


def test_command_3_ucx_info() -> None:
    """UCX's own list of transports; those of CUDA stand in it where there is a GPU."""
    need_program("ucx_info")
    assert "Transport: cma" in shell("ucx_info -d").stdout
    found = shell("ucx_info -d | grep -E 'cuda_ipc|cuda_copy'")
    assert bool(found.stdout) == (found.returncode == 0)


def test_command_4_nixl_reaches_another_process() -> None:
    """``nixl.get_backend`` does not exist; ``kvbelt doctor`` shows the backend, by moving memory with it."""
    missing = shell(f"{sys.executable} -c \"import nixl; print(nixl.get_backend('UCX'))\"")
    assert missing.returncode != 0
    status, findings = doctor("--device", "cpu")
    nixl = next(one for one in findings if one["name"] == "nixl")
    assert status < 2, findings
    assert "WRITE" in nixl["what"]
    assert any("backends in use: UCX" in line for line in nixl["evidence"])


def test_command_5_transfers_in_the_metrics(two_p_two_d: SyncDeployment) -> None:
    """``curl -s :9100/metrics | grep nixl_transfer``."""
    need_program("curl")
    httpx.post(two_p_two_d.url + "/v1/completions", json=SHORT, timeout=60)
    command = f"curl -s http://localhost:{two_p_two_d.ports.proxy}/metrics | grep nixl_transfer"
    until(lambda: "nixl_transfer_total" in shell(command).stdout, what="transfers in the metrics")


def test_command_6_the_health_of_every_node(two_p_two_d: SyncDeployment) -> None:
    """The loop over the ports, through jq."""
    need_program("jq")
    ports = two_p_two_d.ports
    numbers = " ".join(map(str, (*ports.prefill, *ports.decode)))
    found = shell(f"for port in {numbers}; do curl -s http://localhost:$port/health | jq .; done")
    assert found.stdout.count('"status": "ok"') == 4
    assert not found.stderr
