"""The contract of transfer/ports.py: Channel, checked on every channel."""

import pytest
import torch

from kvbelt.channels.nixl import NixlChannel
from kvbelt.errors import ChannelError
from kvbelt.transfer.ports import Reads
from tests.channels.carriers import REMOTE, End, environment, maker, need
from tests.channels.memory import Fault, MemoryChannel, MemoryNetwork
from tests.transfer.belts import eventually


@pytest.fixture(params=["memory", *REMOTE])
def ends(request, monkeypatch):
    """Two ends that know each other, and the name of the second at the first."""
    need(request.param)
    for name, value in environment(request.param).items():
        monkeypatch.setenv(name, value)
    make = maker(request.param)
    here, there = End(make()), End(make())
    yield here, there, here.channel.add_peer(there.channel.local_metadata())
    here.channel.close()
    there.channel.close()


def land(there, write):
    """Wait for a write while the other side makes progress."""

    def done():
        there.channel.progress()
        return write.done()

    eventually(done, "the write is done")
    write.release()


def test_a_write_puts_bytes_where_they_belong(ends):
    """A write changes the bytes that it names and no others."""
    here, there, peer = ends
    here.memory.random_(0, 256)
    land(there, here.channel.write(peer, [(here.at + 100, there.at + 5000, 300)], "cpu", "cpu"))
    expected = torch.zeros_like(there.memory)
    expected[5000:5300] = here.memory[100:400]
    assert torch.equal(there.memory, expected)


def test_a_read_fetches_what_is_there(ends):
    """A read copies the named bytes to the named place and changes nothing else."""
    here, there, peer = ends
    if not isinstance(here.channel, Reads):
        pytest.skip("this channel does not read")
    there.memory.random_(0, 256)
    before = there.memory.clone()
    land(there, here.channel.read(peer, [(here.at + 100, there.at + 5000, 300)], "cpu", "cpu"))
    expected = torch.zeros_like(here.memory)
    expected[100:400] = there.memory[5000:5300]
    assert torch.equal(here.memory, expected)
    assert torch.equal(there.memory, before)


def test_one_write_of_many_spans(ends):
    """When a write of many spans is done, all of them have landed."""
    here, there, peer = ends
    here.memory.random_(0, 256)
    spans = [(here.at + i * 4096, there.at + (255 - i) * 4096, 4096) for i in range(256)]
    land(there, here.channel.write(peer, spans, "cpu", "cpu"))
    assert torch.equal(there.memory.view(256, 4096), here.memory.view(256, 4096).flip(0))


def test_many_writes_in_flight(ends):
    """Writes posted one after another all land."""
    here, there, peer = ends
    here.memory.random_(0, 256)
    writes = [
        here.channel.write(peer, [(here.at + i * 65536, there.at + i * 65536, 65536)], "cpu", "cpu") for i in range(16)
    ]
    for write in writes:
        land(there, write)
    assert torch.equal(there.memory, here.memory)


def test_release_is_idempotent(ends):
    """A second release does nothing."""
    here, there, peer = ends
    write = here.channel.write(peer, [(here.at, there.at, 8)], "cpu", "cpu")
    land(there, write)
    write.release()


def test_an_unknown_peer_is_an_error(ends):
    """A write to an unknown peer raises ChannelError, whatever the vendor raises."""
    here, there, _ = ends
    with pytest.raises(ChannelError):
        here.channel.write("nobody", [(here.at, there.at, 8)], "cpu", "cpu")


def test_a_connection_may_be_opened_before_the_first_write(ends):
    """Connecting twice writes nothing, and the first write lands afterwards."""
    here, there, peer = ends
    here.memory.fill_(1)
    here.channel.connect(peer)
    here.channel.connect(peer)
    assert not there.memory.any()
    land(there, here.channel.write(peer, [(here.at, there.at, 8)], "cpu", "cpu"))
    assert there.memory[:8].tolist() == [1] * 8


def test_connecting_to_an_unknown_peer_is_an_error(ends):
    """Connecting to an unknown peer raises ChannelError, like a write to it."""
    here, _, _ = ends
    with pytest.raises(ChannelError, match="nobody"):
        here.channel.connect("nobody")


def test_malformed_metadata_is_an_error(ends):
    """Bytes that are not metadata raise ChannelError."""
    here, _, _ = ends
    with pytest.raises(ChannelError):
        here.channel.add_peer(b"this is not an agent's metadata")


def test_memory_that_is_not_registered_is_an_error(ends):
    """A span outside registered memory of either side raises ChannelError."""
    here, there, peer = ends
    beyond = there.at + there.region.num_bytes
    with pytest.raises(ChannelError):
        here.channel.write(peer, [(here.at, beyond, 8)], "cpu", "cpu")
    unregistered = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ChannelError):
        here.channel.write(peer, [(unregistered.data_ptr(), there.at, 8)], "cpu", "cpu")


def test_a_removed_peer_is_unknown_and_can_be_learnt_again(ends):
    """A removed peer cannot be written until its metadata is added again."""
    here, there, peer = ends
    land(there, here.channel.write(peer, [(here.at, there.at, 8)], "cpu", "cpu"))
    here.channel.remove_peer(peer)
    here.channel.remove_peer(peer)
    with pytest.raises(ChannelError):
        here.channel.write(peer, [(here.at, there.at, 8)], "cpu", "cpu")
    again = here.channel.add_peer(there.channel.local_metadata())
    here.memory.fill_(7)
    land(there, here.channel.write(again, [(here.at, there.at, 8)], "cpu", "cpu"))
    assert there.memory[:8].tolist() == [7] * 8


def test_a_missing_nixl_backend_is_named():
    """The error names the missing backend and those that exist."""
    channel = NixlChannel("x", backends=["WARP"])
    with pytest.raises(ChannelError, match=r"no backend 'WARP'.*UCX"):
        channel.open({"cpu"})


def test_a_device_that_nixl_does_not_know_is_named():
    """An unknown device is refused before NIXL sees it."""
    with pytest.raises(ChannelError, match="device 'tpu'"):
        NixlChannel("y").open({"tpu"})


@pytest.fixture
def faulty():
    """Two memory ends and their network."""
    network = MemoryNetwork()
    here, there = End(MemoryChannel("here", network)), End(MemoryChannel("there", network))
    here.channel.add_peer(b"there")
    here.memory.fill_(1)
    return here, there, network


def test_a_stalled_write_lands_late(faulty):
    """A write to a stopped peer lands once the peer goes on."""
    here, there, network = faulty
    network.faults["there"] = Fault.STALL
    write = here.channel.write("there", [(here.at, there.at, 8)], "cpu", "cpu")
    assert not write.done()
    del network.faults["there"]
    assert write.done()
    assert there.memory[:8].tolist() == [1] * 8


def test_a_released_write_never_lands(faulty):
    """An aborted write never lands."""
    here, there, network = faulty
    network.faults["there"] = Fault.STALL
    write = here.channel.write("there", [(here.at, there.at, 8)], "cpu", "cpu")
    write.release()
    del network.faults["there"]
    write.done()
    assert not there.memory.any()


def test_a_failed_write_raises(faulty):
    """A write to a dead peer raises ChannelError."""
    here, there, network = faulty
    network.faults["there"] = Fault.FAIL
    write = here.channel.write("there", [(here.at, there.at, 8)], "cpu", "cpu")
    with pytest.raises(ChannelError, match="failed"):
        write.done()


def test_a_dropped_write_is_done_and_nothing_has_arrived(faulty):
    """A dropped write is reported as done; only a comparison of bytes finds it."""
    here, there, network = faulty
    network.faults["there"] = Fault.DROP
    assert here.channel.write("there", [(here.at, there.at, 8)], "cpu", "cpu").done()
    assert not there.memory.any()
