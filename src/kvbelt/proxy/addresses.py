"""Which workers a command line means: hosts, ports and how many."""

from collections.abc import Sequence

from kvbelt.errors import SettingsError
from kvbelt.proxy.settings import Address


def addresses_of(kind: str, hosts: Sequence[str], ports: Sequence[int], count: int | None) -> tuple[Address, ...]:
    """The workers of one kind.

    One host with one port and ``count`` n means n consecutive ports; several ports mean themselves. Several
    hosts have the one port each, or a port each. ``kind`` is the option's prefix, for the error.

    Raises:
        SettingsError: the three do not fit together.
    """
    if count == 0:
        return ()
    if len(hosts) == 1 and len(ports) == 1:
        last = ports[0] + (count or 1) - 1
        if last > 65535:
            raise SettingsError(f"--{kind}-port {ports[0]} and {count} workers lead to port {last}; 65535 is the last")
        return tuple(Address(hosts[0], port) for port in range(ports[0], last + 1))
    number = max(len(hosts), len(ports))
    if count not in (None, number) or not {len(hosts), len(ports)} <= {1, number}:
        raise SettingsError(
            f"--{kind}-host names {len(hosts)} hosts, --{kind}-port {len(ports)} ports, and {count or number} workers "
            "are asked for; give one host, one port, or as many of each as there are workers"
        )
    wide_hosts = hosts if len(hosts) == number else [hosts[0]] * number
    wide_ports = ports if len(ports) == number else [ports[0]] * number
    return tuple(Address(host, port) for host, port in zip(wide_hosts, wide_ports, strict=True))
