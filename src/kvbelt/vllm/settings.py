"""The connector's settings: the belt's YAML file (``LMCACHE_CONFIG_FILE``) and ``kv_connector_extra_config``.

Both have the same keys; what stands in the extra config wins. Everything has a default, so that a server on one
machine needs neither: ports are any free ones then, and the proxy asks for them (``describe``).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from kvbelt.channels.factory import ChannelSettings
from kvbelt.errors import SettingsError
from kvbelt.security.keys import Keys
from kvbelt.settings import CONFIG_VARIABLE, channel_of, keys_of, parse_belt_file
from kvbelt.wire.digest import Verify

#: Keys of LMCache's connector that mean nothing here; accepted, so that launch commands written for it work.
IGNORED_KEYS = frozenset({"discard_partial_chunks", "lmcache_rpc_port", "skip_last_n_tokens"})

#: Bytes of staging where nothing is said: 1 GiB, one prompt of 8,000 tokens of an 8B model.
DEFAULT_BUFFER_BYTES = 1 << 30

_BELT_ROLE = {"kv_producer": "sender", "kv_consumer": "receiver"}


@dataclass(frozen=True, slots=True)
class ConnectorSettings:
    """Of one vLLM server."""

    role: Literal["prefill", "decode", "both"]
    buffer_bytes: int
    buffer_device: Literal["cpu", "cuda"]
    host: str
    init_ports: tuple[int, ...]  #: one a tensor-parallel rank; empty: any
    alloc_ports: tuple[int, ...]
    notification_endpoint: str | None
    channel: ChannelSettings  #: what moves the bytes
    keys: Keys | None
    insecure: bool  #: without keys, listen beyond loopback all the same
    host_bytes: int  #: host memory for KV blocks of prompts computed here; 0: none
    overflow_bytes: int  #: of host memory, for KV that finds the buffer full; 0: none
    verify: Verify  #: which digests of what lands are compared

    @property
    def sends(self) -> bool:
        """Whether KV leaves this server."""
        return self.role != "decode"

    @property
    def receives(self) -> bool:
        """Whether KV comes to this server."""
        return self.role != "prefill"


def load_settings(
    kv_role: str,
    extra: Mapping[str, Any],
    device: str,
    environ: Mapping[str, str] = os.environ,
    *,
    num_ranks: int = 1,
) -> ConnectorSettings:
    """Read the settings of a server.

    Args:
        kv_role: vLLM's word for its role.
        extra: ``kv_connector_extra_config``.
        device: where its model runs, ``"cpu"`` or ``"cuda"``.
        environ: where the file is named.
        num_ranks: its tensor-parallel degree.

    Raises:
        SettingsError: an unknown key, a wrong type, or a file that contradicts ``kv_role``.
    """
    source = "kv_connector_extra_config"
    given: dict[str, Any] = {}
    if named := environ.get(CONFIG_VARIABLE):
        given = _read(Path(named))
        source = f"{named} and {source}"
    given.update({key: value for key, value in extra.items() if key not in IGNORED_KEYS})
    if given.get("enable_pd") is False:
        raise SettingsError(f"{source}: enable_pd is False; with KVBeltConnector it must be True, or left out")
    # What a worker of its own must be told, this one has from vLLM: so the file is not checked as one of those.
    wanted = _BELT_ROLE.get(kv_role)
    file = parse_belt_file({"pd_role": wanted, **given, "enable_pd": False}, source=source, environ=environ)
    if file.pd_role is not None and file.pd_role != wanted:
        raise SettingsError(
            f"{source}: pd_role is {file.pd_role!r}, but kv_role {kv_role!r} needs {wanted or 'no pd_role'}"
        )
    buffer_device = file.pd_buffer_device if "pd_buffer_device" in given else device
    if buffer_device == "cuda" and device != "cuda":
        raise SettingsError(f"{source}: pd_buffer_device is 'cuda', but the model runs on {device}; use 'cpu'")
    notify = file.pd_proxy_host is not None and file.pd_proxy_port is not None
    role: Literal["prefill", "decode", "both"] = "both"
    if kv_role != "kv_both":
        role = "prefill" if kv_role == "kv_producer" else "decode"
    return ConnectorSettings(
        role=role,
        buffer_bytes=file.pd_buffer_size or DEFAULT_BUFFER_BYTES,
        buffer_device="cuda" if buffer_device == "cuda" else "cpu",
        host=file.pd_peer_host or "127.0.0.1",
        init_ports=_ports("pd_peer_init_port", file.pd_peer_init_port, num_ranks, source),
        alloc_ports=_ports("pd_peer_alloc_port", file.pd_peer_alloc_port, num_ranks, source),
        notification_endpoint=f"tcp://{file.pd_proxy_host}:{file.pd_proxy_port}" if notify else None,
        channel=channel_of(file),
        keys=keys_of(file, source),
        insecure=file.pd_insecure,
        # The file format's own default is 5 GB; whoever has not asked for it is not surprised by it.
        host_bytes=int(file.max_local_cpu_size * (1 << 30)) if given.get("local_cpu") and role != "decode" else 0,
        overflow_bytes=file.pd_overflow_size,
        verify=file.pd_verify,
    )


def _ports(key: str, given: int | list[int] | None, num_ranks: int, source: str) -> tuple[int, ...]:
    ports = tuple(given) if isinstance(given, list) else () if given is None else (given,)
    if ports and len(ports) < num_ranks:
        raise SettingsError(
            f"{source}: {key} is {given}; each of the {num_ranks} tensor-parallel ranks listens on a port of its own: "
            "give a list of so many, or leave it out"
        )
    return ports


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{CONFIG_VARIABLE}: cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold keys and values, not a {type(content).__name__}")
    return content
