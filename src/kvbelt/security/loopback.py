"""Who cannot be asked for a key must not be reachable: without keys a socket listens on loopback only."""

import ipaddress

from kvbelt.errors import SettingsError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. Other names than ``localhost`` may mean anything: False."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_keys_beyond_loopback(host: str, *, keys: bool, insecure: bool, setting: str, how: str) -> None:
    """Refuse to listen where strangers are, without keys.

    Args:
        host: where it would listen.
        keys: whether there are keys.
        insecure: whether it was said that none are wanted.
        setting: the name of the setting with ``host``.
        how: which settings give keys, and which one says that none are wanted.

    Raises:
        SettingsError: it would.
    """
    if not (keys or insecure or is_loopback(host)):
        raise SettingsError(
            f"{setting} is {host}, which others can reach, and there are no keys: anybody could take part. {how}"
        )
