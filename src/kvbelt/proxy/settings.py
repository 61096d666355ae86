"""What a proxy is told at its start."""

from dataclasses import dataclass, field

from kvbelt.errors import SettingsError
from kvbelt.security.keys import Keys
from kvbelt.security.loopback import require_keys_beyond_loopback
from kvbelt.wire.hosts import is_host, is_port

#: Characters of a prompt that a record may hold.
MAX_RECORDED_PROMPT = 10_000


@dataclass(frozen=True, slots=True)
class Address:
    """Where a worker's HTTP face is."""

    host: str
    port: int

    def __post_init__(self) -> None:
        """Check."""
        if not is_host(self.host) or not is_port(self.port):
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
    max_attempts: int = 3  #: legs of one kind that a request may have, its first one included
    connect_seconds: float = 2.0
    health_interval_seconds: float = 1.0
    health_timeout_seconds: float = 3.0  #: a worker silent for longer is lost
    late_seconds: float = 0.5  #: a worker silent for longer is passed over while there is another
    warm_seconds: float = 2.0  #: how long a new worker's connections are waited for before it takes requests
    rewarm_seconds: float = 240.0  #: between two looks at whether they are still there
    max_body_bytes: int = 32 * 1024 * 1024
    max_answer_bytes: int = 256 * 1024 * 1024  #: of a worker, where it is not streamed
    min_prompt_tokens: int = 0  #: shorter prompts are not disaggregated
    records_kept: int = 1000
    record_prompts: int = 0  #: characters of each prompt that are kept with its record
    open_console: bool = False  #: whoever reaches this proxy may see its requests, without a key
    request_lines_per_second: float = 20.0  #: of the log, at most; what is more is counted. 0: none
    #: Where traces go, ``http://HOST:4318``; empty: where OpenTelemetry's variables say; None: there are none.
    otlp_endpoint: str | None = None
    trace_ratio: float = 1.0  #: share of the requests that is traced, where the client does not say
    drain_seconds: float = 2.0  #: for open requests at the end
    keys: Keys | None = None  #: of the notification port; None: whoever reaches it may notify
    admin_key: str | None = field(default=None, repr=False)  #: of whoever may add and remove workers; None: nobody
    #: The workers' hosts are names, looked up again and again, and each address that one has is a worker.
    discover: bool = False
    discover_seconds: float = 2.0
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
        if not 0 <= self.record_prompts <= MAX_RECORDED_PROMPT:
            raise SettingsError(
                f"record_prompts is {self.record_prompts}; it is a number of characters, at most {MAX_RECORDED_PROMPT}"
            )
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise SettingsError(f"otlp_endpoint is {self.otlp_endpoint!r}; say http://HOST:4318, OTLP over HTTP")
        if not 0.0 <= self.trace_ratio <= 1.0:
            raise SettingsError(f"trace_ratio is {self.trace_ratio}; it lies between 0 and 1")
        if not self.decode:
            raise SettingsError("no decode worker; give at least one")
        for role, addresses in (("prefill", self.prefill), ("decode", self.decode)):
            if len(set(addresses)) != len(addresses):
                names = ", ".join(address.name for address in addresses)
                raise SettingsError(f"a {role} worker is given twice: {names}")
        for name in (
            "deadline_seconds",
            "kv_wait_seconds",
            "max_attempts",
            "connect_seconds",
            "health_interval_seconds",
            "health_timeout_seconds",
            "late_seconds",
            "warm_seconds",
            "rewarm_seconds",
            "max_body_bytes",
            "max_answer_bytes",
            "records_kept",
            "discover_seconds",
        ):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be positive")
