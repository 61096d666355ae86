"""What tests of other rooms need of this one, too."""

import contextlib
from collections.abc import Iterator

import pytest

from kvbelt.ops.network import Network, NetworkRefusedError


@contextlib.contextmanager
def network_of(*names: str) -> Iterator[Network]:
    """A network with a host for each name; the test is skipped where this machine forbids it."""
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(Network(names))
        except NetworkRefusedError as refused:
            pytest.skip(f"no hosts in namespaces here: {refused}")
        yield network
