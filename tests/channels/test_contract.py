"""What every channel promises (transfer/ports.py: Channel), checked on each of them."""

import pytest
import torch

from kvbelt.channels.memory import Fault, MemoryChannel, MemoryNetwork
from kvbelt.channels.nixl import NixlChannel
from kvbelt.errors import ChannelError
from kvbelt.transfer.ports import Reads, Region
from tests.channels.carriers import REMOTE, End, environment, maker, need
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
    """Wait for a write, helping on the other side."""

    def done():
        there.channel.progress()
        return write.done()

    eventually(done, "the write is done")
    write.release()


def test_a_write_puts_bytes_where_they_belong(ends):
    """... and nowhere else."""
    here, there, peer = ends
    here.memory.random_(0, 256)
    land(there, here.channel.write(peer, [(here.at + 100, there.at + 5000, 300)], "cpu", "cpu"))
    expected = torch.zeros_like(there.memory)
    expected[5000:5300] = here.memory[100:400]
    assert torch.equal(there.memory, expected)


def test_a_read_fetches_what_is_there(ends):
    """From a channel that can: the bytes that were asked for, into the place that was named, and nothing else."""
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
    """All of them have landed when it is done."""
    here, there, peer = ends
    here.memory.random_(0, 256)
    spans = [(here.at + i * 4096, there.at + (255 - i) * 4096, 4096) for i in range(256)]
    land(there, here.channel.write(peer, spans, "cpu", "cpu"))
    assert torch.equal(there.memory.view(256, 4096), here.memory.view(256, 4096).flip(0))


def test_many_writes_in_flight(ends):
    """Posted one after another, looked at afterwards."""
    here, there, peer = ends
    here.memory.random_(0, 256)
    writes = [
        here.channel.write(peer, [(here.at + i * 65536, there.at + i * 65536, 65536)], "cpu", "cpu") for i in range(16)
    ]
    for write in writes:
        land(there, write)
    assert torch.equal(there.memory, here.memory)


def test_release_is_idempotent(ends):
    """Twice is once."""
    here, there, peer = ends
    write = here.channel.write(peer, [(here.at, there.at, 8)], "cpu", "cpu")
    land(there, write)
    write.release()


def test_an_unknown_peer_is_an_error(ends):
    """A ChannelError, whatever the vendor raises."""
    here, there, _ = ends
    with pytest.raises(ChannelError):
        here.channel.write("nobody", [(here.at, there.at, 8)], "cpu", "cpu")


def test_a_connection_may_be_opened_before_the_first_write(ends):
    """It stays the same peer, and nothing is written."""
    here, there, peer = ends
    here.memory.fill_(1)
    here.channel.connect(peer)
    here.channel.connect(peer)
    assert not there.memory.any()
    land(there, here.channel.write(peer, [(here.at, there.at, 8)], "cpu", "cpu"))
    assert there.memory[:8].tolist() == [1] * 8


def test_connecting_to_an_unknown_peer_is_an_error(ends):
    """As a write to it is."""
    here, _, _ = ends
    with pytest.raises(ChannelError, match="nobody"):
        here.channel.connect("nobody")


def test_metadata_that_is_none_is_an_error(ends):
    """Likewise."""
    here, _, _ = ends
    with pytest.raises(ChannelError):
        here.channel.add_peer(b"this is not an agent's metadata")


def test_memory_that_is_not_registered_is_an_error(ends):
    """Neither read here nor written there."""
    here, there, peer = ends
    beyond = there.at + there.region.num_bytes
    with pytest.raises(ChannelError):
        here.channel.write(peer, [(here.at, beyond, 8)], "cpu", "cpu")
    stranger = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ChannelError):
        here.channel.write(peer, [(stranger.data_ptr(), there.at, 8)], "cpu", "cpu")


def test_a_removed_peer_is_unknown_and_can_be_learnt_again(ends):
    """Removing is also how a dead peer's memory is let go."""
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
    """With what there is instead."""
    channel = NixlChannel("x", backends=["WARP"])
    memory = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ChannelError, match=r"no backend 'WARP'.*UCX"):
        channel.register(Region(memory.data_ptr(), 8, "cpu"))


def test_a_device_that_nixl_does_not_know_is_named():
    """Before NIXL sees it."""
    memory = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ChannelError, match="device 'tpu'"):
        NixlChannel("y").register(Region(memory.data_ptr(), 8, "tpu"))


@pytest.fixture
def faulty():
    """Two memory ends and their network."""
    network = MemoryNetwork()
    here, there = End(MemoryChannel("here", network)), End(MemoryChannel("there", network))
    here.channel.add_peer(b"there")
    here.memory.fill_(1)
    return here, there, network


def test_a_stalled_write_lands_late(faulty):
    """The fault of a stopped peer."""
    here, there, network = faulty
    network.faults["there"] = Fault.STALL
    write = here.channel.write("there", [(here.at, there.at, 8)], "cpu", "cpu")
    assert not write.done()
    del network.faults["there"]
    assert write.done()
    assert there.memory[:8].tolist() == [1] * 8


def test_a_released_write_never_lands(faulty):
    """The fault of an aborted write."""
    here, there, network = faulty
    network.faults["there"] = Fault.STALL
    write = here.channel.write("there", [(here.at, there.at, 8)], "cpu", "cpu")
    write.release()
    del network.faults["there"]
    write.done()
    assert not there.memory.any()


def test_a_failed_write_raises(faulty):
    """The fault of a dead peer."""
    here, there, network = faulty
    network.faults["there"] = Fault.FAIL
    write = here.channel.write("there", [(here.at, there.at, 8)], "cpu", "cpu")
    with pytest.raises(ChannelError, match="failed"):
        write.done()


def test_a_dropped_write_is_done_and_nothing_has_arrived(faulty):
    """The fault that only comparing bytes finds."""
    here, there, network = faulty
    network.faults["there"] = Fault.DROP
    assert here.channel.write("there", [(here.at, there.at, 8)], "cpu", "cpu").done()
    assert not there.memory.any()
