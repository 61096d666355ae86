"""One metric: its name, kind and labels, what it means, and what to do when it moves."""

from dataclasses import dataclass
from enum import Flag, StrEnum, auto


class Kind(StrEnum):
    """Prometheus' kinds."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    SUMMARY = "summary"


class By(Flag):
    """Whose ``/metrics`` has it."""

    PROXY = auto()
    WORKER = auto()  #: with the embedded engine
    VLLM = auto()  #: a vLLM server with the connector


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric."""

    name: str  #: as it stands in a scrape: of a counter with ``_total``, of a histogram without ``_bucket``
    kind: Kind
    help: str
    act: str  #: what to do when it moves
    labels: tuple[str, ...] = ()
    by: By = By.PROXY


@dataclass(frozen=True, slots=True)
class Group:
    """Metrics that are about one thing."""

    title: str
    specs: tuple[Spec, ...]
