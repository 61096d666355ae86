"""Who may change a proxy's workers, and who may read its requests.

A change always needs the admin key. Reading needs it unless the client is on this machine: the proxy listens on
loopback, and was reached under a loopback name (a web page could make its own name point here). ``open_console`` lets
everybody read.
"""

import hmac

from kvbelt.errors import RequestError
from kvbelt.http import Exchange
from kvbelt.proxy.settings import ProxySettings
from kvbelt.security.loopback import is_loopback


class Access:
    def __init__(self, settings: ProxySettings) -> None:
        self._key = settings.admin_key
        self.has_key = self._key is not None  #: workers can be changed at all
        self._open = settings.open_console
        self._on_loopback = is_loopback(settings.host)

    def require_admin(self, exchange: Exchange) -> None:
        """Raises RequestError: 401, the client has another key or none; 403, this proxy has none."""
        if not self._holds_key(exchange):
            raise self._refusal(
                "this needs the admin key",
                "workers cannot be changed: this proxy has no admin key; start it with --admin-key-file FILE",
            )

    def require_view(self, exchange: Exchange) -> None:
        """Require the right to read requests. Raises as ``require_admin``."""
        if self._open or self._holds_key(exchange):
            return
        if self._on_loopback and names_loopback(exchange.request.headers.get(b"host", b"")):
            return
        raise self._refusal(
            "to see requests from elsewhere, the admin key is needed",
            "requests are shown on this machine only, because this proxy has no admin key; start it with "
            "--admin-key-file FILE, or with --open-console if everybody who reaches it may see them",
        )

    def _refusal(self, with_key: str, without_key: str) -> RequestError:
        if self._key is None:
            return RequestError(without_key, status=403, kind="permission_error")
        return RequestError(f"{with_key}, as Authorization: Bearer KEY", status=401, kind="authentication_error")

    def _holds_key(self, exchange: Exchange) -> bool:
        if self._key is None:
            return False
        scheme, _, given = exchange.request.headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key.encode())


def names_loopback(authority: bytes) -> bool:
    """Whether ``Host`` is a loopback name, or missing: a client without one is not a browser."""
    host = authority.decode("latin-1")
    host = host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return not host or is_loopback(host.strip("[]").lower())
