"""What a run is to be, and the deployment that it starts. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbelt.ops.chaos.client import Address
from kvbelt.ops.chaos.faults import KINDS, Kind
from kvbelt.ops.chaos.questions import Manners
from kvbelt.ops.processes import GIB, DeploymentSpec, Place
from kvbelt.ops.topology import Topology

#: The name of the key with which rubbish is thrown from inside.
GUEST = "guest"

#: Of the receive buffers, in prompts of the longest kind: a burst does not fit, and not even two always do.
_BUFFER_PROMPTS = 1.5

#: Of the engines' KV memory, likewise: enough that a worker that is alone gets on, little enough that requests wait and
#: that most of what is asked again is not in the prefix cache any more: KV that is not sent can do no harm.
_KV_PROMPTS = 8

#: Tokens a step: long prompts come in several chunks, so that faults find transfers half done.
_BATCH_TOKENS = 128

#: KV memory of the aggregated server, in GB.
_REFERENCE_KV_GB = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. Times are in seconds."""

    topology: Topology | None = None  #: to be started; None: ``url`` runs already
    url: Address | None = None
    admin_key: str | None = None  #: of the proxy at ``url``, which may show its records to nobody else
    reference_url: Address | None = None  #: an aggregated server that runs already
    model: Path = Path()
    seconds: float = 900.0  #: of load, the phase before the faults included
    seed: int = 0
    every: float = 2.2  #: between two faults, on average
    rate: float | None = None  #: requests a second; None: what the machine bears
    questions: int = 120
    longest: int = 700  #: tokens of the longest prompts
    kinds: tuple[Kind, ...] = KINDS
    namespaces: bool = True  #: workers get hosts of their own, where this machine allows it
    device: str = "cpu"
    dtype: str = "float32"
    max_model_len: int = 2048
    log_dir: Path | None = None
    belt: Mapping[str, Any] = field(default_factory=dict)  #: further keys of the workers' files
    command: tuple[str, ...] | None = None  #: of the deployment's processes; None: this kvbelt
    manners: Manners = field(default_factory=Manners)

    @property
    def name(self) -> str:
        """Of the deployment, for people."""
        return str(self.topology) if self.topology is not None else f"http://{self.url}"

    @property
    def workers(self) -> list[str]:
        """Names of the workers that are to be started."""
        if self.topology is None:
            return []
        return [
            *(f"prefill-{number}" for number in range(self.topology.prefill)),
            *(f"decode-{number}" for number in range(self.topology.decode)),
        ]


def aggregated_spec(plan: Plan) -> DeploymentSpec:
    """The server that says what is right: one worker, nothing disturbs it."""
    return DeploymentSpec(
        topology=Topology(0, 1),
        model=plan.model,
        device=plan.device,
        dtype=plan.dtype,
        auto_ports=True,
        threads=1,
        kv_gb=_REFERENCE_KV_GB,
        max_model_len=plan.max_model_len,
        worker_args=("--max-batch-tokens", str(_BATCH_TOKENS)),
    )


def bytes_per_token(blocks: int, block_size: int) -> float:
    """KV bytes of a token, from how many blocks the aggregated server has."""
    return _REFERENCE_KV_GB * 1e9 / (blocks * block_size)


def chaos_spec(plan: Plan, token_bytes: float, places: Mapping[str, Place], notify_host: str) -> DeploymentSpec:
    """The deployment that faults befall; its workers are in their ``places`` and tell the proxy at ``notify_host``."""
    assert plan.topology is not None
    tokens = max(plan.max_model_len, _KV_PROMPTS * plan.longest)
    return DeploymentSpec(
        topology=plan.topology,
        model=plan.model,
        device=plan.device,
        dtype=plan.dtype,
        auto_ports=True,
        threads=1,
        kv_gb=tokens * token_bytes * 1.05 / 1e9,
        buffer_gb=_BUFFER_PROMPTS * plan.longest * token_bytes / GIB,
        max_model_len=plan.max_model_len,
        worker_args=("--max-batch-tokens", str(_BATCH_TOKENS)),
        log_dir=plan.log_dir,
        command=plan.command,
        extra_keys=(GUEST,),
        belt=plan.belt,
        places=places,
        notify_host=notify_host,
    )
