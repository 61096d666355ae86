"""From a specification to files and command lines."""

from pathlib import Path

import pytest

from kvbelt.cli import build_parser
from kvbelt.ops import processes
from kvbelt.ops.ports import Ports, seed_ports
from kvbelt.ops.processes import DeploymentSpec, plan, resolve_device, threads_per_worker, write_configs, write_keys
from kvbelt.ops.topology import Topology
from kvbelt.security.keys import load_keys
from kvbelt.settings import Role, belt_for, keys_of, load_belt_file


@pytest.fixture
def spec():
    """2p2d with everything said."""
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
    """Each file passes the worker's own strict reading and says its role, ports and buffer."""
    files = write_configs(spec, seed_ports(spec.topology), tmp_path)
    sender = belt_for(Role.PREFILL, files["prefill-1"])
    receiver = belt_for(Role.DECODE, files["decode-1"])
    assert (sender.pd_role, sender.pd_proxy_port, sender.pd_buffer_size) == ("sender", 7500, 1 << 28)
    assert (receiver.pd_role, receiver.pd_peer_init_port, receiver.pd_peer_alloc_port) == ("receiver", 7301, 7401)


def test_every_process_has_a_key_of_its_own_and_trusts_all(spec, tmp_path):
    """Files and the proxy's command line name them; a worker's own reading finds the proxy's."""
    ports, keys = seed_ports(spec.topology), write_keys(spec, tmp_path)
    files = write_configs(spec, ports, tmp_path, keys)
    loaded = {name: keys_of(load_belt_file(file), name) for name, file in files.items()}
    assert len({own.own.public for own in loaded.values()}) == 4
    names = {"proxy", "prefill-0", "prefill-1", "decode-0", "decode-1"}
    assert all(set(own.trusted.values()) == names for own in loaded.values())
    proxy = plan(spec, ports, files, keys)[-1]
    args = build_parser().parse_args(proxy.argv[proxy.argv.index("proxy") :])
    assert load_keys(args.key_file, args.trusted_keys_dir).own.public == loaded["prefill-0"].public_key_of("proxy")


def test_aggregated_server_has_no_belt(spec, tmp_path):
    """0p1d is a worker of both roles without a file, and a proxy without prefill workers."""
    aggregated = processes.DeploymentSpec(topology=Topology(0, 1), model=Path("model"), device="cpu")
    files = write_configs(aggregated, seed_ports(aggregated.topology), tmp_path)
    worker, proxy = plan(aggregated, seed_ports(aggregated.topology), files)
    assert files == {}
    assert (worker.name, worker.role, "--config" in worker.argv) == ("both-0", "both", False)
    assert "--prefill-port" not in proxy.argv


@pytest.mark.parametrize("counts", [(1, 1), (2, 3), (0, 1)])
@pytest.mark.parametrize("ports_of", [seed_ports, scattered])
def test_command_line_understands_what_is_started(spec, tmp_path, counts, ports_of):
    """Every command that is started is one that kvbelt's own command line accepts."""
    topology = Topology(*counts)
    ports = ports_of(topology)
    wanted = DeploymentSpec(topology=topology, model=Path("model"), device="cpu", kv_gb=0.5, max_model_len=512)
    for process in plan(wanted, ports, write_configs(wanted, ports, tmp_path)):
        args = build_parser().parse_args(
            process.argv[process.argv.index("worker" if "-" in process.name else "proxy") :]
        )
        assert args.port == process.port


def test_role_is_on_the_command_line(spec, tmp_path):
    """Ps shows ``kvbelt worker --role prefill``."""
    ports = seed_ports(spec.topology)
    lines = [" ".join(process.argv) for process in plan(spec, ports, write_configs(spec, ports, tmp_path))]
    assert "kvbelt worker --role prefill" in lines[0]
    assert "kvbelt worker --role decode" in lines[2]
    assert "kvbelt proxy" in lines[4]


def test_consecutive_ports_are_said_the_seeds_way(spec, tmp_path):
    """The first port and a count where ports follow each other, a list where they do not."""
    seeds = plan(spec, seed_ports(spec.topology), {})[-1].argv
    assert seeds[seeds.index("--prefill-port") + 1] == "7100"
    assert seeds[seeds.index("--num-prefillers") + 1] == "2"
    ports = scattered(spec.topology)
    listed = plan(spec, ports, {})[-1].argv
    assert listed[listed.index("--decode-port") + 1] == f"{ports.decode[0]},{ports.decode[1]}"


def test_threads_are_shared_out(monkeypatch, spec):
    """Cores divided by workers, at least one, for torch and for OpenMP alike."""
    monkeypatch.setattr(processes, "cpu_cores", lambda: 8)
    assert [threads_per_worker(Topology(*counts)) for counts in [(1, 1), (2, 2), (1, 2), (20, 20)]] == [4, 2, 2, 1]
    worker = plan(spec, seed_ports(spec.topology), {})[0]
    assert worker.env["OMP_NUM_THREADS"] == "3"
    assert worker.argv[worker.argv.index("--threads") + 1] == "3"


def test_gpus_are_dealt_out_in_turn(monkeypatch):
    """Worker i gets GPU i, starting over when there are fewer."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    spec = DeploymentSpec(topology=Topology(1, 2), model=Path("model"), device="cuda")
    workers = plan(spec, seed_ports(spec.topology), {})[:-1]
    assert [worker.env["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["4", "6", "4"]
    assert all("cuda_ipc" in worker.env["UCX_TLS"] for worker in workers)


def test_no_gpu_means_cpu(monkeypatch):
    """Auto is the CPU where no GPU may be used; what is said is taken."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cuda") == "cuda"
