"""The settings of one belt. Frozen and checked here; a belt reads no others."""

from dataclasses import dataclass

from kvbelt.errors import SettingsError
from kvbelt.security.keys import PROXY, Keys
from kvbelt.wire.block_hash import HASH_SCHEME
from kvbelt.wire.handshake import PROTOCOL_VERSION, Compatibility
from kvbelt.wire.ids import EngineId
from kvbelt.wire.layout import KVLayout
from kvbelt.wire.reservation import Verify
from kvbelt.wire.shards import ONE_STAGE, Ranks

LEASE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class BeltIdentity:
    engine_id: EngineId  #: of this incarnation of the process; a restart makes a new one
    role: str  #: ``"prefill"``, ``"decode"`` or ``"both"``
    model: str  #: for people
    fingerprint: str  #: of architecture and weights; compared in the handshake
    layout: KVLayout
    tp_rank: int = 0
    tp_size: int = 1
    kv_heads: int = 0  #: of the model; 0: not known, unless there is one rank
    hash_scheme: str = HASH_SCHEME
    model_layers: int = 0  #: in all pipeline stages; 0: there is one stage
    stages: tuple[int, ...] = ONE_STAGE  #: the first layer of each
    stage: int = 0  #: of this process

    def compatibility(self, channel: str) -> Compatibility:
        return Compatibility(
            protocol=PROTOCOL_VERSION,
            model=self.model,
            fingerprint=self.fingerprint,
            layout=self.layout,
            tp_size=self.tp_size,
            tp_rank=self.tp_rank,
            hash_scheme=self.hash_scheme,
            channel=channel,
            kv_heads=self.model_heads,
            layers=self.model_layers,
            stages=self.stages,
            stage=self.stage,
        )

    @property
    def model_heads(self) -> int:
        """KV heads of all ranks together; 0: not known."""
        return self.kv_heads or (self.layout.num_kv_heads if self.tp_size == 1 else 0)

    @property
    def layers(self) -> int:
        """Of all stages together."""
        return self.model_layers or self.layout.num_layers - self.layout.draft_layers

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.tp_size, self.stages)

    @property
    def rank(self) -> int:
        """Of all of them."""
        return self.stage * self.tp_size + self.tp_rank


@dataclass(frozen=True, slots=True)
class BeltSettings:
    """Addresses and times of one belt.

    Eight heartbeats fit into a lease, so a missed one, or a process that did not run for a second, loses nothing.

    Raises:
        SettingsError: a value cannot work; with its name and what to do.
    """

    #: Where senders reach this receiver; part of ``kv_transfer_params``.
    advertised_host: str = "127.0.0.1"
    bind_host: str = "127.0.0.1"
    #: 0: any free port (``Belt.receiver_address`` tells which).
    init_port: int = 0
    alloc_port: int = 0
    liveness_port: int = 0
    #: Where the proxy takes notifications, e.g. ``"tcp://127.0.0.1:7500"``; None: none are sent.
    notification_endpoint: str | None = None
    #: This process's keys and those it trusts. None: control sockets accept every peer.
    keys: Keys | None = None
    #: Listen beyond loopback even without keys.
    insecure: bool = False
    lease_seconds: float = LEASE_SECONDS
    heartbeat_seconds: float = 0.25
    #: How long committed KV waits for its consumer. The proxy calls the decode worker as soon as the first token is
    #: known, so KV that is not claimed by then belongs to a request that ended there, or whose client has gone.
    claim_seconds: float = 5.0
    #: How long a peer may take to answer a handshake.
    handshake_seconds: float = 5.0
    #: Which digests of received KV are compared before it becomes visible (wire/digest.py).
    verify: Verify = "sample"
    #: Bytes of one write; 0: a default for the device (driver.py).
    piece_bytes: int = 0
    #: Blocks go to the belt's thread in batches of at least so many bytes. Waking it for each small layer would take
    #: the interpreter from the thread that computes.
    batch_bytes: int = 1 << 20
    #: Between two polls of running copies and writes.
    poll_seconds: float = 100e-6
    #: Between two calls of ``Channel.progress`` while a peer may be writing here.
    progress_seconds: float = 1e-3
    #: ``Channel.progress`` is also called for so long after a handshake, while the channel opens its connection.
    opening_seconds: float = 0.5
    #: A peer unused for so long is forgotten, and the channel's memory for it is freed.
    peer_idle_seconds: float = 600.0
    #: How long the end of a transfer is remembered, for messages that come late.
    memory_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.keys is not None and self.notification_endpoint is not None and self.proxy_key is None:
            raise SettingsError(f"the proxy's public key ({PROXY}.key) is not in pd_trusted_keys_dir; put it there")
        for name in (
            "lease_seconds",
            "heartbeat_seconds",
            "claim_seconds",
            "handshake_seconds",
            "poll_seconds",
            "progress_seconds",
            "opening_seconds",
        ):
            value = getattr(self, name)
            if not value > 0:
                raise SettingsError(f"{name} is {value}; it must be greater than 0")
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise SettingsError(
                f"heartbeat_seconds is {self.heartbeat_seconds} and lease_seconds {self.lease_seconds}; "
                "a lease must outlast two heartbeats"
            )
        if self.batch_bytes < 1:
            raise SettingsError(f"batch_bytes is {self.batch_bytes}; it must be at least 1")
        if self.piece_bytes < 0:
            raise SettingsError(f"piece_bytes is {self.piece_bytes}; it must not be negative")
        for name in ("init_port", "alloc_port", "liveness_port"):
            port = getattr(self, name)
            if not 0 <= port <= 65535:
                raise SettingsError(f"{name} is {port}; a port is 0 (any) to 65535")

    @property
    def proxy_key(self) -> str | None:
        """The key that the proxy must have; None: there are no keys, or it is unknown."""
        return self.keys.public_key_of(PROXY) if self.keys is not None else None
