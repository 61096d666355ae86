"""The kinds of faults: a table. How each is done and undone is inject.py's."""

from dataclasses import dataclass
from enum import StrEnum

from kvbelt.transfer.settings import BeltSettings

#: What bounds how long a silent peer is believed to live: faults are shorter or longer than this.
LEASE_SECONDS = BeltSettings().lease_seconds


class Need(StrEnum):
    """What a fault asks of the deployment."""

    PROCESSES = "processes that this command has started"
    NETWORK = "workers on hosts of their own"


class Whom(StrEnum):
    """Whom a fault befalls."""

    PREFILL = "prefill"
    DECODE = "decode"
    PROXY = "proxy"
    ANY = "any process"
    CLIENTS = "clients"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault."""

    name: str
    whom: Whom
    what: str  #: for people
    needs: Need | None = None
    seconds: tuple[float, float] = (0.0, 0.0)  #: from the injection to the healing, at least and at most


_BRIEF = (0.2, LEASE_SECONDS * 0.75)
#: Past the lease, and at times past the proxy's patience with a silent worker (3 s).
_LONG = (LEASE_SECONDS * 1.25, LEASE_SECONDS * 3)

KINDS = (
    Kind("kill-prefill", Whom.PREFILL, "killed (SIGKILL) and started again", Need.PROCESSES),
    Kind("kill-decode", Whom.DECODE, "killed (SIGKILL) and started again", Need.PROCESSES),
    Kind("stop-prefill-briefly", Whom.PREFILL, "stopped for less than a lease", Need.PROCESSES, _BRIEF),
    Kind("stop-prefill", Whom.PREFILL, "stopped for longer than a lease", Need.PROCESSES, _LONG),
    Kind("stop-decode-briefly", Whom.DECODE, "stopped for less than a lease", Need.PROCESSES, _BRIEF),
    Kind("stop-decode", Whom.DECODE, "stopped for longer than a lease", Need.PROCESSES, _LONG),
    Kind("cut-prefill", Whom.PREFILL, "cut off from the network", Need.NETWORK, (0.3, 6.0)),
    Kind("cut-decode", Whom.DECODE, "cut off from the network", Need.NETWORK, (0.3, 6.0)),
    Kind("slow-prefill", Whom.PREFILL, "on a slow link", Need.NETWORK, (1.0, 5.0)),
    Kind("slow-decode", Whom.DECODE, "on a slow link", Need.NETWORK, (1.0, 5.0)),
    Kind("full-buffer", Whom.CLIENTS, "a burst of long prompts, more than the receive buffers hold"),
    Kind("rubbish-http", Whom.ANY, "rubbish on an HTTP port", seconds=(0.5, 3.0)),
    Kind("rubbish-init", Whom.DECODE, "rubbish on a handshake port", seconds=(0.5, 3.0)),
    Kind("rubbish-alloc", Whom.DECODE, "rubbish on a reservation port", seconds=(0.5, 3.0)),
    Kind("rubbish-notify", Whom.PROXY, "rubbish on the notification port", seconds=(0.5, 3.0)),
    Kind("clients-leave", Whom.CLIENTS, "clients that hang up at random moments", seconds=(1.0, 3.0)),
    Kind("restart-proxy", Whom.PROXY, "the proxy ended (SIGTERM) and started again", Need.PROCESSES),
)

BY_NAME = {kind.name: kind for kind in KINDS}
