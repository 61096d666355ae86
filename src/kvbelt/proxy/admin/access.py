"""Who may change a proxy's workers, and who may look at its requests.

Changing asks for the admin key, always. Looking asks for it where others than this machine's users could look: where
the proxy listens beyond loopback, or was reached under a name that is not loopback's (a page of somebody's that has its
own name point here would be such a one). ``open_console`` says that everybody may look.
"""

import hmac

from kvbelt.errors import RequestError
from kvbelt.http import Exchange
from kvbelt.proxy.settings import ProxySettings
from kvbelt.security.loopback import is_loopback


class Access:
    """The rules of one proxy."""

    def __init__(self, settings: ProxySettings) -> None:
        self._key = settings.admin_key
        self._open = settings.open_console
        self._on_loopback = is_loopback(settings.host)

    @property
    def has_key(self) -> bool:
        """Whether anybody may change workers."""
        return self._key is not None

    def require_admin(self, exchange: Exchange) -> None:
        """Let whoever holds the key pass.

        Raises:
            RequestError: 401, another key or none; 403, there is none here.
        """
        if self._key is None:
            raise RequestError(
                "workers cannot be changed: this proxy has no admin key; start it with --admin-key-file FILE",
                status=403,
                kind="permission_error",
            )
        if not self._holds_key(exchange):
            raise RequestError(
                "this needs the admin key, as Authorization: Bearer KEY", status=401, kind="authentication_error"
            )

    def require_view(self, exchange: Exchange) -> None:
        """Let whoever may look pass.

        Raises:
            RequestError: 401, a key is needed; 403, there is none here.
        """
        if self._open or self._holds_key(exchange):
            return
        if self._on_loopback and names_loopback(exchange.request.headers.get(b"host", b"")):
            return
        if self._key is None:
            raise RequestError(
                "requests are shown on this machine only, as this proxy has no admin key; start it with "
                "--admin-key-file FILE, or with --open-console if everybody who reaches it may see them",
                status=403,
                kind="permission_error",
            )
        raise RequestError(
            "to see requests from elsewhere, the admin key is needed, as Authorization: Bearer KEY",
            status=401,
            kind="authentication_error",
        )

    def _holds_key(self, exchange: Exchange) -> bool:
        if self._key is None:
            return False
        scheme, _, given = exchange.request.headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key.encode())


def names_loopback(authority: bytes) -> bool:
    """Whether ``Host`` is a name of this machine for itself; a client without one is no browser."""
    host = authority.decode("latin-1")
    host = host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return not host or is_loopback(host.strip("[]").lower())
