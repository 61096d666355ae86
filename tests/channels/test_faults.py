"""What every channel promises about peers that are stopped, killed or removed: real processes, real signals.

The belt has the deadlines. A channel must only tell the truth at any time, and never hold the thread that asks.
"""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from kvbelt.errors import ChannelError
from tests.channels.carriers import REMOTE, End, environment, maker, need
from tests.transfer.belts import eventually

pytestmark = pytest.mark.e2e

#: A call that waits for a peer takes as long as the peer likes; one that does not is done in milliseconds.
#: So is one on a machine that stands still for some seconds in the middle of it.
HELD_SECONDS = 10.0

#: More than fits into the buffers of a socket.
LARGE = 64 << 20


class Peer:
    """A process with an end of a channel."""

    def __init__(self, kind):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.channels.peer_process", kind, str(LARGE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment(kind)},
        )
        words = self.process.stdout.readline().split()
        assert len(words) == 2, "the process has died"
        self.metadata, self.at = bytes.fromhex(words[0]), int(words[1])

    def bytes_at(self, offset, num_bytes):
        """The bytes of its memory."""
        self.process.stdin.write(f"{offset} {num_bytes}\n")
        self.process.stdin.flush()
        return bytes.fromhex(self.process.stdout.readline())

    def stop(self):
        """Stop the process; returns once it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(params=REMOTE)
def kind(request, monkeypatch):
    """Each channel between processes."""
    need(request.param)
    for name, value in environment(request.param).items():
        monkeypatch.setenv(name, value)
    return request.param


@pytest.fixture
def start(kind):
    """Starts peers, and ends them after the test."""
    peers = []

    def make():
        peers.append(Peer(kind))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture
def here(kind, start):
    """This process's end, which closes before its peers end."""
    end = End(maker(kind)(), LARGE)
    end.memory.random_(0, 256)
    yield end
    end.channel.close()


def prompt(call, *arguments):
    """Make a call that must not wait for the peer, and return its result."""
    began = time.monotonic()
    try:
        return call(*arguments)
    finally:
        assert time.monotonic() - began < HELD_SECONDS, f"{call} has held its thread"


def write(here, peer, agent, num_bytes, offset=0):
    """Post one write."""
    span = (here.at + offset, peer.at + offset, num_bytes)
    return prompt(here.channel.write, agent, [span], "cpu", "cpu")


def land(here, peer, agent, num_bytes, offset=0):
    """Write, wait for the end, and compare the last bytes."""
    posted = write(here, peer, agent, num_bytes, offset)
    eventually(lambda: prompt(posted.done), "the write is done")
    posted.release()
    last = offset + num_bytes - min(num_bytes, 4096)
    assert peer.bytes_at(last, offset + num_bytes - last) == here.memory[last : offset + num_bytes].numpy().tobytes()


def ends(posted):
    """Whether the write is done or has failed, so that nothing of it is in flight."""
    try:
        return prompt(posted.done)
    except ChannelError:
        return True


def keep_writing(here, peer, agent):
    """Write until one write fails. Earlier ones may be done without the peer's help."""
    while True:
        posted = write(here, peer, agent, 4096)
        eventually(lambda posted=posted: prompt(posted.done), "it ends")


def stays_in_flight(here, posted):
    """The write stays in flight however often the belt polls it."""
    for _ in range(100):
        prompt(here.channel.progress)
        assert not prompt(posted.done)
        threading.Event().wait(1e-3)


def test_a_write_reaches_another_process(here, start):
    """The first write over a new connection lands, and so does one that is larger than any buffer on the way."""
    peer = start()
    agent = here.channel.add_peer(peer.metadata)
    land(here, peer, agent, 4096)
    land(here, peer, agent, LARGE)


def test_a_peer_stopped_at_first_contact_delays_no_call(here, start):
    """A stopped peer delays no call, and no write to another peer; its own write lands after SIGCONT."""
    standing, other = start(), start()
    standing.stop()
    agent = prompt(here.channel.add_peer, standing.metadata)
    prompt(here.channel.connect, agent)
    posted = write(here, standing, agent, 4096)
    stays_in_flight(here, posted)
    land(here, other, here.channel.add_peer(other.metadata), 1 << 20)
    assert not prompt(posted.done)
    standing.go_on()
    eventually(lambda: prompt(posted.done), "the write is done")
    assert standing.bytes_at(0, 4096) == here.memory[:4096].numpy().tobytes()


def test_a_peer_that_stops_later_delays_no_call(here, start):
    """Writes to a peer that stops later end after SIGCONT, and delay no write to another peer."""
    standing, other = start(), start()
    agents = [here.channel.add_peer(peer.metadata) for peer in (standing, other)]
    land(here, standing, agents[0], 4096)
    land(here, other, agents[1], 4096)
    standing.stop()
    writes = [write(here, standing, agents[0], LARGE // 4, i * LARGE // 4) for i in range(4)]
    land(here, other, agents[1], 1 << 20)
    standing.go_on()
    for posted in writes:
        eventually(lambda posted=posted: prompt(posted.done), "the write is done")
        posted.release()
    assert standing.bytes_at(0, LARGE) == here.memory.numpy().tobytes()


def test_a_killed_peers_writes_fail(here, start):
    """Every write to a killed peer fails with a reason; the peer can be removed, and others are written."""
    peer, other = start(), start()
    agents = [here.channel.add_peer(one.metadata) for one in (peer, other)]
    land(here, peer, agents[0], 4096)
    peer.stop()
    writes = [write(here, peer, agents[0], LARGE // 4, i * LARGE // 4) for i in range(4)]
    peer.kill()
    with pytest.raises(ChannelError):
        keep_writing(here, peer, agents[0])
    for posted in writes:
        eventually(lambda posted=posted: ends(posted), "it ends")
        prompt(posted.release)
    prompt(here.channel.remove_peer, agents[0])
    land(here, other, agents[1], 1 << 20)


def test_a_dead_peer_fails_the_first_write(here, start):
    """The first write to a dead peer fails."""
    peer = start()
    agent = here.channel.add_peer(peer.metadata)
    peer.kill()
    with pytest.raises(ChannelError):
        keep_writing(here, peer, agent)


def test_removing_a_stopped_peer_is_quick_and_reports_writes_in_flight(here, start):
    """Releasing a write that cannot be recalled raises until the write has ended, well or not."""
    peer, other = start(), start()
    agents = [here.channel.add_peer(one.metadata) for one in (peer, other)]
    land(here, peer, agents[0], 4096)
    peer.stop()
    writes = [write(here, peer, agents[0], LARGE // 16, i * LARGE // 16) for i in range(16)]
    prompt(here.channel.remove_peer, agents[0])
    with pytest.raises(ChannelError, match="not known"):
        write(here, peer, agents[0], 8)
    in_use = []
    for posted in writes:
        try:
            prompt(posted.release)
        except ChannelError:
            in_use.append(posted)
    land(here, other, agents[1], 1 << 20)
    peer.kill()
    for posted in in_use:
        eventually(lambda posted=posted: ends(posted), "it ends")
        posted.release()


def test_a_peer_removed_while_it_stood_is_learnt_again(here, start):
    """Writes in flight to a removed peer land before later writes, and do not prevent these."""
    peer = start()
    peer.stop()
    agent = here.channel.add_peer(peer.metadata)
    posted = write(here, peer, agent, 4096)
    assert not prompt(posted.done)
    prompt(here.channel.remove_peer, agent)
    again = prompt(here.channel.add_peer, peer.metadata)
    prompt(here.channel.connect, again)
    peer.go_on()
    land(here, peer, again, 1 << 20, offset=8192)
    eventually(lambda: ends(posted), "it ends")
    prompt(posted.release)
    prompt(here.channel.remove_peer, again)
    agent = here.channel.add_peer(peer.metadata)
    land(here, peer, agent, 4096)


def test_a_released_write_never_lands_later(here, start):
    """Either it is recalled, and stays away from a peer that wakes up later, or its release raises until it has landed.

    NIXL lets go of a write's handle, and of its peer, while the bytes are still to come.
    """
    peer = start()
    peer.stop()
    agent = here.channel.add_peer(peer.metadata)
    posted = write(here, peer, agent, 4096)
    prompt(here.channel.remove_peer, agent)
    recalled = True
    try:
        prompt(posted.release)
    except ChannelError:
        recalled = False
        before = here.memory[:4096].clone()
    peer.go_on()
    land(here, peer, here.channel.add_peer(peer.metadata), 4096, offset=8192)
    if recalled:
        assert not any(peer.bytes_at(0, 4096))
        return
    eventually(lambda: ends(posted), "it ends")
    posted.release()
    here.memory[:4096] = 0  # the memory is used for something else now
    land(here, peer, here.channel.add_peer(peer.metadata), 4096, offset=16384)
    assert peer.bytes_at(0, 4096) in {before.numpy().tobytes(), bytes(4096)}


def test_a_peer_may_close_and_another_come(here, start):
    """The next incarnation of a peer is another agent, and can be written."""
    for _ in range(2):
        peer = start()
        agent = here.channel.add_peer(peer.metadata)
        land(here, peer, agent, 4096)
        peer.kill()
        prompt(here.channel.remove_peer, agent)
