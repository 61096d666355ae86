"""The YAML file of a worker: LMCache's documented files load unchanged, and what is wrong is said in one sentence."""

from pathlib import Path

import pytest

from kvbelt.errors import SettingsError
from kvbelt.settings import Role, belt_for, load_belt_file

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


def test_the_environment_names_the_file_where_the_command_line_does_not(write, monkeypatch):
    """LMCACHE_CONFIG_FILE is honoured."""
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
        (Role.BOTH, SENDER, ("both", "sender")),
    ],
)
def test_what_is_wrong_is_named(role: Role, content: str, words: tuple[str, ...], write):
    """The key, its value and what it should be, in one line that begins with the file."""
    with pytest.raises(SettingsError) as raised:
        belt_for(role, write(content))
    message = str(raised.value)
    assert "\n" not in message
    assert "worker.yaml" in message
    for word in words:
        assert word in message


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    """The path and the reason."""
    with pytest.raises(SettingsError, match=r"nowhere\.yaml.*No such file"):
        load_belt_file(tmp_path / "nowhere.yaml")


def test_a_prefill_worker_needs_a_file(monkeypatch):
    """Both ways of naming one are said."""
    monkeypatch.delenv("LMCACHE_CONFIG_FILE", raising=False)
    with pytest.raises(SettingsError, match=r"--config.*LMCACHE_CONFIG_FILE"):
        belt_for(Role.PREFILL, None)
