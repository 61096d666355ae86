"""A proxy's admin API, as a Python caller wants it: who serves there, who joins and who leaves."""

import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from kvbelt.errors import KVBeltError
from kvbelt.ops.proxy_client import ProxyClient, ProxyRefusedError

_PATH = "/kvbelt/workers"
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class AdminClient:
    """Talks to a proxy's admin API."""

    url: str
    key: str | None = None

    def workers(self) -> dict[str, Any]:
        """All workers and pairs.

        Raises:
            KVBeltError: no answer.
        """
        return self._ask("GET", "")

    def worker(self, name: str, role: str | None = None) -> dict[str, Any] | None:
        """One of them; None: there is none of this name.

        Raises:
            KVBeltError: no answer.
        """
        try:
            return self._ask("GET", self._place(name, role))
        except ProxyRefusedError as refused:
            if refused.status == 404:
                return None
            raise

    def add(self, role: str, host: str, port: int) -> dict[str, Any]:
        """A worker joins.

        Raises:
            KVBeltError: refused, or no answer.
        """
        return self._ask("POST", "", {"role": role, "host": host, "port": port})

    def remove(self, name: str, role: str | None = None) -> dict[str, Any]:
        """A worker leaves as soon as nobody needs it.

        Raises:
            KVBeltError: refused, or no answer.
        """
        return self._ask("DELETE", self._place(name, role))

    def drain(self, name: str, role: str | None = None) -> dict[str, Any]:
        """A worker gets nothing new.

        Raises:
            KVBeltError: refused, or no answer.
        """
        return self._ask("POST", self._place(name, role, "/drain"))

    def undrain(self, name: str, role: str | None = None) -> dict[str, Any]:
        """A worker is used again.

        Raises:
            KVBeltError: refused, or no answer.
        """
        return self._ask("POST", self._place(name, role, "/undrain"))

    def wait_until_idle(self, name: str, role: str | None, seconds: float) -> None:
        """Wait until nobody needs a worker, or it is gone.

        Raises:
            KVBeltError: it took longer, or no answer.
        """
        give_up = time.monotonic() + seconds
        while (found := self.worker(name, role)) is not None and found["in_flight"]:
            if time.monotonic() > give_up:
                raise KVBeltError(f"{found['in_flight']} requests need {name} after {seconds:g} s; wait on, or stop it")
            time.sleep(_POLL_SECONDS)

    @staticmethod
    def _place(name: str, role: str | None, verb: str = "") -> str:
        name = name.replace("[", "").replace("]", "")  # of an IPv6 address; a proxy names workers without
        return f"/{quote(name)}{verb}" + (f"?role={role}" if role else "")

    def _ask(self, method: str, place: str, body: Any = None) -> dict[str, Any]:
        return ProxyClient(self.url, self.key).ask(method, _PATH + place, body)
