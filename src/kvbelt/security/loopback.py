"""Without keys a socket listens on loopback only."""

import ipaddress

from kvbelt.errors import SettingsError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. False for every name but ``localhost``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_keys_beyond_loopback(host: str, *, keys: bool, insecure: bool, setting: str, how: str) -> None:
    """Refuse to listen on ``host`` without keys, unless it is loopback or ``insecure``: raises SettingsError.

    The error names the ``setting`` with the host, and says ``how`` to give keys or to go without.
    """
    if not (keys or insecure or is_loopback(host)):
        raise SettingsError(
            f"{setting} is {host}, which others can reach, and there are no keys: anybody could take part. {how}"
        )
