"""What is Mooncake's own: what is refused at the start, engines that are kept, writes that wait."""

import builtins
import threading
from importlib import metadata

import msgspec
import pytest
import torch

from kvbelt.channels.factory import ChannelSettings, make_channel
from kvbelt.channels.mooncake import MooncakeChannel
from kvbelt.channels.mooncake_link import MAX_POSTED, Link, Peer
from kvbelt.channels.nixl import NixlChannel
from kvbelt.errors import ChannelError
from kvbelt.transfer.ports import Region
from tests.channels.carriers import End, need
from tests.transfer.belts import eventually


@pytest.fixture
def mooncake():
    """It is installed and loads."""
    need("mooncake")


@pytest.fixture
def memory():
    """A region that nobody writes."""
    tensor = torch.zeros(8, dtype=torch.uint8)
    return Region(tensor.data_ptr(), 8, "cpu")


def test_the_factory_makes_what_the_settings_say():
    """Nothing is loaded yet."""
    assert isinstance(make_channel(ChannelSettings(), "a", "127.0.0.1"), NixlChannel)
    assert isinstance(make_channel(ChannelSettings("mooncake"), "a", "127.0.0.1"), MooncakeChannel)


def test_without_the_package_everything_that_is_needed_is_named(memory, monkeypatch):
    """The package, its twin for GPUs, and Debian's libraries."""
    really = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "mooncake":
            raise ImportError("libibverbs.so.1: cannot open shared object file")
        return really(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ChannelError, match=r"transfer-engine-non-cuda.*libibverbs1 and librdmacm1: libibverbs\.so\.1"):
        MooncakeChannel("127.0.0.1").register(memory)


def test_a_version_that_does_not_wait_for_the_peer_is_refused(mooncake, memory, monkeypatch):
    """Its writes would be committed before they have arrived."""
    monkeypatch.setattr(metadata, "version", lambda package: "0.3.12.post1")
    with pytest.raises(ChannelError, match=r"is 0\.3\.12\.post1; install 0\.3\.13"):
        MooncakeChannel("127.0.0.1").register(memory)


def test_switching_the_acknowledgements_off_is_refused(mooncake, memory, monkeypatch):
    """As that would be."""
    monkeypatch.setenv("MC_TCP_PROTO", "1")
    with pytest.raises(ChannelError, match="MC_TCP_PROTO=1"):
        MooncakeChannel("127.0.0.1").register(memory)


def test_memory_that_the_package_cannot_move_is_refused(mooncake):
    """The package that can is named."""
    with pytest.raises(ChannelError, match="install mooncake-transfer-engine in its place"):
        MooncakeChannel("127.0.0.1").register(Region(0, 8, "cuda"))
    with pytest.raises(ChannelError, match="device 'tpu'"):
        MooncakeChannel("127.0.0.1").register(Region(0, 8, "tpu"))


def test_rdma_without_a_device_is_refused(mooncake, memory, monkeypatch):
    """Mooncake itself would use TCP, and say nothing."""
    monkeypatch.delenv("MC_FORCE_TCP", raising=False)
    with pytest.raises(ChannelError, match="no RDMA device called warp_0; use tcp"):
        MooncakeChannel("127.0.0.1", "rdma", "warp_0").register(memory)


def test_another_protocol_is_refused_with_both(mooncake):
    """A peer that speaks RDMA cannot be written over TCP."""
    here = MooncakeChannel("127.0.0.1")
    there = Peer("rdma", "127.0.0.1:1", "a", [(0, 8)])
    with pytest.raises(ChannelError, match="mooncake_protocol is tcp here and rdma there"):
        here.add_peer(msgspec.json.encode(there))


def test_a_sender_has_no_memory_that_others_could_write(mooncake):
    """Only who gives its metadata away has an engine with memory; a connection's own has none."""
    here, there = End(MooncakeChannel("127.0.0.1")), End(MooncakeChannel("127.0.0.1"))
    agent = here.channel.add_peer(there.channel.local_metadata())
    here.channel.connect(agent)
    link = here.channel._links[agent]
    eventually(lambda: link._opening.ended, "it is open")
    assert here.channel._home is None
    stranger = End(MooncakeChannel("127.0.0.1"))
    there_to_here = stranger.channel.add_peer(
        msgspec.json.encode(Peer("tcp", link._opening.engine.session, "b", [(here.at, here.region.num_bytes)]))
    )
    stranger.memory.fill_(1)
    posted = stranger.channel.write(there_to_here, [(stranger.at, here.at, 8)], "cpu", "cpu")
    with pytest.raises(ChannelError):
        eventually(posted.done, "it is refused")
    assert not here.memory.any()
    for end in (here, there, stranger):
        end.channel.close()


def test_the_engine_of_a_peer_that_has_gone_serves_the_next(mooncake):
    """Ending one stops the interpreter for up to a second, so it is not done while there is work."""
    here = End(MooncakeChannel("127.0.0.1"))
    there = [End(MooncakeChannel("127.0.0.1")) for _ in range(2)]
    engines = []
    for end in there:
        agent = here.channel.add_peer(end.channel.local_metadata())
        here.channel.connect(agent)
        link = here.channel._links[agent]
        eventually(lambda link=link: link._opening.ended, "it is open")
        engines.append(link._opening.engine)
        here.channel.remove_peer(agent)
    assert engines[0] is engines[1]
    for end in (here, *there):
        end.channel.close()


def test_an_engine_that_has_met_another_life_at_an_address_is_not_taken(mooncake):
    """It remembers where that life's memory was, and would write there."""
    channel = MooncakeChannel("127.0.0.1")
    engine = channel._make_engine()
    engine.known["10.0.0.1:7000"] = "first"
    channel._idle.append(engine)
    assert channel._take_idle(Peer("tcp", "10.0.0.1:7000", "second", [])) is None
    assert channel._take_idle(Peer("tcp", "10.0.0.1:7000", "first", [])) is engine
    engine.end()


class Still:
    """An engine that is told when what has landed."""

    def __init__(self):
        self.known = {}
        self.answers = threading.Event()
        self.reached = True
        self.landed = {}
        self.posted = []

    def read(self, there):
        """Wait to be told that the peer answers."""
        self.answers.wait(60)
        return self.reached

    def submit(self, session, local, remote, num_bytes):
        """Post."""
        self.posted.append((local, remote, num_bytes))
        return len(self.posted)

    def state_of(self, posted):
        """As told."""
        return self.landed.get(posted)

    def end(self):
        """Nothing."""


@pytest.fixture
def still():
    """An engine, and the link to a peer over it."""
    engine = Still()
    link = Link(Peer("tcp", "there", "a", [(0, 1 << 20)]), lambda there: None, lambda: engine)
    yield engine, link
    engine.answers.set()


def opened(engine, link):
    """The link, open."""
    link.open()
    engine.answers.set()
    eventually(lambda: link._opening.ended, "it is open")


def test_what_waits_for_the_connection_can_be_recalled(still):
    """It has not left; the next one does."""
    engine, link = still
    first, second = link.write([(1, 1, 8)]), link.write([(2, 2, 8)])
    first.release()
    with pytest.raises(ChannelError, match="aborted"):
        first.done()
    opened(engine, link)
    assert not second.done()
    assert engine.posted == [(2, 2, 8)]


def test_a_write_of_which_a_part_is_in_flight_cannot_be_recalled(still):
    """Its other spans stay here, and it is an error only when nothing of it is in flight."""
    engine, link = still
    opened(engine, link)
    write = link.write([(i, i, 1) for i in range(MAX_POSTED + 2)])
    assert len(engine.posted) == MAX_POSTED
    with pytest.raises(ChannelError, match=f"{MAX_POSTED} spans to there are in flight"):
        write.release()
    engine.landed = dict.fromkeys(range(1, MAX_POSTED), True)
    assert not write.done()
    with pytest.raises(ChannelError, match="1 spans"):
        write.release()
    engine.landed[MAX_POSTED] = True
    with pytest.raises(ChannelError, match="aborted"):
        write.done()
    write.release()
    assert len(engine.posted) == MAX_POSTED


def test_a_failed_span_fails_the_write_once_the_others_have_ended(still):
    """Until then its memory is in use."""
    engine, link = still
    opened(engine, link)
    write = link.write([(1, 1, 8), (2, 2, 8)])
    engine.landed = {1: False}
    assert not write.done()
    engine.landed[2] = True
    with pytest.raises(ChannelError, match="could not write to there"):
        write.done()


def test_a_connection_that_could_not_be_opened_is_tried_again(still):
    """What waited fails with the reason; the next write makes another attempt, over the same engine."""
    engine, link = still
    engine.reached = False
    write = link.write([(1, 1, 8)])
    opened(engine, link)
    with pytest.raises(ChannelError, match="could not reach there: it does not answer"):
        write.done()
    engine.reached = True
    again = link.write([(2, 2, 8)])
    eventually(lambda: again.done() or engine.posted, "it is posted")
    assert engine.posted == [(2, 2, 8)]
