"""Addresses are checked where they are parsed."""

import msgspec
import pytest

from kvbelt.wire.handoff import RankAddress, ReceiverAddress
from kvbelt.wire.ids import EngineId

GOOD = {"engine_id": "e", "host": "127.0.0.1", "init_port": 7300, "alloc_port": 7400}
ONE = ReceiverAddress(EngineId("d"), "10.0.0.7", 7300, 7400, "key")
TWO = msgspec.structs.replace(ONE, ranks=(RankAddress(EngineId("e"), 7301, 7401),))


@pytest.mark.parametrize("host", ["10.0.0.7", "decode-0.example", "my_service", "::1", "fe80::1%eth0", "7"])
def test_hosts_that_can_be_connected_to_are_taken(host):
    """A host is a name, an IPv4 or an IPv6 address."""
    assert msgspec.convert(GOOD | {"host": host}, ReceiverAddress).host == host


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": ""}, {"host": "a b"}, {"host": "a/b"}, {"host": "-a"}, {"host": "ä"}, {"host": "1:2"},
        {"host": "[::1]"}, {"host": "a" * 254}, {"host": "a\n"},
        {"init_port": 0}, {"init_port": -1}, {"alloc_port": 65536},
    ],
)  # fmt: skip
def test_what_cannot_be_connected_to_is_refused_with_its_value(wrong):
    """A socket would raise later, on the belt's thread."""
    (name, value), = wrong.items()  # fmt: skip
    with pytest.raises(msgspec.ValidationError, match=name) as refused:
        msgspec.convert(GOOD | wrong, ReceiverAddress)
    assert repr(value)[:20] in str(refused.value)


def test_each_rank_has_an_address() -> None:
    """All ranks have one host and one key."""
    assert TWO.of_rank(0) == ONE
    assert TWO.of_rank(1) == ReceiverAddress(EngineId("e"), "10.0.0.7", 7301, 7401, "key")


def test_one_rank_looks_as_it_always_has() -> None:
    """A single rank adds no field. Several ranks are encoded and decoded."""
    assert "ranks" not in msgspec.to_builtins(ONE)
    assert msgspec.convert(msgspec.to_builtins(TWO), ReceiverAddress) == TWO
    with pytest.raises(msgspec.ValidationError, match="alloc_port is 0"):
        msgspec.convert(GOOD | {"ranks": [{"engine_id": "e", "init_port": 1, "alloc_port": 0}]}, ReceiverAddress)
