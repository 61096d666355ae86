"""``kvbelt doctor`` before a start: files, ports, model, machine."""

import asyncio
import json
import socket
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import msgspec
import pytest
import yaml

from kvbelt.channels.ucx_tls import ucx_tls_problem
from kvbelt.cli import main
from kvbelt.ops.doctor.checks.preflight import diagnose
from kvbelt.ops.doctor.finding import Finding, Severity
from kvbelt.ops.doctor.nixl_measurement import NixlMeasurement
from kvbelt.ops.doctor.preflight import Fit, Preflight, PreflightOptions, inspect
from kvbelt.ops.topology import Topology
from kvbelt.wire.about import TransportChoice

SENDER = {
    "enable_pd": True, "transfer_channel": "nixl", "pd_role": "sender", "pd_proxy_host": "127.0.0.1",
    "pd_proxy_port": 7500, "pd_buffer_size": 1 << 30,
}  # fmt: skip
RECEIVER = {
    "enable_pd": True, "transfer_channel": "nixl", "pd_role": "receiver", "pd_peer_host": "127.0.0.1",
    "pd_peer_init_port": 17300, "pd_peer_alloc_port": 17400, "pd_buffer_size": 1 << 30,
}  # fmt: skip


@pytest.fixture
def seen(tmp_path: Path):
    """Run the preflight on files with these contents."""

    def look_at(*contents, **options) -> Preflight:
        files = []
        for number, content in enumerate(contents):
            files.append(tmp_path / f"{number}.yaml")
            files[-1].write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return asyncio.run(inspect(PreflightOptions(files=files, measure=False, device="cpu", **options)))

    return look_at


def wrong(before: Preflight) -> dict[str, Finding]:
    """Findings that are not notes, by name."""
    return {one.name: one for one in diagnose(before) if one.severity is not Severity.NOTE}


def test_a_pair_of_files_that_fit_has_notes_only(seen, monkeypatch) -> None:
    """Files as ``kvbelt up 1p1d`` writes them are right."""
    monkeypatch.delenv("UCX_TLS", raising=False)
    assert wrong(seen(SENDER, RECEIVER)) == {}


def test_a_topology_that_the_machine_cannot_hold_is_named(seen) -> None:
    """Cores and memory are counted, as ``kvbelt up`` counts them."""
    crowd = seen(topology=Topology(800, 1600))
    assert crowd.fit is not None
    found = wrong(crowd)
    assert found["too_little_memory"].severity is Severity.ERROR
    assert found["too_few_cores"].severity is Severity.WARNING
    assert "2400 workers" in found["too_few_cores"].what
    fits = replace(crowd, topology=Topology(1, 1), fit=Fit(2, 2))
    assert not {"too_little_memory", "too_few_cores"} & wrong(fits).keys()
    short = wrong(replace(fits, fit=Fit(2, 2, short="with full KV memory …", crowded="2 workers share 1 CPU core")))
    assert short["too_little_memory"].severity is Severity.WARNING
    assert "too_few_cores" not in short


def test_a_buffer_on_a_gpu_that_is_not_there_is_named(seen) -> None:
    """The file that wants it is named."""
    found = wrong(seen(SENDER, {**RECEIVER, "pd_buffer_device": "cuda"}))["buffer_device"]
    assert found.evidence[0].endswith("1.yaml")
    assert "pd_buffer_device: cpu" in found.change


def test_keys_without_an_effect_here_are_noted(seen) -> None:
    """The guide's prefill file has local_cpu, which the embedded engine does not use."""
    notes = {one.name: one for one in diagnose(seen({**SENDER, "local_cpu": True}, RECEIVER))}
    assert notes["host_memory"].severity is Severity.NOTE
    assert "host_memory" not in {one.name for one in diagnose(seen({**SENDER, "local_cpu": False}, RECEIVER))}


def test_what_is_not_installed_has_no_needs(seen, monkeypatch) -> None:
    """Run from a folder on the path, it compares no requirements."""

    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert "packages" not in wrong(seen(SENDER, RECEIVER))


def test_a_file_that_cannot_be_used_is_quoted_with_its_remedy(seen) -> None:
    """The evidence is the worker's own error."""
    found = wrong(seen("enable_pd: True\npd_bufer_size: 5\n"))["bad_file"]
    assert "did you mean 'pd_buffer_size'" in found.evidence[0]


def test_files_that_contradict_each_other(seen) -> None:
    """Two channels, a port used twice and two proxies each have a finding."""
    mooncake = {**RECEIVER, "transfer_channel": "mooncake"}
    found = wrong(seen(SENDER, {**SENDER, "pd_proxy_port": 7501}, mooncake, {**RECEIVER, "pd_peer_init_port": 17301}))
    assert {"files_differ", "ports_clash", "proxies_differ"} <= found.keys()
    assert "transfer_channel" in found["files_differ"].what
    assert "17400" in found["ports_clash"].what


def test_files_of_one_side_only(seen) -> None:
    """A transfer needs both sides."""
    assert "receiver" in wrong(seen(SENDER, SENDER))["one_side"].what


@pytest.mark.parametrize("key", ["pd_peer_init_port", "pd_peer_alloc_port", "pd_peer_liveness_port"])
def test_a_port_that_is_taken_is_named_with_its_owner(seen, key) -> None:
    """Each receiver's port is tried before a model is loaded for nothing."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        found = wrong(seen({**RECEIVER, key: number}))["port_taken"]
    assert str(number) in found.what
    assert key in found.what
    assert "ss -ltnp" in found.change


def test_a_topology_with_many_more_prefill_workers(seen) -> None:
    """The seed's third anti-pattern is a warning."""
    found = wrong(seen(topology=Topology(5, 2)))
    assert found["ratio"].severity is Severity.WARNING
    assert "3p4d" in found["ratio"].change


def test_kvbelt_up_warns_of_such_a_topology(capsys) -> None:
    """Kvbelt up warns before it loads a model."""
    assert main(["up", "5p1d", "--auto-ports", "--model", "/nowhere"]) == 2
    said = capsys.readouterr().err
    assert "5 prefill workers feed 1 decode worker" in said
    assert "such as 3p3d" in said
    assert main(["up", "2p1d", "--model", "/nowhere"]) == 2
    assert "prefill workers feed" not in capsys.readouterr().err


def test_a_buffer_is_reckoned_against_the_model(seen, tmp_path: Path) -> None:
    """config.json suffices: Llama-3.1-8B takes 128 KiB per token in bfloat16."""
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
              "max_position_embeddings": 131072, "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    before = seen(RECEIVER, model=tmp_path, dtype="bfloat16", max_model_len=16384)
    assert before.model.bytes_per_token == 131072
    found = wrong(before)["buffer_small"]
    assert "0.5 prompts of 16,384 tokens" in found.what
    assert "pd_buffer_size: 4294967296" in found.change
    started = wrong(seen(topology=Topology(1, 1), model=tmp_path, dtype="bfloat16", max_model_len=16384))[
        "buffer_small"
    ]
    assert started.change.startswith("--buffer-gb 4,")


@pytest.mark.parametrize(
    ("tls", "device", "wrong"),
    [
        (None, "cuda", False), ("", "cuda", False), ("all", "cuda", False), ("cuda_ipc,cuda_copy,tcp", "cuda", False),
        ("tcp", "cuda", True), ("tcp,cuda_copy", "cuda:1", True), ("^cuda_ipc", "cuda", True), ("^tcp", "cuda", False),
        ("tcp", "cpu", True), ("tcp,cma", "cpu", False), ("cuda_ipc,cuda_copy,tcp", "cpu", True),
        ("rc,sm", "cpu", False),
    ],
)  # fmt: skip
def test_settings_of_ucx(tls: str | None, device: str, wrong: bool) -> None:
    """Some settings exclude the fast transport within a host."""
    assert (ucx_tls_problem(tls, device) is not None) is wrong


def test_what_was_measured_says_when_ucx_fell_back(seen, monkeypatch) -> None:
    """No setting is wrong, but UCX uses TCP."""
    monkeypatch.delenv("UCX_TLS", raising=False)
    measured = NixlMeasurement(
        device="cpu",
        num_bytes=8 << 20,
        write_gb_per_second=0.9,
        read_gb_per_second=0.8,
        backends=["UCX"],
        plugins=["UCX", "POSIX"],
        transports=[TransportChoice("intra-node", "write", "host", "tcp/eth0")],
    )
    before = replace(seen(), measured=measured)
    assert "tcp/eth0" in " ".join(wrong(before)["tcp_fallback"].evidence)
    fast = msgspec.structs.replace(measured, transports=[TransportChoice("intra-node", "write", "host", "cma/memory")])
    assert wrong(replace(before, measured=fast)) == {}
    said = next(one for one in diagnose(replace(before, measured=fast)) if one.name == "nixl")
    assert "WRITE 0.9 GB/s, READ 0.8 GB/s" in said.what
    assert "plugins: UCX, POSIX" in said.evidence[3]


def test_a_carrier_that_moves_nothing_is_an_error(seen) -> None:
    """The evidence is the library's own error."""
    found = wrong(replace(seen(), measured=NixlMeasurement(device="cpu", error="nixl could not start")))["nixl"]
    assert found.severity is Severity.ERROR
    assert found.evidence == ("nixl could not start",)
