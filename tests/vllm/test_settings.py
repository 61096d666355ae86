"""The connector's settings: file and extra config, checked together."""

from pathlib import Path

import pytest

from kvbelt.channels.factory import ChannelSettings
from kvbelt.errors import SettingsError
from kvbelt.security.keys import write_new_keys
from kvbelt.vllm.settings import load_settings

SEEDS = """\
local_cpu: False
max_local_cpu_size: 0
enable_pd: True
transfer_channel: "nixl"
pd_role: "receiver"
pd_peer_host: "localhost"
pd_peer_init_port: 7300
pd_peer_alloc_port: 7400
pd_buffer_size: 2147483648
pd_buffer_device: "cpu"
nixl_backends: [UCX]
"""


def test_defaults_are_enough() -> None:
    """On one machine no setting is needed."""
    settings = load_settings("kv_consumer", {}, "cpu", {})
    assert (settings.role, settings.init_ports, settings.buffer_device) == ("decode", (), "cpu")
    assert settings.receives
    assert not settings.sends


def test_the_buffer_is_where_the_model_is() -> None:
    """The buffer is on the GPU with the model, unless the file says otherwise."""
    assert load_settings("kv_producer", {}, "cuda", {}).buffer_device == "cuda"
    assert load_settings("kv_producer", {"pd_buffer_device": "cpu"}, "cuda", {}).buffer_device == "cpu"


def test_a_file_is_read_and_overridden(tmp_path: Path) -> None:
    """The belt's YAML works as it is; the extra config wins, and LMCache's keys are ignored."""
    path = tmp_path / "d.yaml"
    path.write_text(SEEDS)
    extra = {
        "pd_peer_init_port": [7301],
        "discard_partial_chunks": False,
        "lmcache_rpc_port": "c",
        "skip_last_n_tokens": 1,
    }
    settings = load_settings("kv_consumer", extra, "cpu", {"LMCACHE_CONFIG_FILE": str(path)})
    assert (settings.host, settings.init_ports, settings.alloc_ports) == ("localhost", (7301,), (7400,))
    assert settings.buffer_bytes == 2 << 30


@pytest.mark.parametrize(
    ("role", "extra", "said"),
    [
        ("kv_producer", {"pd_buffer_sise": 1}, "pd_buffer_size"),
        ("kv_producer", {"pd_role": "receiver"}, "kv_producer"),
        ("kv_producer", {"pd_buffer_device": "cuda"}, "runs on cpu"),
        ("kv_producer", {"mooncake_protocol": "rdma"}, "mooncake_protocol is 'rdma'.*transfer_channel is None"),
        ("kv_producer", {"enable_pd": False}, "enable_pd"),
        ("kv_both", {"pd_buffer_size": "large"}, "pd_buffer_size"),
        ("kv_consumer", {"pd_peer_host": "0.0.0.0"}, "pd_peer_host is 0.0.0.0.*pd_key_file.*pd_insecure"),
        ("kv_both", {"pd_peer_host": "10.0.0.7"}, "pd_peer_host is 10.0.0.7"),
        ("kv_consumer", {"pd_key_file": "k"}, "pd_trusted_keys_dir"),
        ("kv_consumer", {"pd_key_file": "nowhere", "pd_trusted_keys_dir": "k"}, "key file nowhere"),
    ],
)
def test_contradictions_are_refused(role: str, extra: dict[str, object], said: str) -> None:
    """The error is one line that names the key."""
    with pytest.raises(SettingsError, match=said):
        load_settings(role, extra, "cpu", {})


def test_each_rank_has_a_port() -> None:
    """A list has a port for each rank; one port for several ranks is refused."""
    ports = {
        "pd_peer_init_port": [7300, 7301],
        "pd_peer_alloc_port": [7400, 7401],
        "pd_peer_liveness_port": [7700, 7701],
    }
    settings = load_settings("kv_consumer", ports, "cpu", {}, num_ranks=2)
    assert (settings.init_ports, settings.alloc_ports) == ((7300, 7301), (7400, 7401))
    assert settings.liveness_ports == (7700, 7701)
    assert load_settings("kv_consumer", {}, "cpu", {}, num_ranks=2).init_ports == ()
    with pytest.raises(SettingsError, match=r"pd_peer_alloc_port is 7400; each of the 2"):
        load_settings("kv_consumer", {**ports, "pd_peer_alloc_port": 7400}, "cpu", {}, num_ranks=2)


def test_keys_and_the_explicit_word_are_taken(tmp_path: Path) -> None:
    """Keys and pd_insecure are read as in an embedded worker's file."""
    write_new_keys(tmp_path, ["decode"])
    named = {"pd_key_file": str(tmp_path / "decode.key_secret"), "pd_trusted_keys_dir": str(tmp_path / "trusted")}
    keys = load_settings("kv_consumer", {"pd_peer_host": "0.0.0.0", **named}, "cpu", {}).keys
    assert keys is not None
    assert list(keys.trusted.values()) == ["decode"]
    settings = load_settings("kv_consumer", {"pd_peer_host": "0.0.0.0", "pd_insecure": True}, "cpu", {})
    assert (settings.keys, settings.insecure) == (None, True)
    assert load_settings("kv_producer", {"pd_peer_host": "0.0.0.0"}, "cpu", {}).keys is None  # it listens nowhere


@pytest.mark.parametrize(
    ("role", "extra", "gib"),
    [
        ("kv_producer", {"local_cpu": True, "max_local_cpu_size": 2}, 2),
        ("kv_producer", {"local_cpu": True}, 5),
        ("kv_both", {"local_cpu": True, "max_local_cpu_size": 0.5}, 0.5),
        ("kv_producer", {"local_cpu": False, "max_local_cpu_size": 2}, 0),
        ("kv_producer", {}, 0),
        ("kv_consumer", {"local_cpu": True, "max_local_cpu_size": 2}, 2),
    ],
)
def test_host_memory_is_asked_for(role: str, extra: dict[str, object], gib: float) -> None:
    """A server of any role keeps blocks in host memory, but only if it is told to."""
    assert load_settings(role, extra, "cpu", {}).host_bytes == gib * (1 << 30)


def test_another_channel_can_be_chosen() -> None:
    """Mooncake has its own settings; NIXL is the default."""
    assert load_settings("kv_both", {}, "cpu", {}).channel == ChannelSettings()
    extra = {"transfer_channel": "mooncake", "mooncake_protocol": "rdma", "mooncake_device": "mlx5_0"}
    channel = load_settings("kv_both", extra, "cpu", {}).channel
    assert (channel.name, channel.mooncake_protocol, channel.mooncake_device) == ("mooncake", "rdma", "mlx5_0")
