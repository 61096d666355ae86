"""Names and addresses of hosts, checked before libzmq gets them."""

import ipaddress
import re

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


def is_host(text: str) -> bool:
    """Whether it is a host's name, an IPv4 or an IPv6 address (without brackets). It need not exist."""
    if ":" not in text:
        return _NAME.fullmatch(text) is not None
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def is_port(number: int) -> bool:
    return 0 < number < 65536
