"""What is to be started: ``XpYd`` says how many prefill workers and how many decode workers.

``0p1d`` is the aggregated server: workers that do both halves themselves, the yardstick of every comparison.
"""

import re
from dataclasses import dataclass

from kvbelt.errors import SettingsError

_FORM = re.compile(r"(\d+)p(\d+)d")

#: Ports of one kind are consecutive and the kinds lie 100 apart (7100, 7200, 7300, 7400), so more would collide.
MAX_WORKERS_OF_A_KIND = 100


@dataclass(frozen=True, slots=True)
class Topology:
    """How many workers of each kind."""

    prefill: int
    decode: int

    @property
    def aggregated(self) -> bool:
        """Whether every worker serves whole requests by itself."""
        return self.prefill == 0

    @property
    def workers(self) -> int:
        """Worker processes in all; the proxy is not one."""
        return self.prefill + self.decode

    def __str__(self) -> str:
        """As it was written."""
        return f"{self.prefill}p{self.decode}d"

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Read ``1p1d``.

        Raises:
            SettingsError: another form, no decode worker, or more than ``MAX_WORKERS_OF_A_KIND`` of a kind.
        """
        match = _FORM.fullmatch(text.strip().lower())
        if match is None:
            raise SettingsError(
                f"topology {text!r} is not of the form XpYd; say 1p1d, 2p2d or, for one aggregated server, 0p1d"
            )
        prefill, decode = (int(count) for count in match.groups())
        if decode == 0:
            raise SettingsError(f"topology {text!r} has no decode worker to answer with; say for example {prefill}p1d")
        if max(prefill, decode) > MAX_WORKERS_OF_A_KIND:
            raise SettingsError(f"topology {text!r} has more than {MAX_WORKERS_OF_A_KIND} workers of a kind")
        return cls(prefill, decode)
