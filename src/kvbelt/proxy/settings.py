"""What a proxy is told at its start."""

from dataclasses import dataclass

from kvbelt.errors import SettingsError
from kvbelt.security.keys import Keys
from kvbelt.security.loopback import require_keys_beyond_loopback


@dataclass(frozen=True, slots=True)
class Address:
    """Where a worker's HTTP face is."""

    host: str
    port: int

    def __post_init__(self) -> None:
        """Check."""
        if not self.host or not 0 < self.port < 65536:
            raise SettingsError(
                f"{self.host}:{self.port} is not a worker's address; give a host and a port of 1 to 65535"
            )

    @property
    def name(self) -> str:
        """``host:port``."""
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """Frozen and checked. Times are in seconds. Without prefill workers every request is served by one worker."""

    decode: tuple[Address, ...]
    prefill: tuple[Address, ...] = ()
    host: str = "127.0.0.1"
    port: int = 9100  #: 0: any free port
    notification_host: str = "127.0.0.1"
    notification_port: int = 7500  #: 0: any free port
    deadline_seconds: float = 600.0  #: a request that takes longer is ended with 504
    #: How long a decode worker waits for KV whose prompt has been computed, before it computes the prompt itself.
    kv_wait_seconds: float = 30.0
    connect_seconds: float = 5.0
    health_interval_seconds: float = 1.0
    health_timeout_seconds: float = 3.0  #: a worker silent for longer is lost
    max_body_bytes: int = 32 * 1024 * 1024
    max_answer_bytes: int = 256 * 1024 * 1024  #: of a worker, where it is not streamed
    min_prompt_tokens: int = 0  #: shorter prompts are not disaggregated
    records_kept: int = 1000
    drain_seconds: float = 2.0  #: for open requests at the end
    keys: Keys | None = None  #: of the notification port; None: whoever reaches it may notify
    insecure: bool = False  #: without keys, take notifications beyond loopback all the same

    def __post_init__(self) -> None:
        """Check."""
        require_keys_beyond_loopback(
            self.notification_host,
            keys=self.keys is not None,
            insecure=self.insecure,
            setting="--notify-host",
            how="Give --key-file and --trusted-keys-dir (kvbelt keys new DIR makes them), or --insecure",
        )
        if not self.decode:
            raise SettingsError("no decode worker; give at least one")
        for role, addresses in (("prefill", self.prefill), ("decode", self.decode)):
            if len(set(addresses)) != len(addresses):
                names = ", ".join(address.name for address in addresses)
                raise SettingsError(f"a {role} worker is given twice: {names}")
        for name in (
            "deadline_seconds",
            "kv_wait_seconds",
            "connect_seconds",
            "health_interval_seconds",
            "health_timeout_seconds",
            "max_body_bytes",
            "max_answer_bytes",
            "records_kept",
        ):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be positive")
