"""The table of fault kinds. inject.py does and undoes them."""

from dataclasses import dataclass
from enum import StrEnum

from kvbelt.transfer.settings import BeltSettings

#: A silent peer is believed alive for this long. Faults are shorter or longer than it.
LEASE_SECONDS = BeltSettings().lease_seconds


class Requirement(StrEnum):
    """What a fault needs from the deployment."""

    PROCESSES = "processes started by this command"
    NETWORK = "workers in network namespaces"


class TargetRole(StrEnum):
    """What a fault is applied to."""

    PREFILL = "prefill"
    DECODE = "decode"
    PROXY = "proxy"
    ANY = "any process"
    CLIENTS = "clients"


@dataclass(frozen=True, slots=True)
class FaultKind:
    name: str
    target_role: TargetRole
    what: str  #: for people
    needs: Requirement | None = None
    seconds: tuple[float, float] = (0.0, 0.0)  #: from injection to healing: minimum and maximum


_BRIEF = (0.2, LEASE_SECONDS * 0.75)
#: Longer than the lease, and sometimes longer than the proxy's timeout for a silent worker (3 s).
_LONG = (LEASE_SECONDS * 1.25, LEASE_SECONDS * 3)

KINDS = (
    FaultKind("kill-prefill", TargetRole.PREFILL, "killed (SIGKILL) and restarted", Requirement.PROCESSES),
    FaultKind("kill-decode", TargetRole.DECODE, "killed (SIGKILL) and restarted", Requirement.PROCESSES),
    FaultKind(
        "stop-prefill-briefly", TargetRole.PREFILL, "stopped for less than a lease", Requirement.PROCESSES, _BRIEF
    ),
    FaultKind("stop-prefill", TargetRole.PREFILL, "stopped for longer than a lease", Requirement.PROCESSES, _LONG),
    FaultKind("stop-decode-briefly", TargetRole.DECODE, "stopped for less than a lease", Requirement.PROCESSES, _BRIEF),
    FaultKind("stop-decode", TargetRole.DECODE, "stopped for longer than a lease", Requirement.PROCESSES, _LONG),
    FaultKind("cut-prefill", TargetRole.PREFILL, "cut off from the network", Requirement.NETWORK, (0.3, 6.0)),
    FaultKind("cut-decode", TargetRole.DECODE, "cut off from the network", Requirement.NETWORK, (0.3, 6.0)),
    FaultKind("slow-prefill", TargetRole.PREFILL, "on a slow link", Requirement.NETWORK, (1.0, 5.0)),
    FaultKind("slow-decode", TargetRole.DECODE, "on a slow link", Requirement.NETWORK, (1.0, 5.0)),
    FaultKind("full-buffer", TargetRole.CLIENTS, "a burst of long prompts that overflows the receive buffers"),
    FaultKind("rubbish-http", TargetRole.ANY, "rubbish on an HTTP port", seconds=(0.5, 3.0)),
    FaultKind("rubbish-init", TargetRole.DECODE, "rubbish on a handshake port", seconds=(0.5, 3.0)),
    FaultKind("rubbish-alloc", TargetRole.DECODE, "rubbish on a reservation port", seconds=(0.5, 3.0)),
    FaultKind("rubbish-notify", TargetRole.PROXY, "rubbish on the notification port", seconds=(0.5, 3.0)),
    FaultKind("clients-leave", TargetRole.CLIENTS, "clients that disconnect at random moments", seconds=(1.0, 3.0)),
    FaultKind("restart-proxy", TargetRole.PROXY, "the proxy ended (SIGTERM) and restarted", Requirement.PROCESSES),
)

BY_NAME = {kind.name: kind for kind in KINDS}
