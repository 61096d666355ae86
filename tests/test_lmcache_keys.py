"""Files and command lines that were written for LMCache's disaggregated prefill."""

import logging
from pathlib import Path

import pytest

from kvbelt.cli import build_parser
from kvbelt.errors import SettingsError
from kvbelt.lmcache_keys import ALIASES, NOTED, REFUSED
from kvbelt.settings import BeltFile, load_belt_file
from kvbelt.vllm.settings import load_settings

SENDER = """\
enable_pd: True
transfer_channel: "nixl"
pd_role: "sender"
pd_proxy_host: "localhost"
pd_proxy_port: 7500
pd_buffer_size: 1073741824
pd_buffer_device: "cuda"
nixl_backends: [UCX]
"""
RECEIVER = """\
enable_pd: True
transfer_channel: "nixl"
pd_role: "receiver"
pd_peer_host: "localhost"
pd_peer_init_port: 7300
pd_peer_alloc_port: 7400
pd_buffer_size: 2147483648
pd_buffer_device: "cuda"
nixl_backends: [UCX]
"""
#: What its examples of 0.3 to 0.5 add, by their folder.
EXAMPLES = {
    "1p1d": "local_cpu: False\nsave_unfull_chunk: true\n",
    "xpyd": "local_cpu: False\nmax_local_cpu_size: 0\nmax_local_disk_size: 0\n",
    "hetero_tp": "local_cpu: False\nmax_local_cpu_size: 0\nsave_unfull_chunk: True\n",
    "older": "local_cpu: False\nmax_local_disk_size: 0\nremote_serde: NULL\nnixl_enable_gc: True\n",
    "chunks": "chunk_size: 256\nsave_unfull_chunk: false\nsave_decode_cache: false\nextra_config: {}\n",
}


@pytest.fixture
def load(tmp_path: Path):
    """A function that loads a file with this content."""

    def load(content: str) -> BeltFile:
        path = tmp_path / "worker.yaml"
        path.write_text(content, encoding="utf-8")
        return load_belt_file(path)

    return load


@pytest.mark.parametrize("role", [SENDER, RECEIVER], ids=["sender", "receiver"])
@pytest.mark.parametrize("more", EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_loads(load, role, more):
    """And means the same as without what asks for nothing here."""
    kept = "".join(line + "\n" for line in more.splitlines() if line.startswith(("local_cpu", "max_local_cpu")))
    assert load(role + more) == load(role + kept)


def test_what_is_ignored_is_said(load, caplog):
    with caplog.at_level(logging.WARNING):
        load(SENDER + "chunk_size: 256\n")
    assert "worker.yaml: chunk_size is ignored: kvbelt sends blocks" in caplog.text


@pytest.mark.parametrize("content", [SENDER, RECEIVER], ids=["sender", "receiver"])
def test_older_names_mean_the_same(load, content):
    """Those before "pd" was the word."""
    older = content.replace("pd_p", "nixl_p").replace("pd_role", "nixl_role").replace("pd_buffer", "nixl_buffer")
    both_switches = older.replace("enable_pd: True", "enable_nixl: True\nenable_xpyd: True")
    assert load(both_switches.replace('transfer_channel: "nixl"\n', "")) == load(content)


def test_two_values_under_two_names_are_refused(load):
    with pytest.raises(SettingsError, match="pd_role is 'sender', and 'receiver' as nixl_role"):
        load(SENDER + "nixl_role: receiver\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("remote_url: lm://localhost:6800", "remote_url is 'lm://localhost:6800', which kvbelt lacks: kvbelt keeps KV"),
        ("save_decode_cache: true", "the decode worker's own prefix cache"),
        ("pd_retrieve_locations: [PDBackend]", "host memory"),
        ("enable_blending: true", "prefixes only"),
        ("nixl_receiver_port: 55555", "first protocol, with one port"),
        ("extra_config: {audit: x}", "none of these keys"),
    ],
)
def test_what_is_lacking_is_refused_with_the_reason(load, line, reason):
    """A file that asks for it must not load and do without."""
    with pytest.raises(SettingsError, match=reason):
        load(RECEIVER + line + "\n")


def test_every_key_has_one_meaning():
    ours = set(BeltFile.__struct_fields__)
    groups = [ours, set(ALIASES), set(NOTED), set(REFUSED)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert set(ALIASES.values()) <= ours


def test_the_connector_takes_them_too(tmp_path):
    """In the file that a vLLM server reads, and in its extra config."""
    file = tmp_path / "decode.yaml"
    file.write_text(EXAMPLES["older"] + "nixl_peer_host: localhost\nnixl_buffer_size: 1048576\n", encoding="utf-8")
    options = load_settings("kv_consumer", {"nixl_buffer_device": "cpu"}, "cuda", {"LMCACHE_CONFIG_FILE": str(file)})
    assert options == load_settings(
        "kv_consumer",
        {"pd_peer_host": "localhost", "pd_buffer_size": 1048576, "pd_buffer_device": "cpu", "local_cpu": False},
        "cuda",
        {},
    )


def test_the_proxys_command_line_is_taken(capsys):
    """Of its example with two decode workers: the same workers and ports."""
    line = (
        "--host localhost --port 9487 --prefiller-host localhost --prefiller-port 7100 --num-prefillers 1 "
        "--decoder-host localhost --decoder-port 7200 --decoder-init-port 7300 --decoder-alloc-port 7400,7401 "
        "--proxy-host localhost --proxy-port 7501 --num-decoders 2"
    )
    args = build_parser().parse_args(["proxy", *line.split()])
    assert (args.prefill_host, args.prefill_port, args.num_prefillers) == (["localhost"], [7100], 1)
    assert (args.decode_host, args.decode_port, args.num_decoders) == (["localhost"], [7200], 2)
    assert (args.notify_host, args.notify_port) == ("localhost", 7501)
