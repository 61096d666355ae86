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

from kvbelt.errors import SettingsError
from kvbelt.security.keys import Keys
from kvbelt.settings import CONFIG_VARIABLE, keys_of, parse_belt_file

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
    init_port: int  #: 0: any
    alloc_port: int
    notification_endpoint: str | None
    nixl_backends: tuple[str, ...]
    keys: Keys | None
    insecure: bool  #: without keys, listen beyond loopback all the same

    @property
    def sends(self) -> bool:
        """Whether KV leaves this server."""
        return self.role != "decode"

    @property
    def receives(self) -> bool:
        """Whether KV comes to this server."""
        return self.role != "prefill"


def load_settings(
    kv_role: str, extra: Mapping[str, Any], device: str, environ: Mapping[str, str] = os.environ
) -> ConnectorSettings:
    """Read the settings of a server whose model runs on ``device`` (``"cpu"`` or ``"cuda"``).

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
    file = parse_belt_file({"pd_role": wanted, **given, "enable_pd": False}, source=source)
    if file.pd_role is not None and file.pd_role != wanted:
        raise SettingsError(
            f"{source}: pd_role is {file.pd_role!r}, but kv_role {kv_role!r} needs {wanted or 'no pd_role'}"
        )
    if file.transfer_channel not in (None, "nixl"):
        raise SettingsError(f"{source}: transfer_channel is {file.transfer_channel!r}; use 'nixl'")
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
        init_port=_first(file.pd_peer_init_port),
        alloc_port=_first(file.pd_peer_alloc_port),
        notification_endpoint=f"tcp://{file.pd_proxy_host}:{file.pd_proxy_port}" if notify else None,
        nixl_backends=tuple(file.nixl_backends),
        keys=keys_of(file, source),
        insecure=file.pd_insecure,
    )


def _first(port: int | list[int] | None) -> int:
    return (port[0] if port else 0) if isinstance(port, list) else (port or 0)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{CONFIG_VARIABLE}: cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold keys and values, not a {type(content).__name__}")
    return content
