"""The topology of a deployment: ``XpYd`` has X prefill workers and Y decode workers.

``0p1d`` is an aggregated server, whose workers do both. It is the baseline of every comparison.
"""

import re
from dataclasses import dataclass

from kvbelt.errors import SettingsError

_FORM = re.compile(r"(\d+)p(\d+)d")

#: The port ranges of the roles are 100 apart (7100, 7200, 7300, 7400), so more workers would collide.
MAX_WORKERS_OF_A_KIND = 100


@dataclass(frozen=True, slots=True)
class Topology:
    prefill: int
    decode: int

    @property
    def aggregated(self) -> bool:
        """Whether every worker serves whole requests."""
        return self.prefill == 0

    @property
    def workers(self) -> int:
        """Number of worker processes, without the proxy."""
        return self.prefill + self.decode

    def __str__(self) -> str:
        return f"{self.prefill}p{self.decode}d"

    @classmethod
    def parse(cls, text: str, most: int = MAX_WORKERS_OF_A_KIND) -> "Topology":
        """Read ``1p1d``.

        Raises:
            SettingsError: another form, no decode worker, or more than ``most`` of a kind.
        """
        match = _FORM.fullmatch(text.strip().lower())
        if match is None:
            raise SettingsError(
                f"topology {text!r} is not of the form XpYd; say 1p1d, 2p2d or, for one aggregated server, 0p1d"
            )
        prefill, decode = (int(count) for count in match.groups())
        if decode == 0:
            raise SettingsError(f"topology {text!r} has no decode worker to answer with; say for example {prefill}p1d")
        if max(prefill, decode) > most:
            raise SettingsError(f"topology {text!r} has more than {most} workers of a kind")
        return cls(prefill, decode)
