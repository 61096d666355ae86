"""The keys of LMCache's configuration files, 0.3 to 0.5, besides those that are ours too (``settings.BeltFile``).

Files written for its disaggregated prefill are read as they are. An older name of a key is the key. A key that asks for
nothing here, or for what kvbelt does anyway, is noted. A key that asks for something that kvbelt lacks is refused, with
the reason: a file must not load and then mean something else.
"""

import logging
from collections.abc import Mapping
from typing import Any

from kvbelt.errors import SettingsError

log = logging.getLogger("kvbelt.settings")

#: Older names. What both old switches turn on is the belt.
ALIASES: Mapping[str, str] = {
    "enable_xpyd": "enable_pd",
    "enable_nixl": "enable_pd",
    "enable_disagg_prefill": "enable_pd",
    "nixl_role": "pd_role",
    "nixl_proxy_host": "pd_proxy_host",
    "nixl_proxy_port": "pd_proxy_port",
    "nixl_peer_host": "pd_peer_host",
    "nixl_peer_init_port": "pd_peer_init_port",
    "nixl_peer_alloc_port": "pd_peer_alloc_port",
    "nixl_buffer_size": "pd_buffer_size",
    "nixl_buffer_device": "pd_buffer_device",
    "pd_backends": "nixl_backends",
}

_OTHER_STORES = "kvbelt keeps KV in the engine's memory, and with local_cpu in host memory"
_ONE_PORT = (
    "this is LMCache's first protocol, with one port; kvbelt has the one after it: give pd_peer_host, "
    "pd_peer_init_port and pd_peer_alloc_port to receivers"
)
_TUNING = "it tunes a part that kvbelt does not have"

#: What any value asks for, if it asks for nothing.
NOTED: Mapping[str, str] = {
    "save_unfull_chunk": "kvbelt always sends the last, partial block",
    "chunk_size": "kvbelt sends blocks of the engine's own size",
    "use_layerwise": "kvbelt always sends layer by layer",
    "max_local_disk_size": "without local_disk it asks for nothing",
    "remote_serde": "without remote_url it asks for nothing",
    "nixl_enable_gc": "kvbelt frees its buffers itself",
    "pd_backend_mode": "kvbelt has one way to move KV",
    "pre_caching_hash_algorithm": "kvbelt's hashes are its own",
    **dict.fromkeys(
        (
            "blend_check_layers", "blend_min_tokens", "blend_recompute_ratios", "blend_special_str", "blend_thresholds",
            "blocking_timeout_secs", "cache_policy", "cost_aware_ewma_alpha", "cost_aware_half_life_seconds",
            "gds_backend", "gds_buffer_size", "gds_path_sharding", "internal_api_server_host",
            "internal_api_server_port_start", "lazy_memory_initial_ratio", "lmcache_instance_id",
            "lmcache_worker_heartbeat_delay_time", "lmcache_worker_heartbeat_time", "local_cpu_use_hugepages",
            "local_disk_path_sharding", "lookup_timeout_ms", "min_retrieve_tokens", "numa_mode",
            "pd_allocation_timeout_sec", "pd_condition_poll_interval_sec", "pd_max_prefill_len",
            "pd_shutdown_timeout_sec", "priority_limit", "py_enable_gc", "reserve_local_cpu_size", "use_gds",
        ),
        _TUNING,
    ),
}  # fmt: skip

#: What a value asks for that is neither null, false, 0 nor empty.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "external_backends", "gds_path", "local_disk", "maru_path", "remote_storage_plugins", "remote_url",
            "storage_plugins",
        ),
        _OTHER_STORES,
    ),
    **dict.fromkeys(("nixl_peer_port", "nixl_receiver_host", "nixl_receiver_port"), _ONE_PORT),
    "enable_blending": "kvbelt reuses prefixes only, so that answers are one server's",
    "enable_p2p": "KV goes from prefill to decode workers only",
    "pd_bidirectional": "KV goes from prefill to decode workers only",
    "save_decode_cache": "the KV of answers stays in the decode worker's own prefix cache",
    "pd_retrieve_locations": _OTHER_STORES,
    "pd_store_location": _OTHER_STORES,
    "retrieve_locations": _OTHER_STORES,
    "store_location": _OTHER_STORES,
    "pd_skip_proxy_notification": "the proxy has to learn what became of a transfer",
    "enable_controller": "kvbelt has no controller; its proxy knows its workers",
    "internal_api_server_enabled": "kvbelt's processes have /health and /metrics on their own ports",
    "external_lookup_client": "kvbelt has no lookup servers",
    "extra_config": "kvbelt knows none of these keys",
}  # fmt: skip


def translated(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The same content in our own keys; what is ignored is logged. Unknown keys stay as they are.

    Raises:
        SettingsError: a key asks for what kvbelt lacks, or has two values under two names.
    """
    ours: dict[str, Any] = {}
    for key, value in content.items():
        if key in NOTED:
            log.warning("%s: %s is ignored: %s", source, key, NOTED[key])
        elif key in REFUSED:
            if value not in (None, False, 0, "", [], {}):
                raise SettingsError(f"{source}: {key} is {value!r}, which kvbelt lacks: {REFUSED[key]}; remove it")
        else:
            name = ALIASES.get(key, key)
            if name in ours and ours[name] != value:
                raise SettingsError(f"{source}: {name} is {ours[name]!r}, and {value!r} as {key}; remove one of them")
            ours[name] = value
    if content.get("enable_nixl"):
        ours.setdefault("transfer_channel", "nixl")
    return ours
