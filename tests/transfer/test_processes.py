"""Real channels between real processes that are stopped and killed: nothing hangs, nothing is overwritten."""

import json
import os
import random
import signal
import subprocess
import sys

import msgspec
import pytest
import torch

from kvbelt.transfer import link_probe as probing
from kvbelt.transfer.settings import BeltSettings
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import TransferId
from kvbelt.wire.probe import ENOUGH_OPERATIONS
from tests.channels.carriers import REMOTE, environment, maker, need
from tests.transfer.belts import LAYOUT, SECONDS, Arrival, Asked, Side, Warmed, begin, eventually

pytestmark = pytest.mark.e2e

#: A lease lapses in these tests, and is short; no healthy process is late by that much.
SETTINGS = BeltSettings(lease_seconds=2.0, handshake_seconds=20.0, heartbeat_seconds=0.1, batch_bytes=1)


class Peer:
    """A prefill worker in a process of its own."""

    def __init__(self, engine, seed, kind):
        self.engine, self.seed = engine, seed
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.transfer.peer_process", engine, str(seed), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.answer() == "ready"

    def answer(self):
        """The next line."""
        line = self.process.stdout.readline()
        assert line, "the process has died"
        return json.loads(line)

    def ask(self, **order):
        """One order, one answer."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def send(self, d, name, tokens):
        """Begin a transfer."""
        address = msgspec.to_builtins(d.belt.receiver_address())
        assert self.ask(do="send", id=name, tokens=tokens, address=address) == "sending"

    def pool(self):
        """The bytes of its blocks: known from its seed."""
        pool = torch.zeros((LAYOUT.num_layers, 64, LAYOUT.block_bytes), dtype=torch.uint8)
        return pool.random_(0, 256, generator=torch.Generator().manual_seed(self.seed))

    def signal(self, number):
        """Stop, continue or kill it."""
        self.process.send_signal(number)

    def close(self):
        """End it, whatever state it is in."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(params=REMOTE)
def kind(request, monkeypatch):
    """Each channel between processes; those that are started have its environment, too."""
    need(request.param)
    for name, value in environment(request.param).items():
        monkeypatch.setenv(name, value)
    return request.param


@pytest.fixture
def start(kind):
    """Starts peers; all are gone afterwards."""
    peers = []

    def make(engine, seed):
        peers.append(Peer(engine, seed, kind))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


def new_name(role):
    """A new engine id."""
    return f"{role}-{os.getpid()}-{random.randrange(1 << 30)}"


@pytest.fixture
def d(kind):
    """The decode worker, in this process."""
    with Side(new_name("d"), "decode", maker(kind)(), staging_blocks=4 * 16, settings=SETTINGS) as side:
        yield side


def receive(d, peer, name, tokens, seed=0):
    """One whole transfer, every byte compared."""
    rng = random.Random(seed)
    here, there = rng.sample(range(64), LAYOUT.blocks(tokens)), rng.sample(range(64), LAYOUT.blocks(tokens))
    arrival = Arrival()
    peer.send(d, name, tokens)
    # Not before: an unknown transfer is lost after a lease.
    eventually(lambda: d.belt.snapshot().bytes_reserved > 0, "it is granted")
    d.belt.receive(TransferId(name), SECONDS, arrival)
    peer.ask(do="all", id=name, blocks=here)
    kv = arrival.kv()
    kv.scatter(there)
    kv.release()
    assert torch.equal(d.pool[:, there], peer.pool()[:, here])
    assert peer.ask(do="outcome", id=name) == "done"


def test_every_byte_arrives_from_two_processes(start, d):
    """This holds for every channel, whether or not it needs the receiver's help."""
    one, two = start("p1", 1), start("p2", 2)
    for number in range(3):
        receive(d, one, f"a{number}", 200, number)
        receive(d, two, f"b{number}", 77, number)


def test_a_stopped_sender_is_fenced_until_it_wakes_up(start, d, kind):
    """After SIGSTOP the transfer is lost and the slot quarantined. After SIGCONT the sender acknowledges the end."""
    peer, other = start("p1", 1), start("p2", 2)
    arrival = Arrival()
    peer.send(d, "a", 10 * 16)
    peer.ask(do="some", id="a", blocks=[1, 2, 3])
    eventually(lambda: d.belt.snapshot().bytes_reserved > 0, "it is granted")
    d.belt.receive(TransferId("a"), SECONDS, arrival)
    peer.signal(signal.SIGSTOP)
    assert arrival.lost().reason == "lease"
    quarantined = LAYOUT.slot_bytes(10)
    assert d.belt.snapshot().bytes_quarantined == quarantined
    receive(d, other, "b", 6 * 16)
    assert d.belt.snapshot().bytes_quarantined == quarantined
    peer.signal(signal.SIGCONT)
    eventually(lambda: d.belt.snapshot().bytes_quarantined == 0, "it has acknowledged")
    # Mooncake's first contact may time out while the process is stopped, and is noticed first then.
    noticed = {"lease", "peer_lost"} | ({"write_failed"} if kind == "mooncake" else set())
    assert peer.ask(do="outcome", id="a") in noticed
    receive(d, peer, "c", 200)


def test_a_killed_senders_slot_is_free_again(start, d):
    """After SIGKILL the transfer is lost within a lease, and the process table shows the death."""
    peer = start("p1", 1)
    arrival = Arrival()
    peer.send(d, "a", 16 * 16)
    eventually(lambda: d.belt.snapshot().bytes_reserved > 0, "it is granted")
    d.belt.receive(TransferId("a"), SECONDS, arrival)
    peer.signal(signal.SIGKILL)  # not waited for: a zombie is dead, too
    assert arrival.lost().reason in {"lease", "peer_lost"}
    eventually(lambda: d.belt.snapshot().bytes_quarantined == 0, "its death is noticed")
    receive(d, start("p1-again", 3), "b", 16 * 16)


@pytest.fixture
def receiver(kind):
    """A decode worker in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", RECEIVER, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process, ReceiverAddress(**json.loads(process.stdout.readline()))
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_stopped_receiver_does_not_hold_the_sender(kind, receiver):
    """The other way round: this process sends, and the receiver is frozen in the middle.

    The transfer ends and its blocks are free. Staging under a write that cannot be recalled is not: its bytes will
    leave when the receiver wakes up, and so must be those that were meant.
    """
    process, address = receiver
    with Side(new_name("p"), "prefill", maker(kind)(), settings=SETTINGS) as p:
        sending, sent = begin(p, address, "a", 160)
        eventually(lambda: p.belt.snapshot().sends.get("writing"), "it is granted")
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        sending.blocks_written(0, 0, [1, 2, 3], None)
        assert sent.outcome().reason == "peer_lost"
        sent.freed()
        if kind != "nixl":  # over shared memory the bytes may be there without its help
            assert p.belt.snapshot().staging_bytes_used > 0
            assert p.belt.snapshot().sends == {"stopping": 1}
        process.send_signal(signal.SIGCONT)
        eventually(lambda: p.belt.snapshot().staging_bytes_used == 0, "its staging is free")
        eventually(lambda: not p.belt.snapshot().sends, "the receiver has heard of it")


def test_a_killed_receiver_frees_the_senders_staging(kind, receiver):
    """Writes that could not be recalled end with the receiver's death."""
    process, address = receiver
    with Side(new_name("p"), "prefill", maker(kind)(), settings=SETTINGS) as p:
        sending, sent = begin(p, address, "a", 160)
        eventually(lambda: p.belt.snapshot().sends.get("writing"), "it is granted")
        process.send_signal(signal.SIGSTOP)
        sending.blocks_written(0, 0, [1, 2, 3], None)
        eventually(lambda: p.belt.snapshot().writes_total > 0, "it writes")
        process.kill()
        assert sent.outcome().reason in {"peer_lost", "write_failed"}
        eventually(lambda: p.belt.snapshot().staging_bytes_used == 0, "its staging is free")
        eventually(lambda: "stopping" not in p.belt.snapshot().sends, "nothing is waited for")


def test_a_link_is_measured_both_ways(kind, receiver, monkeypatch):
    """A channel that cannot read gives figures of writes only."""
    _, address = receiver
    # No pause of this machine makes an operation too slow for a larger one to follow.
    monkeypatch.setattr(probing, "QUICK_SECONDS", 1000.0)
    monkeypatch.setattr(probing, "PROBE_SECONDS", 1000.0)
    with Side(new_name("p"), "prefill", maker(kind)(), staging_blocks=4096, settings=SETTINGS) as p:
        assert Warmed(p, address).answer().ok
        probed = Asked(p, address.engine_id).answer()
        assert probed.reason == "", probed
        assert (probed.read is None) == (kind == "mooncake")
        for figures in [figures for figures in (probed.write, probed.read) if figures is not None]:
            assert figures.num_bytes == 1 << 19, "as a transfer's writes"
            assert figures.gb_per_second > 0
            assert figures.small_seconds > 0
            assert figures.operations >= ENOUGH_OPERATIONS
        eventually(lambda: not p.belt.snapshot().sends, "the receiver has heard of it")
        assert p.belt.snapshot().staging_bytes_used == 0


def test_a_receiver_that_is_stopped_while_it_is_measured(kind, receiver, monkeypatch):
    """The measurement ends, and staging under a write that cannot be recalled is not reused before its end."""
    process, address = receiver
    with Side(new_name("p"), "prefill", maker(kind)(), staging_blocks=4096, settings=SETTINGS) as p:
        assert Warmed(p, address).answer().ok
        with monkeypatch.context() as endless:
            endless.setattr(probing, "SMALL_ROUNDS", 1 << 60)
            endless.setattr(probing, "ENOUGH_SECONDS", 1e9)
            endless.setattr(probing, "PROBE_SECONDS", 1e9)
            asked = Asked(p, address.engine_id)
            eventually(lambda: p.belt.snapshot().sends.get("writing"), "it is granted")
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            assert asked.answer().reason == "peer_lost"
        if kind != "nixl":  # over shared memory the bytes may be there without its help
            assert p.belt.snapshot().staging_bytes_used > 0
        process.send_signal(signal.SIGCONT)
        eventually(lambda: not p.belt.snapshot().sends, "the receiver has heard of it")
        assert p.belt.snapshot().staging_bytes_used == 0
        assert Warmed(p, address).answer().ok
        assert Asked(p, address.engine_id).answer().reason == ""


RECEIVER = """
import json, os, sys, msgspec
from tests.channels.carriers import maker
from tests.transfer.belts import Side
with Side(f"d-{os.getpid()}", "decode", maker(sys.argv[1])(), staging_blocks=4096) as d:
    print(json.dumps(msgspec.to_builtins(d.belt.receiver_address())), flush=True)
    sys.stdin.read()
"""
