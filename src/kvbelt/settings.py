"""The settings of a worker process: the belt's YAML file and the command line. Frozen and strict.

The file has the keys of LMCache's disaggregated prefill configuration (``lmcache_keys.py`` has its other ones).
An unknown key is an error that names the key it resembles. A value of the wrong type is an error that names the
key, the value's type and the right type.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from kvbelt.channels.factory import ChannelSettings
from kvbelt.errors import SettingsError, resembling
from kvbelt.limits import DEFAULTS, Limits
from kvbelt.lmcache_keys import translated
from kvbelt.security.keys import PROXY, Keys, load_keys
from kvbelt.security.loopback import require_keys_beyond_loopback
from kvbelt.wire.health import Role

CONFIG_VARIABLE = "LMCACHE_CONFIG_FILE"  #: where a worker looks for its file when no ``--config`` is given

_VARIABLE = re.compile(r"\$\{([A-Z_][A-Z0-9_]*)\}")

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Ports = Port | list[Port]  # a list has one port a tensor-parallel rank

_PD_ROLE = {Role.PREFILL: "sender", Role.DECODE: "receiver"}  #: the file's name of a role


class BeltFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The YAML file. Defaults are LMCache's where it has one."""

    local_cpu: bool = True
    max_local_cpu_size: Annotated[float, msgspec.Meta(ge=0)] = 5.0  #: GB
    enable_pd: bool = False
    transfer_channel: Literal["nixl", "mooncake"] | None = None
    pd_role: Literal["sender", "receiver"] | None = None
    pd_proxy_host: str | None = None
    pd_proxy_port: Port | None = None
    pd_peer_host: str | None = None
    pd_peer_init_port: Ports | None = None
    pd_peer_alloc_port: Ports | None = None
    pd_peer_liveness_port: Ports | None = None  #: None: any free port
    pd_buffer_size: Annotated[int, msgspec.Meta(ge=1)] | None = None  #: bytes
    pd_buffer_device: Literal["cpu", "cuda"] = "cpu"
    #: Bytes of host memory for KV that does not fit into a full buffer; for receivers.
    pd_overflow_size: Annotated[int, msgspec.Meta(ge=0)] = 0
    pd_verify: Literal["off", "sample", "always"] = "sample"  #: digests to compare before landed KV becomes visible
    nixl_backends: list[str] = msgspec.field(default_factory=lambda: ["UCX"])
    mooncake_protocol: Literal["tcp", "rdma"] | None = None  #: None: tcp
    mooncake_device: str | None = None  #: RDMA devices, separated by commas; None: all of the host
    pd_key_file: str | None = None  #: this process's secret CURVE key
    pd_trusted_keys_dir: str | None = None  #: the deployment's public keys
    pd_insecure: bool = False  #: listen beyond loopback without keys


def parse_belt_file(content: Mapping[str, Any], *, source: str, environ: Mapping[str, str] = os.environ) -> BeltFile:
    """Check a loaded YAML mapping; values ``${NAME}`` come from the environment. Raises SettingsError."""
    content = translated(content, source)
    known = [field.name for field in msgspec.structs.fields(BeltFile)]
    for key in content:
        if key not in known:
            raise SettingsError(f"{source}: unknown key {key!r}{resembling(str(key), known)}")
    given = {key: _from_environment(key, value, source, environ) for key, value in content.items()}
    try:
        parsed = msgspec.convert(given, BeltFile)
    except msgspec.ValidationError as error:
        named = re.search(r"`\$\.(\w+)", str(error))
        said = f"; it is {given[named[1]]!r}" if named is not None else ""
        raise SettingsError(f"{source}: {error}{said}") from None
    _check(parsed, source)
    return parsed


def _from_environment(key: str, value: Any, source: str, environ: Mapping[str, str]) -> Any:
    """So that one file, as of a ConfigMap, may serve many processes whose addresses differ."""
    named = _VARIABLE.fullmatch(value) if isinstance(value, str) else None
    if named is None:
        return value
    if not environ.get(named[1]):
        raise SettingsError(f"{source}: {key} is {value}, but the environment has no {named[1]}; set it")
    return environ[named[1]]


def _check(file: BeltFile, source: str) -> None:
    def need(key: str, why: str) -> None:
        if getattr(file, key) is None:
            raise SettingsError(f"{source}: {key} is missing; {why}")

    if file.pd_overflow_size and file.pd_role == "sender":
        raise SettingsError(f"{source}: pd_overflow_size is a receiver's; a sender keeps what waits in its own blocks")
    _check_channel(file, source)
    _check_keys(file, source)
    if not file.enable_pd:
        return
    need("transfer_channel", "with enable_pd it must be 'nixl' or 'mooncake'")
    need("pd_role", "with enable_pd it must be 'sender' (prefill) or 'receiver' (decode)")
    need("pd_buffer_size", "with enable_pd it is the size in bytes of the staging buffer")
    if file.pd_role == "receiver":
        for key in ("pd_peer_host", "pd_peer_init_port", "pd_peer_alloc_port"):
            need(key, "a receiver listens there for its senders")
    if (file.pd_proxy_host is None) != (file.pd_proxy_port is None):
        raise SettingsError(f"{source}: pd_proxy_host and pd_proxy_port belong together; one of them is missing")


def _check_channel(file: BeltFile, source: str) -> None:
    for key in ("mooncake_protocol", "mooncake_device"):
        value = getattr(file, key)
        if value is not None and file.transfer_channel != "mooncake":
            raise SettingsError(
                f"{source}: {key} is {value!r}, but transfer_channel is {file.transfer_channel!r}; "
                "set transfer_channel: mooncake, or remove it"
            )
    if file.mooncake_device is None:
        return
    if file.mooncake_protocol != "rdma":
        raise SettingsError(
            f"{source}: mooncake_device is {file.mooncake_device!r}, which names RDMA devices; "
            "set mooncake_protocol: rdma, or remove it"
        )
    if not re.fullmatch(r"[\w.-]+(,[\w.-]+)*", file.mooncake_device):
        raise SettingsError(
            f"{source}: mooncake_device is {file.mooncake_device!r}; it must be names separated by commas, "
            "such as mlx5_0,mlx5_1"
        )


def channel_of(file: BeltFile) -> ChannelSettings:
    """The settings of the channel; NIXL is the default."""
    return ChannelSettings(
        name=file.transfer_channel or "nixl",
        nixl_backends=tuple(file.nixl_backends),
        mooncake_protocol=file.mooncake_protocol or "tcp",
        mooncake_device=file.mooncake_device or "",
    )


def _check_keys(file: BeltFile, source: str) -> None:
    if (file.pd_key_file is None) != (file.pd_trusted_keys_dir is None):
        raise SettingsError(f"{source}: pd_key_file and pd_trusted_keys_dir belong together; one of them is missing")
    if file.pd_insecure and file.pd_key_file is not None:
        raise SettingsError(f"{source}: pd_insecure and pd_key_file contradict each other; remove one of them")
    if file.pd_peer_host is not None and file.pd_role != "sender":
        require_keys_beyond_loopback(
            file.pd_peer_host,
            keys=file.pd_key_file is not None,
            insecure=file.pd_insecure,
            setting=f"{source}: pd_peer_host",
            how="Set pd_key_file and pd_trusted_keys_dir (kvbelt keys new DIR makes them), or pd_insecure: True",
        )


def keys_of(file: BeltFile, source: str) -> Keys | None:
    """The keys that a file names, if any. Raises SettingsError: they cannot be read, or lack the proxy's."""
    if file.pd_key_file is None or file.pd_trusted_keys_dir is None:
        return None
    try:
        keys = load_keys(file.pd_key_file, file.pd_trusted_keys_dir)
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from None
    if file.pd_proxy_host is not None and keys.public_key_of(PROXY) is None:
        raise SettingsError(
            f"{source}: pd_trusted_keys_dir {file.pd_trusted_keys_dir} has no {PROXY}.key; "
            "with pd_proxy_host it must hold the proxy's public key under this name"
        )
    return keys


def load_belt_file(path: Path) -> BeltFile:
    """Read and check a YAML file. Raises SettingsError: it cannot be read, is not YAML, or is wrong."""
    return parse_belt_file(read_belt_file(path), source=str(path))


def read_belt_file(path: Path) -> dict[str, Any]:
    """The content of a YAML file, not checked. Raises SettingsError: it cannot be read, or is no mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the configuration file {path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a malformed date or number
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise SettingsError(f"{path} is not a configuration file: it is nested too deeply") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold keys and values, not a {type(content).__name__}")
    return content


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    role: Role
    model_dir: Path
    host: str = "127.0.0.1"
    port: int = 7100
    belt: BeltFile | None = None
    served_model_name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    kv_gb: float | None = None
    block_size: int = 16
    max_batch_tokens: int | None = None
    max_running: int | None = None
    limits: Limits = DEFAULTS
    max_model_len: int | None = None
    slo_itl_ms: float | None = None
    threads: int | None = None
    prefix_caching: bool = True
    trust_request_chat_template: bool = False
    log_json: bool = False


def role_for(config: Path | None) -> Role:
    """The role that the belt's file says. Raises SettingsError: there is no file, or it is wrong."""
    config = config or _named_config()
    if config is None:
        raise SettingsError("give --role prefill, decode or both, or --config FILE.yaml, whose pd_role says it")
    file = load_belt_file(config)
    if not file.enable_pd:
        return Role.BOTH
    return next(role for role, name in _PD_ROLE.items() if name == file.pd_role)


def _named_config() -> Path | None:
    named = os.environ.get(CONFIG_VARIABLE)
    return Path(named) if named else None


def belt_for(role: Role, config: Path | None) -> BeltFile | None:
    """The belt's file for a role: ``--config``, else ``LMCACHE_CONFIG_FILE``. Raises SettingsError."""
    config = config or _named_config()
    if config is None:
        if role is not Role.BOTH:
            raise SettingsError(
                f"--role {role} needs a configuration file: give --config FILE.yaml or set {CONFIG_VARIABLE}"
            )
        return None
    file = load_belt_file(config)
    if not file.enable_pd:
        if role is not Role.BOTH:
            raise SettingsError(f"{config}: enable_pd is off, but --role {role} needs it; set enable_pd: True")
        return None
    if _PD_ROLE.get(role) != file.pd_role:
        expected = f"pd_role {_PD_ROLE[role]!r}" if role in _PD_ROLE else "no enable_pd"
        raise SettingsError(f"{config}: pd_role is {file.pd_role!r}, but --role {role} needs {expected}")
    if file.transfer_channel == "nixl" and file.nixl_backends != ["UCX"]:
        raise SettingsError(f"{config}: nixl_backends is {file.nixl_backends}; only ['UCX'] is supported")
    keys_of(file, str(config))  # errors must come now, not once the model has loaded
    return file
