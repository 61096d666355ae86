"""The YAML file of a worker: LMCache's documented files load unchanged, and what is wrong is said in one sentence."""

from pathlib import Path

import pytest

from kvbelt.channels.factory import ChannelSettings
from kvbelt.errors import SettingsError
from kvbelt.security.keys import write_new_keys
from kvbelt.settings import belt_for, channel_of, keys_of, load_belt_file, role_for
from kvbelt.wire.health import Role

SENDER = """\
# lmcache-prefiller-config.yaml
local_cpu: True
max_local_cpu_size: 5
enable_pd: True              # on
transfer_channel: "nixl"
pd_role: "sender"
pd_proxy_host: "localhost"
pd_proxy_port: 7500
pd_buffer_size: 1073741824  # 1GB
pd_buffer_device: "cuda"
"""
RECEIVER = """\
# lmcache-decoder-config.yaml
local_cpu: False
enable_pd: True
transfer_channel: "nixl"
pd_role: "receiver"
pd_peer_host: "localhost"
pd_peer_init_port: 7300
pd_peer_alloc_port: 7400
pd_buffer_size: 2147483648  # 2GB
pd_buffer_device: "cuda"
nixl_backends: [UCX]        # UCX
"""
#: The same over the other carrier; NIXL's backends may stay.
MOONCAKE = RECEIVER.replace('"nixl"', '"mooncake"')


@pytest.fixture
def write(tmp_path: Path):
    """A function that writes a file and returns its path."""

    def write(content: str) -> Path:
        path = tmp_path / "worker.yaml"
        path.write_text(content, encoding="utf-8")
        return path

    return write


def test_the_documented_sender_file_loads(write):
    """Every key has its value."""
    file = belt_for(Role.PREFILL, write(SENDER))
    assert file is not None
    assert (file.pd_proxy_host, file.pd_proxy_port, file.pd_buffer_size) == ("localhost", 7500, 1 << 30)
    assert (file.local_cpu, file.max_local_cpu_size, file.pd_buffer_device) == (True, 5, "cuda")


def test_the_documented_receiver_file_loads(write):
    """Every key has its value."""
    file = belt_for(Role.DECODE, write(RECEIVER))
    assert file is not None
    assert (file.pd_peer_host, file.pd_peer_init_port, file.pd_peer_alloc_port) == ("localhost", 7300, 7400)
    assert (file.pd_buffer_size, file.nixl_backends) == (1 << 31, ["UCX"])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("", ChannelSettings("mooncake")),
        ("mooncake_protocol: tcp\n", ChannelSettings("mooncake")),
        (
            "mooncake_protocol: rdma\nmooncake_device: mlx5_0,mlx5_1\n",
            ChannelSettings("mooncake", mooncake_protocol="rdma", mooncake_device="mlx5_0,mlx5_1"),
        ),
    ],
)
def test_the_other_carrier_is_a_word_in_the_file(more, expected, write):
    """The protocol is TCP by default. RDMA has its devices."""
    file = belt_for(Role.DECODE, write(MOONCAKE + more))
    assert file is not None
    assert channel_of(file) == expected


def test_the_environment_names_the_file_where_the_command_line_does_not(write, monkeypatch):
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(write(SENDER)))
    file = belt_for(Role.PREFILL, None)
    assert file is not None
    assert file.pd_role == "sender"


@pytest.mark.parametrize(
    ("role", "content", "words"),
    [
        (Role.PREFILL, "pd_bufer_size: 1", ("pd_bufer_size", "pd_buffer_size")),
        (Role.PREFILL, SENDER.replace("1073741824", '"1 GB"'), ("pd_buffer_size", "str")),
        (Role.PREFILL, SENDER.replace("1073741824", "0"), ("pd_buffer_size", "0")),
        (Role.PREFILL, SENDER.replace("7500", "75000"), ("pd_proxy_port", "75000")),
        (Role.PREFILL, SENDER.replace('"nixl"', '"pigeon"'), ("transfer_channel", "pigeon")),
        (Role.PREFILL, RECEIVER, ("pd_role", "receiver", "prefill")),
        (Role.DECODE, RECEIVER.replace("pd_peer_alloc_port: 7400\n", ""), ("pd_peer_alloc_port", "missing")),
        (Role.DECODE, "enable_pd: False", ("enable_pd", "decode")),
        (Role.DECODE, "a: [", ("not YAML",)),
        (Role.DECODE, "- a", ("list",)),
        (Role.DECODE, RECEIVER.replace("[UCX]", "[GDS]"), ("nixl_backends", "GDS")),
        (
            Role.DECODE,
            RECEIVER + "mooncake_protocol: tcp\n",
            ("mooncake_protocol", "'tcp'", "transfer_channel is 'nixl'"),
        ),
        (Role.DECODE, MOONCAKE + "mooncake_protocol: infiniband\n", ("mooncake_protocol", "infiniband")),
        (Role.DECODE, MOONCAKE + "mooncake_device: mlx5_0\n", ("mooncake_device", "mlx5_0", "mooncake_protocol: rdma")),
        (
            Role.DECODE,
            MOONCAKE + "mooncake_protocol: rdma\nmooncake_device: 'mlx5_0 mlx5_1'\n",
            ("mooncake_device", "'mlx5_0 mlx5_1'", "commas"),
        ),
        (Role.DECODE, MOONCAKE + "mooncake_divice: a\n", ("mooncake_divice", "mooncake_device")),
        (Role.BOTH, SENDER, ("both", "sender")),
        (Role.DECODE, RECEIVER.replace('"localhost"', '"0.0.0.0"'), ("pd_peer_host", "0.0.0.0", "pd_key_file")),
        (Role.DECODE, RECEIVER + "pd_key_file: k\n", ("pd_trusted_keys_dir", "missing")),
        (Role.DECODE, RECEIVER + "pd_trusted_key_dir: k\n", ("pd_trusted_key_dir", "pd_trusted_keys_dir")),
        (
            Role.DECODE,
            RECEIVER + "pd_key_file: nowhere\npd_trusted_keys_dir: b\n",
            ("key file nowhere", "No such file"),
        ),
        (
            Role.DECODE,
            RECEIVER + "pd_key_file: a\npd_trusted_keys_dir: b\npd_insecure: True\n",
            ("pd_insecure", "contradict"),
        ),
        (Role.DECODE, RECEIVER + "pd_insecure: 1\n", ("pd_insecure", "bool")),
    ],
)
def test_what_is_wrong_is_named(role: Role, content: str, words: tuple[str, ...], write):
    """The error is one line with the file, the key, its value and the valid values."""
    with pytest.raises(SettingsError) as raised:
        belt_for(role, write(content))
    message = str(raised.value)
    assert "\n" not in message
    assert "worker.yaml" in message
    for word in words:
        assert word in message


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    """The error has the path and the reason."""
    with pytest.raises(SettingsError, match=r"nowhere\.yaml.*No such file"):
        load_belt_file(tmp_path / "nowhere.yaml")


def test_a_prefill_worker_needs_a_file(monkeypatch):
    """The error names both ways to give one."""
    monkeypatch.delenv("LMCACHE_CONFIG_FILE", raising=False)
    with pytest.raises(SettingsError, match=r"--config.*LMCACHE_CONFIG_FILE"):
        belt_for(Role.PREFILL, None)


def test_beyond_loopback_keys_or_the_explicit_word_are_enough(write, tmp_path):
    """A receiver that other hosts reach needs keys that can be read, or pd_insecure."""
    open_to_all = RECEIVER.replace('"localhost"', '"0.0.0.0"')
    assert belt_for(Role.DECODE, write(open_to_all + "pd_insecure: True\n"))
    write_new_keys(tmp_path / "k", ["decode"])
    keys = f"pd_key_file: {tmp_path}/k/decode.key_secret\npd_trusted_keys_dir: {tmp_path}/k/trusted\n"
    file = belt_for(Role.DECODE, write(open_to_all + keys))
    assert file is not None
    loaded = keys_of(file, "file")
    assert loaded is not None
    assert loaded.trusted == {loaded.own.public: "decode"}


def test_a_sender_must_know_the_proxys_key(write, tmp_path):
    """A sender that notifies a proxy needs its key. The error names the folder."""
    write_new_keys(tmp_path / "k", ["prefill"])
    keys = f"pd_key_file: {tmp_path}/k/prefill.key_secret\npd_trusted_keys_dir: {tmp_path}/k/trusted\n"
    with pytest.raises(SettingsError, match=r"trusted has no proxy\.key"):
        belt_for(Role.PREFILL, write(SENDER + keys))
    write_new_keys(tmp_path / "k", ["proxy"])
    assert belt_for(Role.PREFILL, write(SENDER + keys))


def test_a_sender_listens_nowhere_and_needs_no_keys(write):
    """A pd_peer_host in its file has no effect."""
    assert belt_for(Role.PREFILL, write(SENDER + "pd_peer_host: 0.0.0.0\n"))


def test_a_secret_key_that_others_may_read_is_refused_at_the_start(write, tmp_path):
    """The model is not loaded."""
    write_new_keys(tmp_path / "k", ["decode"])
    (tmp_path / "k" / "decode.key_secret").chmod(0o644)
    keys = f"pd_key_file: {tmp_path}/k/decode.key_secret\npd_trusted_keys_dir: {tmp_path}/k/trusted\n"
    with pytest.raises(SettingsError, match=r"chmod 600 .*decode\.key_secret"):
        belt_for(Role.DECODE, write(RECEIVER + keys))


def test_a_value_may_come_from_the_environment(write, monkeypatch):
    """One file serves many Pods with different addresses."""
    monkeypatch.setenv("POD_IP", "127.0.0.7")
    file = belt_for(Role.DECODE, write(RECEIVER.replace('"localhost"', '"${POD_IP}"')))
    assert file is not None
    assert file.pd_peer_host == "127.0.0.7"


@pytest.mark.parametrize("value", [None, ""])
def test_a_value_that_the_environment_lacks_is_refused(write, monkeypatch, value):
    """The error has the key, the value and the variable."""
    monkeypatch.delenv("POD_IP", raising=False)
    if value is not None:
        monkeypatch.setenv("POD_IP", value)
    with pytest.raises(SettingsError, match=r"pd_peer_host is \$\{POD_IP\}, but the environment has no POD_IP"):
        load_belt_file(write(RECEIVER.replace('"localhost"', '"${POD_IP}"')))


@pytest.mark.parametrize(
    ("text", "role"), [(SENDER, Role.PREFILL), (RECEIVER, Role.DECODE), ("local_cpu: True\n", Role.BOTH)]
)
def test_the_file_says_the_role(tmp_path, monkeypatch, text, role):
    """Of --config, and of LMCache's variable."""
    file = tmp_path / "worker.yaml"
    file.write_text(text)
    assert role_for(file) is role
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(file))
    assert role_for(None) is role


def test_without_a_file_and_a_role_both_are_named(monkeypatch):
    monkeypatch.delenv("LMCACHE_CONFIG_FILE", raising=False)
    with pytest.raises(SettingsError, match=r"--role prefill, decode or both, or --config"):
        role_for(None)
