"""What a belt is told once, at its start. Frozen; checked here; nothing else is read from anywhere."""

from dataclasses import dataclass

from kvbelt.errors import SettingsError
from kvbelt.security.keys import PROXY, Keys
from kvbelt.wire.block_hash import HASH_SCHEME
from kvbelt.wire.digest import Verify
from kvbelt.wire.handshake import PROTOCOL_VERSION, Compatibility
from kvbelt.wire.ids import EngineId
from kvbelt.wire.layout import KVLayout


@dataclass(frozen=True, slots=True)
class BeltIdentity:
    """Who this process is, and what must fit before it exchanges KV with another."""

    engine_id: EngineId  #: one life of this process; a restart makes a new one
    role: str  #: ``"prefill"``, ``"decode"`` or ``"both"``
    model: str  #: for people
    fingerprint: str  #: of architecture and weights; this is what is compared
    layout: KVLayout
    #: The worker's name across its lives, e.g. its HTTP address. A handshake from a new life under the same name
    #: proves the old one dead (its quarantined slots are freed). Empty: proves nothing.
    worker: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    hash_scheme: str = HASH_SCHEME

    def compatibility(self, channel: str) -> Compatibility:
        """What the handshake compares."""
        return Compatibility(
            protocol=PROTOCOL_VERSION,
            model=self.model,
            fingerprint=self.fingerprint,
            layout=self.layout,
            tp_size=self.tp_size,
            tp_rank=self.tp_rank,
            hash_scheme=self.hash_scheme,
            channel=channel,
        )


@dataclass(frozen=True, slots=True)
class BeltSettings:
    """Addresses and times of one belt.

    The times are chosen so that eight heartbeats fit into a lease: one missed beat, or a process that
    could not run for a second, loses nothing.
    """

    #: Where a peer reaches this receiver; it goes into ``kv_transfer_params``.
    advertised_host: str = "127.0.0.1"
    bind_host: str = "127.0.0.1"
    #: 0: any free port (``Belt.receiver_address`` tells which).
    init_port: int = 0
    alloc_port: int = 0
    #: Where the proxy takes notifications, e.g. ``"tcp://127.0.0.1:7500"``; None: nobody is told.
    notification_endpoint: str | None = None
    #: Of this process and of those it trusts. None: control sockets are open to whoever reaches them.
    keys: Keys | None = None
    #: Without keys, listen beyond loopback all the same.
    insecure: bool = False
    lease_seconds: float = 2.0
    heartbeat_seconds: float = 0.25
    #: How long committed KV waits for its reader. The proxy calls the decode worker the moment the first token is
    #: known, so KV that nobody has claimed by then belongs to a request that ended at its first token, or to a client
    #: that has gone.
    claim_seconds: float = 5.0
    #: How long a peer may take to answer a handshake.
    handshake_seconds: float = 5.0
    #: Which digests of what lands here are compared before it becomes visible (wire/digest.py).
    verify: Verify = "sample"
    #: Bytes gathered and written in one go; 0: as suits the device (belt.py).
    piece_bytes: int = 0
    #: Blocks are passed on to the belt's thread in batches of at least so many bytes: a short prompt's layers are
    #: small, and waking the thread for each of them takes the interpreter from the thread that computes.
    batch_bytes: int = 1 << 20
    #: Between two looks at copies and writes under way.
    poll_seconds: float = 100e-6
    #: Between two calls of ``Channel.progress`` while a peer may be writing here.
    progress_seconds: float = 1e-3
    #: For so long after a handshake the channel may work, too: it opens the connection (``Channel.connect``).
    opening_seconds: float = 0.5
    #: A peer unused for so long is forgotten, and what the channel holds for it is freed.
    peer_idle_seconds: float = 600.0
    #: How long the end of a transfer is remembered, for messages that come late.
    memory_seconds: float = 120.0

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            SettingsError: with the name, the value and what to do.
        """
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
        for name in ("init_port", "alloc_port"):
            port = getattr(self, name)
            if not 0 <= port <= 65535:
                raise SettingsError(f"{name} is {port}; a port is 0 (any) to 65535")

    @property
    def proxy_key(self) -> str | None:
        """Who must hold the other end of the notification socket; None: no keys, or it is not known."""
        return self.keys.public_key_of(PROXY) if self.keys is not None else None
