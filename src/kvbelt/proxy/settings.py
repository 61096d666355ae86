"""The settings of a proxy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from kvbelt.errors import SettingsError
from kvbelt.limits import DEFAULTS, Limits
from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.placement import Mode
from kvbelt.security.keys import Keys
from kvbelt.security.loopback import require_keys_beyond_loopback
from kvbelt.wire.hosts import is_host, is_port

SPLIT_ITL_MS = 50.0  #: the level between tokens where requests can be split
MAX_RECORDED_PROMPT = 10_000  #: characters of a prompt that a record may hold


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    def __post_init__(self) -> None:
        if not is_host(self.host) or not is_port(self.port):
            raise SettingsError(
                f"{self.host}:{self.port} is not a worker's address; give a host and a port of 1 to 65535"
            )

    @property
    def name(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """Frozen and checked; times in seconds. Without prefill workers, a decode worker serves each request alone."""

    decode: tuple[Address, ...]
    prefill: tuple[Address, ...] = ()
    host: str = "127.0.0.1"
    port: int = 9100  #: 0: any free port
    notification_host: str = "127.0.0.1"
    notification_port: int = 7500  #: 0: any free port
    deadline_seconds: float = 600.0  #: a request that takes longer is ended with 504
    #: How long a decode worker waits for KV before it computes the prompt itself, once a prefill worker has answered.
    kv_wait_seconds: float = 30.0
    max_attempts: int = 3  #: calls of one kind (prefill, decode) that a request may make
    connect_seconds: float = 2.0
    health_interval_seconds: float = 1.0
    health_timeout_seconds: float = 3.0  #: a worker silent for longer gets no new requests
    late_seconds: float = 0.5  #: a worker silent for longer is passed over while there is another one
    warm_seconds: float = 2.0  #: how long a new worker's connections may take before it gets requests
    rewarm_seconds: float = 240.0  #: between two checks of these connections
    max_answer_bytes: int = 256 * 1024 * 1024  #: of a worker's answer that is not streamed
    placement: Mode = Mode.ELASTIC
    min_prompt_tokens: int = 0  #: shorter prompts are not split
    # The service levels, in milliseconds, of requests that do not say their own.
    slo_ttft_ms: float = 500.0
    #: 0: none; None: 50 where requests can be split, else none. Workers keep it by computing less of a prompt at once,
    #: which costs TTFT: a deployment of whole requests must not be slower than plain servers.
    slo_itl_ms: float | None = None
    slo_tpot_ms: float = 0.0  #: 0: none
    max_waiting: int = 1024  #: requests that may wait for a worker; a further one is refused
    max_wait_seconds: float = 30.0  #: for a worker
    limits: Limits = DEFAULTS
    records_kept: int = 1000
    record_prompts: int = 0  #: characters of each prompt that its record keeps
    open_console: bool = False  #: the console needs no key: anyone who reaches this proxy can see its requests
    request_lines_per_second: float = 20.0  #: at most, in the log; the others are counted. 0: none
    allowed_origins: tuple[str, ...] = ("*",)  #: of web pages that may read the answers; *: every one
    #: Where traces are sent, ``http://HOST:4318``; empty: as OpenTelemetry's variables say; None: no traces.
    otlp_endpoint: str | None = None
    trace_ratio: float = 1.0  #: share of requests that are traced, if the client does not decide
    drain_seconds: float = 30.0  #: that open requests have to end when the proxy stops
    keys: Keys | None = None  #: of the notification port; None: anyone who reaches it may notify
    admin_key: str | None = field(default=None, repr=False)  #: lets its holder add and remove workers; None: no one can
    #: Workers that ask for a key get this one with the proxy's own questions. Clients' requests never carry it.
    worker_api_key: str | None = field(default=None, repr=False)
    #: The workers' hosts are DNS names, looked up repeatedly; each of their addresses is a worker.
    discover: bool = False
    discover_seconds: float = 2.0
    insecure: bool = False  #: accept notifications from other hosts without keys

    def __post_init__(self) -> None:
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
        for name in ("slo_itl_ms", "slo_tpot_ms"):
            if not 0.0 <= (getattr(self, name) or 0.0) < inf:
                raise SettingsError(f"{name} is {getattr(self, name)}; give milliseconds between tokens, or 0 for none")
        if not 0.0 <= self.trace_ratio <= 1.0:
            raise SettingsError(f"trace_ratio is {self.trace_ratio}; it lies between 0 and 1")
        if not self.decode:
            raise SettingsError("no decode worker; give at least one")
        for role, addresses in (("prefill", self.prefill), ("decode", self.decode)):
            if len(set(addresses)) != len(addresses):
                names = ", ".join(address.name for address in addresses)
                raise SettingsError(f"a {role} worker is given twice: {names}")
        for name in (
            "deadline_seconds", "kv_wait_seconds", "max_attempts", "connect_seconds", "health_interval_seconds",
            "health_timeout_seconds", "late_seconds", "warm_seconds", "rewarm_seconds",
            "max_answer_bytes", "slo_ttft_ms", "records_kept", "discover_seconds", "max_waiting", "max_wait_seconds",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be positive")

    @property
    def levels(self) -> ServiceLevels:
        """Of requests that do not say their own."""
        itl_ms = self.slo_itl_ms
        if itl_ms is None:
            itl_ms = SPLIT_ITL_MS if self.prefill and self.placement is not Mode.WHOLE else 0.0
        return ServiceLevels(self.slo_ttft_ms / 1e3, itl_ms / 1e3 or None, self.slo_tpot_ms / 1e3 or None)


def addresses_of(kind: str, hosts: Sequence[str], ports: Sequence[int], count: int | None) -> tuple[Address, ...]:
    """The workers of one kind.

    One host with one port and ``count`` n means n consecutive ports; several ports mean themselves. Several
    hosts have the one port each, or a port each. Else it raises SettingsError, with ``kind``, the option's prefix.
    """
    if count == 0:
        return ()
    if len(hosts) == 1 and len(ports) == 1:
        last = ports[0] + (count or 1) - 1
        if last > 65535:
            raise SettingsError(f"--{kind}-port {ports[0]} and {count} workers lead to port {last}; 65535 is the last")
        return tuple(Address(hosts[0], port) for port in range(ports[0], last + 1))
    number = max(len(hosts), len(ports))
    if count not in (None, number) or not {len(hosts), len(ports)} <= {1, number}:
        raise SettingsError(
            f"--{kind}-host names {len(hosts)} hosts, --{kind}-port {len(ports)} ports, and {count or number} workers "
            "are asked for; give one host, one port, or as many of each as there are workers"
        )
    return tuple(Address(hosts[i % len(hosts)], ports[i % len(ports)]) for i in range(number))
