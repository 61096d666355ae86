"""The description of one metric."""

from dataclasses import dataclass, field, replace
from enum import Flag, StrEnum, auto


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    SUMMARY = "summary"


class By(Flag):
    PROXY = auto()
    WORKER = auto()  #: with the embedded engine
    VLLM = auto()  #: a vLLM server with the connector


@dataclass(frozen=True, slots=True)
class Spec:
    kind: Kind
    name: str  #: as in a scrape: a counter's with ``_total``, a histogram's without ``_bucket``
    help: str
    act: str = ""  #: what to do when it moves
    labels: tuple[str, ...] = ()
    by: By = field(default=By(0))  #: default: its group's


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    specs: tuple[Spec, ...]


def group(title: str, by: By, *specs: Spec) -> Group:
    return Group(title, tuple(replace(spec, by=spec.by or by) for spec in specs))
