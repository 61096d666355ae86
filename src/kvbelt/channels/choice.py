from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Choice:
    """The transport that a vendor has chosen for the largest messages of one operation."""

    scope: str  #: ``"intra-node"`` or ``"inter-node"``; empty: to every peer
    operation: Literal["write", "read"]
    memory: str  #: ``"host"`` or ``"cuda"``, of this side
    transport: str  #: in the vendor's words, such as ``"cma/memory"``
