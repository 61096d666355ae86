"""What a carrier has chosen by itself, where it does choose."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Choice:
    """Of the largest messages of one kind of operation."""

    scope: str  #: ``"intra-node"``, ``"inter-node"``; empty: to everybody
    operation: Literal["write", "read"]
    memory: str  #: ``"host"`` or ``"cuda"``, of this side
    transport: str  #: in the carrier's own words, as ``"cma/memory"``
