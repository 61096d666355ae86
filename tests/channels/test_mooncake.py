"""Mooncake's own behaviour: refusals at the start, engines that are kept, writes that wait."""

import builtins
import threading
from importlib import metadata

import msgspec
import pytest

from kvbelt.channels.factory import ChannelSettings, make_channel
from kvbelt.channels.mooncake import MooncakeChannel
from kvbelt.channels.mooncake_link import MAX_POSTED, Link, Peer
from kvbelt.channels.nixl import NixlChannel
from kvbelt.errors import ChannelError
from tests.channels.carriers import End, need
from tests.transfer.belts import eventually


@pytest.fixture
def mooncake():
    """Skip the test unless Mooncake is installed and loads."""
    need("mooncake")


def test_the_factory_makes_what_the_settings_say():
    """The factory makes the channel of the settings, without loading the vendor."""
    assert isinstance(make_channel(ChannelSettings(), "a", "127.0.0.1"), NixlChannel)
    assert isinstance(make_channel(ChannelSettings("mooncake"), "a", "127.0.0.1"), MooncakeChannel)


def test_without_the_package_everything_that_is_needed_is_named(monkeypatch):
    """The error names the package, its variant for GPUs, and Debian's libraries."""
    really = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "mooncake":
            raise ImportError("libibverbs.so.1: cannot open shared object file")
        return really(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ChannelError,
        match=r"kvbelt\[mooncake\].*kvbelt\[mooncake-cuda\].*libibverbs1 and librdmacm1: libibverbs\.so\.1",
    ):
        MooncakeChannel("127.0.0.1").open({"cpu"})


def test_a_version_that_does_not_wait_for_the_peer_is_refused(mooncake, monkeypatch):
    """A version that reports writes as done before they arrive is refused."""
    monkeypatch.setattr(metadata, "version", lambda package: "0.3.12.post1")
    with pytest.raises(ChannelError, match=r"is 0\.3\.12\.post1; install 0\.3\.13"):
        MooncakeChannel("127.0.0.1").open({"cpu"})


def test_switching_the_acknowledgements_off_is_refused(mooncake, monkeypatch):
    """The variable that makes writes end before they arrive is refused."""
    monkeypatch.setenv("MC_TCP_PROTO", "1")
    with pytest.raises(ChannelError, match="MC_TCP_PROTO=1"):
        MooncakeChannel("127.0.0.1").open({"cpu"})


def test_memory_that_the_package_cannot_move_is_refused(mooncake):
    """The error names the package that can move the memory."""
    with pytest.raises(ChannelError, match="install mooncake-transfer-engine in its place"):
        MooncakeChannel("127.0.0.1").open({"cuda"})
    with pytest.raises(ChannelError, match="device 'tpu'"):
        MooncakeChannel("127.0.0.1").open({"tpu"})


def test_rdma_without_a_device_is_refused(mooncake, monkeypatch):
    """Mooncake itself would silently use TCP."""
    monkeypatch.delenv("MC_FORCE_TCP", raising=False)
    with pytest.raises(ChannelError, match="no RDMA device called warp_0; use tcp"):
        MooncakeChannel("127.0.0.1", "rdma", "warp_0").open({"cpu"})


def test_another_protocol_is_refused_with_both(mooncake):
    """The error names the protocols of both sides."""
    here = MooncakeChannel("127.0.0.1")
    there = Peer("rdma", "127.0.0.1:1", "a", [(0, 8)])
    with pytest.raises(ChannelError, match="mooncake_protocol is tcp here and rdma there"):
        here.add_peer(msgspec.json.encode(there))


def test_a_sender_has_no_memory_that_others_could_write(mooncake):
    """Only the engine whose metadata is given away has registered memory."""
    here, there = End(MooncakeChannel("127.0.0.1")), End(MooncakeChannel("127.0.0.1"))
    agent = here.channel.add_peer(there.channel.local_metadata())
    here.channel.connect(agent)
    link = here.channel._links[agent]
    eventually(lambda: link._opening.ended, "it is open")
    assert here.channel._home is None
    outsider = End(MooncakeChannel("127.0.0.1"))
    there_to_here = outsider.channel.add_peer(
        msgspec.json.encode(Peer("tcp", link._opening.engine.session, "b", [(here.at, here.region.num_bytes)]))
    )
    outsider.memory.fill_(1)
    posted = outsider.channel.write(there_to_here, [(outsider.at, here.at, 8)], "cpu", "cpu")
    with pytest.raises(ChannelError):
        eventually(posted.done, "it is refused")
    assert not here.memory.any()
    for end in (here, there, outsider):
        end.channel.close()


def test_the_engine_of_a_peer_that_has_gone_serves_the_next(mooncake):
    """An engine is kept for the next peer, because ending one stops the interpreter for up to a second."""
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


def test_an_engine_that_has_met_another_incarnation_is_not_reused(mooncake):
    """An engine remembers the memory of an earlier incarnation at an address, so it is not used for the next one."""
    channel = MooncakeChannel("127.0.0.1")
    engine = channel._make_engine()
    engine.known["10.0.0.1:7000"] = "first"
    channel._idle.append(engine)
    assert channel._take_idle(Peer("tcp", "10.0.0.1:7000", "second", [])) is None
    assert channel._take_idle(Peer("tcp", "10.0.0.1:7000", "first", [])) is engine
    engine.end()


class Still:
    """An engine whose spans land when the test says so."""

    def __init__(self):
        self.known = {}
        self.answers = threading.Event()
        self.reached = True
        self.landed = {}
        self.posted = []

    def read(self, there):
        """Wait until the test lets the peer answer."""
        self.answers.wait(60)
        return self.reached

    def submit(self, session, local, remote, num_bytes):
        self.posted.append((local, remote, num_bytes))
        return len(self.posted)

    def state_of(self, posted):
        return self.landed.get(posted)

    def end(self):
        """Nothing."""


@pytest.fixture
def still():
    """An engine, and a link to a peer over it."""
    engine = Still()
    link = Link(Peer("tcp", "there", "a", [(0, 1 << 20)]), lambda there: None, lambda: engine)
    yield engine, link
    engine.answers.set()


def opened(engine, link):
    """Wait until the link is open."""
    link.open()
    engine.answers.set()
    eventually(lambda: link._opening.ended, "it is open")


def test_what_waits_for_the_connection_can_be_recalled(still):
    """A write that waits for the connection can be recalled, and the next one is posted."""
    engine, link = still
    first, second = link.write([(1, 1, 8)]), link.write([(2, 2, 8)])
    first.release()
    with pytest.raises(ChannelError, match="aborted"):
        first.done()
    opened(engine, link)
    assert not second.done()
    assert engine.posted == [(2, 2, 8)]


def test_a_write_of_which_a_part_is_in_flight_cannot_be_recalled(still):
    """Its other spans are not posted, and it fails once no span is in flight."""
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
    """The write does not fail earlier, because its memory is in use until then."""
    engine, link = still
    opened(engine, link)
    write = link.write([(1, 1, 8), (2, 2, 8)])
    engine.landed = {1: False}
    assert not write.done()
    engine.landed[2] = True
    with pytest.raises(ChannelError, match="could not write to there"):
        write.done()


def test_a_connection_that_could_not_be_opened_is_tried_again(still):
    """Waiting writes fail with the reason; the next write makes another attempt over the same engine."""
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
