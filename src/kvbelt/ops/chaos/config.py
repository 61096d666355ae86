"""The settings of a run, and the deployments that it starts. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbelt.ops.chaos.faults import KINDS, FaultKind
from kvbelt.ops.chaos.questions import RequestMix
from kvbelt.ops.http_client import Address
from kvbelt.ops.processes import GIB, DeploymentSpec, Place
from kvbelt.ops.topology import Topology
from kvbelt.routing.placement import Mode

#: The name of the key with which rubbish is sent as a trusted peer.
GUEST = "guest"

#: Size of the receive buffers in longest prompts: a burst does not fit, and not always two prompts.
_BUFFER_PROMPTS = 1.5

#: KV memory of the engines in longest prompts. One worker alone must get on; but requests should wait, and most
#: repeated prompts should have left the prefix cache, because KV that is not transferred cannot be corrupted.
_KV_PROMPTS = 8

#: Tokens per step: long prompts take several chunks, so that faults meet transfers half done.
_BATCH_TOKENS = 128

#: KV memory of the aggregated server, in GB.
_REFERENCE_KV_GB = 0.5


@dataclass(frozen=True, slots=True)
class ChaosConfig:
    """One run. Times are in seconds."""

    topology: Topology | None = None  #: to start; None: use the proxy at ``url``
    url: Address | None = None
    admin_key: str | None = None  #: of the proxy at ``url``
    reference_url: Address | None = None  #: a running aggregated server
    model: Path = Path()
    seconds: float = 900.0  #: of load, including the phase before the faults
    seed: int = 0
    every: float = 2.2  #: between two faults, on average
    rate: float | None = None  #: requests/s; None: by the machine's speed
    questions: int = 120
    longest: int = 700  #: longest prompts, in tokens
    kinds: tuple[FaultKind, ...] = KINDS
    namespaces: bool = True  #: give workers network namespaces, where this machine allows it
    device: str = "cpu"
    dtype: str = "float32"
    max_model_len: int = 2048
    log_dir: Path | None = None
    belt: Mapping[str, Any] = field(default_factory=dict)  #: more keys of the workers' files
    command: tuple[str, ...] | None = None  #: starts the processes; None: this kvbelt
    placement: Mode = Mode.SPLIT  #: so that KV crosses, whatever the load
    mix: RequestMix = field(default_factory=RequestMix)

    @property
    def name(self) -> str:
        return str(self.topology) if self.topology is not None else f"http://{self.url}"

    @property
    def workers(self) -> list[str]:
        """Names of the workers to start."""
        if self.topology is None:
            return []
        return [
            *(f"prefill-{number}" for number in range(self.topology.prefill)),
            *(f"decode-{number}" for number in range(self.topology.decode)),
        ]


def aggregated_spec(config: ChaosConfig) -> DeploymentSpec:
    """The reference server: one worker, without faults."""
    return DeploymentSpec(
        topology=Topology(0, 1),
        model=config.model,
        device=config.device,
        dtype=config.dtype,
        auto_ports=True,
        threads=1,
        kv_gb=_REFERENCE_KV_GB,
        max_model_len=config.max_model_len,
        worker_args=("--max-batch-tokens", str(_BATCH_TOKENS)),
    )


def bytes_per_token(blocks: int, block_size: int) -> float:
    """Computed from the number of blocks in the aggregated server's KV memory."""
    return _REFERENCE_KV_GB * 1e9 / (blocks * block_size)


def chaos_spec(
    config: ChaosConfig, token_bytes: float, places: Mapping[str, Place], notify_host: str
) -> DeploymentSpec:
    """The deployment under test. Workers run in their ``places`` and notify the proxy at ``notify_host``."""
    assert config.topology is not None
    tokens = max(config.max_model_len, _KV_PROMPTS * config.longest)
    return DeploymentSpec(
        topology=config.topology,
        model=config.model,
        device=config.device,
        dtype=config.dtype,
        auto_ports=True,
        threads=1,
        kv_gb=tokens * token_bytes * 1.05 / 1e9,
        buffer_gb=_BUFFER_PROMPTS * config.longest * token_bytes / GIB,
        max_model_len=config.max_model_len,
        worker_args=("--max-batch-tokens", str(_BATCH_TOKENS)),
        log_dir=config.log_dir,
        command=config.command,
        extra_keys=(GUEST,),
        belt=config.belt,
        places=places,
        notify_host=notify_host,
        proxy_args=("--placement", config.placement),
    )
