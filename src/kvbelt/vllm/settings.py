"""The connector's settings: the belt's YAML file (``LMCACHE_CONFIG_FILE``) and ``kv_connector_extra_config``.

Both have the same keys, and the extra config wins. Every key has a default, so a server on one machine needs neither:
its ports are any free ones, and the proxy asks the server for them.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvbelt.belt_setup import BeltOptions, options_of
from kvbelt.errors import SettingsError
from kvbelt.lmcache_keys import translated
from kvbelt.settings import CONFIG_VARIABLE, keys_of, parse_belt_file, read_belt_file
from kvbelt.wire.health import Role

#: Keys of LMCache's connector that have no meaning here. They are accepted so that launch commands written for it work.
IGNORED_KEYS = frozenset({"discard_partial_chunks", "lmcache_rpc_port", "skip_last_n_tokens"})

#: By vLLM's word for a server's role: its role, and the file's word for it.
_ROLES = {
    "kv_producer": (Role.PREFILL, "sender"),
    "kv_consumer": (Role.DECODE, "receiver"),
    "kv_both": (Role.BOTH, None),
}

#: Longer than the embedded engine's: on CPU the belt's thread shares a core with the model, and on a full machine
#: it has gone without it for two seconds.
LEASE_SECONDS = 4.0


def load_settings(
    kv_role: str,
    extra: Mapping[str, Any],
    device: str,
    environ: Mapping[str, str] = os.environ,
    *,
    num_ranks: int = 1,
) -> BeltOptions:
    """Read the settings of a server.

    Args:
        kv_role: vLLM's word for its role.
        extra: ``kv_connector_extra_config``.
        device: where its model runs, ``"cpu"`` or ``"cuda"``.
        environ: names the file.
        num_ranks: its tensor-parallel degree.

    Raises:
        SettingsError: an unknown key, a wrong type, or a file that contradicts ``kv_role``.
    """
    source = "kv_connector_extra_config"
    given: dict[str, Any] = {}
    if named := environ.get(CONFIG_VARIABLE):
        given = read_belt_file(Path(named))
        source = f"{named} and {source}"
    given.update({key: value for key, value in extra.items() if key not in IGNORED_KEYS})
    given = translated(given, source)
    if given.get("enable_pd") is False:
        raise SettingsError(f"{source}: enable_pd is False; with KVBeltConnector it must be True, or left out")
    role, wanted = _ROLES[kv_role]
    defaults = {"pd_role": wanted, "pd_buffer_device": "cuda" if device == "cuda" else "cpu"}
    # The file need not say what vLLM tells this server, so it is not checked as an embedded worker's.
    file = parse_belt_file({**defaults, **given, "enable_pd": False}, source=source, environ=environ)
    if file.pd_role is not None and file.pd_role != wanted:
        raise SettingsError(
            f"{source}: pd_role is {file.pd_role!r}, but kv_role {kv_role!r} needs {wanted or 'no pd_role'}"
        )
    if file.pd_buffer_device == "cuda" and device != "cuda":
        raise SettingsError(f"{source}: pd_buffer_device is 'cuda', but the model runs on {device}; use 'cpu'")
    for key in ("pd_peer_init_port", "pd_peer_alloc_port", "pd_peer_liveness_port"):
        ports = getattr(file, key)
        if ports and (len(ports) if isinstance(ports, list) else 1) < num_ranks:
            raise SettingsError(
                f"{source}: {key} is {ports}; each of the {num_ranks} tensor-parallel ranks needs its own port: "
                "give a list of as many, or leave it out"
            )
    # The file format's default of 5 GB applies only where local_cpu was asked for.
    return replace(
        options_of(file, role, "127.0.0.1", keys_of(file, source)),
        host_bytes=int(file.max_local_cpu_size * (1 << 30)) if given.get("local_cpu") else 0,
        lease_seconds=LEASE_SECONDS,
    )
