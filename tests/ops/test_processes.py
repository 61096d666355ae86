"""From a specification to files and command lines."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvbelt.cli import build_parser, main
from kvbelt.errors import StartError
from kvbelt.ops import processes
from kvbelt.ops.ports import Ports, seed_ports
from kvbelt.ops.processes import (
    DeploymentSpec,
    process_specs,
    require_fast_gpus,
    resolve_device,
    threads_per_worker,
    write_configs,
    write_keys,
)
from kvbelt.ops.topology import Topology
from kvbelt.security.keys import load_keys
from kvbelt.settings import belt_for, channel_of, keys_of, load_belt_file
from kvbelt.wire.health import Role


@pytest.fixture
def spec():
    """2p2d with every setting given."""
    return DeploymentSpec(
        topology=Topology(2, 2),
        model=Path("model"),
        device="cpu",
        threads=3,
        kv_gb=0.5,
        buffer_gb=0.25,
        max_model_len=512,
    )


def scattered(topology):
    """Ports that are not consecutive."""
    numbers = iter(range(20_000, 30_000, 7))

    def take(count):
        return tuple(next(numbers) for _ in range(count))

    return Ports(next(numbers), next(numbers), take(topology.prefill), *(take(topology.decode) for _ in range(3)))


def test_files_are_what_workers_read(spec, tmp_path):
    """Each file passes the worker's own strict parser and has its role, ports and buffer."""
    files = write_configs(spec, seed_ports(spec.topology), tmp_path)
    sender = belt_for(Role.PREFILL, files["prefill-1"])
    receiver = belt_for(Role.DECODE, files["decode-1"])
    assert (sender.pd_role, sender.pd_proxy_port, sender.pd_buffer_size) == ("sender", 7500, 1 << 28)
    assert (receiver.pd_proxy_host, receiver.pd_proxy_port) == (sender.pd_proxy_host, 7500)
    assert (receiver.pd_role, receiver.pd_peer_init_port, receiver.pd_peer_alloc_port) == ("receiver", 7301, 7401)


def test_every_worker_gets_the_channel(spec, tmp_path):
    """Sender and receiver get the same channel."""
    files = write_configs(replace(spec, transfer_channel="mooncake"), seed_ports(spec.topology), tmp_path)
    for name, role in (("prefill-0", Role.PREFILL), ("decode-1", Role.DECODE)):
        assert channel_of(belt_for(role, files[name])).name == "mooncake"


def test_every_process_has_a_key_of_its_own_and_trusts_all(spec, tmp_path):
    """Files and the proxy's command line name the keys; a worker's own parser finds the proxy's."""
    ports, keys = seed_ports(spec.topology), write_keys(spec, tmp_path)
    files = write_configs(spec, ports, tmp_path, keys)
    loaded = {name: keys_of(load_belt_file(file), name) for name, file in files.items()}
    assert len({own.own.public for own in loaded.values()}) == 4
    names = {"proxy", "prefill-0", "prefill-1", "decode-0", "decode-1"}
    assert all(set(own.trusted.values()) == names for own in loaded.values())
    proxy = process_specs(spec, ports, files, keys)[-1]
    args = build_parser().parse_args(proxy.argv[proxy.argv.index("proxy") :])
    assert load_keys(args.key_file, args.trusted_keys_dir).own.public == loaded["prefill-0"].public_key_of("proxy")


def test_aggregated_server_has_no_belt(spec, tmp_path):
    """0p1d is a worker of both roles without a file, and a proxy without prefill workers."""
    aggregated = processes.DeploymentSpec(topology=Topology(0, 1), model=Path("model"), device="cpu")
    files = write_configs(aggregated, seed_ports(aggregated.topology), tmp_path)
    worker, proxy = process_specs(aggregated, seed_ports(aggregated.topology), files)
    assert files == {}
    assert (worker.name, worker.role, "--config" in worker.argv) == ("both-0", "both", False)
    assert "--prefill-port" not in proxy.argv


@pytest.mark.parametrize("counts", [(1, 1), (2, 3), (0, 1)])
@pytest.mark.parametrize("ports_of", [seed_ports, scattered])
def test_command_line_understands_what_is_started(spec, tmp_path, counts, ports_of):
    """Every command that is started is one that kvbelt's own command line accepts."""
    topology = Topology(*counts)
    ports = ports_of(topology)
    wanted = DeploymentSpec(
        topology=topology, model=Path("model"), device="cpu", kv_gb=0.5, max_model_len=512, prefix_caching=False
    )
    for process in process_specs(wanted, ports, write_configs(wanted, ports, tmp_path)):
        args = build_parser().parse_args(
            process.argv[process.argv.index("worker" if "-" in process.name else "proxy") :]
        )
        assert args.port == process.port


def test_workers_listen_and_are_reached_where_their_place_is(spec, tmp_path):
    """A place's host, command prefix and environment apply to its worker; the proxy gets a host and port per worker."""
    inside = processes.Place("198.18.0.9", ("ip", "netns", "exec", "n"), {"UCX_TLS": "tcp"})
    placed = replace(spec, places={"decode-1": inside}, notify_host="198.18.0.1")
    ports = seed_ports(spec.topology)
    files = write_configs(placed, ports, tmp_path, write_keys(placed, tmp_path))
    worker, proxy = process_specs(placed, ports, files)[3:]
    args = build_parser().parse_args(worker.argv[worker.argv.index("worker") :])
    assert worker.argv[:4] == inside.enter
    assert (args.host, worker.host, worker.env["UCX_TLS"]) == ("198.18.0.9", "198.18.0.9", "tcp")
    assert load_belt_file(files["decode-1"]).pd_peer_host == "198.18.0.9"
    assert load_belt_file(files["prefill-0"]).pd_proxy_host == "198.18.0.1"
    args = build_parser().parse_args(proxy.argv[proxy.argv.index("proxy") :])
    assert (args.decode_host, args.decode_port) == (["127.0.0.1", "198.18.0.9"], [7200, 7201])
    assert (args.notify_host, args.prefill_host) == ("198.18.0.1", ["127.0.0.1"])


def test_further_keys_are_trusted_by_all(spec, tmp_path):
    """Every process also trusts the extra keys."""
    keys = write_keys(replace(spec, extra_keys=("guest",)), tmp_path)
    assert "guest" in load_keys(keys.secret("guest"), keys.trusted).trusted.values()


def test_prefix_caching_is_switched_off_in_the_engines_own_words(spec, tmp_path):
    """Kvbelt's workers and vLLM's servers have different flags for it; where it stays on there is no flag."""
    for engine, flag in (("embedded", "--no-prefix-caching"), ("vllm", "--no-enable-prefix-caching")):
        ports = seed_ports(spec.topology)
        for caching in (True, False):
            wanted = replace(spec, engine=engine, prefix_caching=caching)
            workers = process_specs(wanted, ports, write_configs(wanted, ports, tmp_path))[:-1]
            assert [flag in worker.argv for worker in workers] == [not caching] * len(workers)


def test_role_is_on_the_command_line(spec, tmp_path):
    """Ps shows ``kvbelt worker --role prefill``."""
    ports = seed_ports(spec.topology)
    lines = [" ".join(process.argv) for process in process_specs(spec, ports, write_configs(spec, ports, tmp_path))]
    assert "kvbelt worker --role prefill" in lines[0]
    assert "kvbelt worker --role decode" in lines[2]
    assert "kvbelt proxy" in lines[4]


def test_consecutive_ports_are_given_in_the_seeds_way(spec, tmp_path):
    """Consecutive ports are passed as the first port and a count, others as a list."""
    seeds = process_specs(spec, seed_ports(spec.topology), {})[-1].argv
    assert seeds[seeds.index("--prefill-port") + 1] == "7100"
    assert seeds[seeds.index("--num-prefillers") + 1] == "2"
    ports = scattered(spec.topology)
    listed = process_specs(spec, ports, {})[-1].argv
    assert listed[listed.index("--decode-port") + 1] == f"{ports.decode[0]},{ports.decode[1]}"


def test_threads_are_shared_out(monkeypatch, spec):
    """Threads per worker are cores divided by workers, at least one, for torch and OpenMP alike."""
    monkeypatch.setattr(processes, "cpu_cores", lambda: 8)
    assert [threads_per_worker(Topology(*counts)) for counts in [(1, 1), (2, 2), (1, 2), (20, 20)]] == [4, 2, 2, 1]
    worker = process_specs(spec, seed_ports(spec.topology), {})[0]
    assert worker.env["OMP_NUM_THREADS"] == "3"
    assert worker.argv[worker.argv.index("--threads") + 1] == "3"


def test_gpus_are_dealt_out_in_turn(monkeypatch):
    """Worker i gets GPU i, modulo the number of GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    spec = DeploymentSpec(topology=Topology(1, 2), model=Path("model"), device="cuda")
    workers = process_specs(spec, seed_ports(spec.topology), {})[:-1]
    assert [worker.env["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["4", "6", "4"]
    assert all("cuda_ipc" in worker.env["UCX_TLS"] for worker in workers)


@pytest.mark.parametrize(
    ("ucx_tls", "changes", "refused"),
    [
        (None, {}, False),
        ("all", {}, False),
        ("cuda_ipc,cuda_copy,tcp", {}, False),
        ("tcp", {}, True),
        ("tcp,cuda_copy", {}, True),
        ("^cuda_ipc", {}, True),
        ("tcp", {"allow_slow_gpus": True}, False),
        ("tcp", {"device": "cpu"}, False),
        ("tcp", {"buffer_device": "cpu"}, False),
        ("tcp", {"transfer_channel": "mooncake"}, False),
        ("tcp", {"topology": Topology(0, 1)}, False),
    ],
)
def test_gpus_that_could_not_reach_each_other_are_not_started(ucx_tls, changes, refused):
    """With NIXL and buffers in GPU memory, the error names the setting and how to start anyway."""
    spec = DeploymentSpec(**{"topology": Topology(1, 1), "model": Path("model"), "device": "cuda"} | changes)
    if not refused:
        require_fast_gpus(spec, ucx_tls)
        return
    with pytest.raises(StartError, match=r"cuda_ipc is not in it.*export UCX_TLS=cuda_ipc.*--allow-slow-gpus"):
        require_fast_gpus(spec, ucx_tls)


def test_up_refuses_gpus_that_could_not_reach_each_other(monkeypatch, tmp_path, capsys):
    """Kvbelt up refuses such GPUs before anything starts, with status 2."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    (tmp_path / "model").mkdir()
    arguments = ["up", "1p1d", "--auto-ports", "--device", "cuda", "--model", str(tmp_path / "model")]
    monkeypatch.setattr("kvbelt.ops.up.prepare_model", lambda name, console: Path(name))
    monkeypatch.setattr("kvbelt.ops.up.require_device", lambda *given: None)
    assert main(arguments) == 2
    assert "--allow-slow-gpus" in capsys.readouterr().err


def test_no_gpu_means_cpu(monkeypatch):
    """``auto`` is the CPU where no GPU is usable; an explicit device is kept."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cuda") == "cuda"
