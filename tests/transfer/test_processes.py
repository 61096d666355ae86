"""Real NIXL between real processes that are stopped and killed: nothing hangs, nothing is overwritten."""

import json
import os
import random
import signal
import subprocess
import sys

import msgspec
import pytest
import torch

from kvbelt.channels.nixl import NixlChannel
from kvbelt.transfer.settings import BeltSettings
from kvbelt.wire.ids import TransferId
from tests.transfer.belts import LAYOUT, Arrival, Side, eventually

pytestmark = pytest.mark.e2e

SETTINGS = BeltSettings(lease_seconds=1.0, heartbeat_seconds=0.1)


class Peer:
    """A prefill worker in a process of its own."""

    def __init__(self, engine, seed, **environment):
        self.engine, self.seed = engine, seed
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.transfer.peer_process", engine, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
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


@pytest.fixture
def start():
    """Starts peers; all are gone afterwards."""
    peers = []

    def make(engine, seed, **environment):
        peers.append(Peer(engine, seed, **environment))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture
def d():
    """The decode worker, in this process."""
    name = f"d-{os.getpid()}-{random.randrange(1 << 30)}"
    with Side(name, "decode", NixlChannel(name), staging_blocks=4 * 16, settings=SETTINGS) as side:
        yield side


def receive(d, peer, name, tokens, seed=0):
    """One whole transfer, every byte compared."""
    rng = random.Random(seed)
    here, there = rng.sample(range(64), LAYOUT.blocks(tokens)), rng.sample(range(64), LAYOUT.blocks(tokens))
    arrival = Arrival()
    d.belt.receive(TransferId(name), 20.0, arrival)
    peer.send(d, name, tokens)
    peer.ask(do="all", id=name, blocks=here)
    kv = arrival.kv()
    kv.scatter(there)
    kv.release()
    assert torch.equal(d.pool[:, there], peer.pool()[:, here])
    assert peer.ask(do="outcome", id=name) == "done"


@pytest.mark.parametrize("tls", ["", "tcp"])
def test_every_byte_arrives_from_two_processes(start, d, tls):
    """Over what UCX chooses by itself, and over TCP, where the receiver must help."""
    environment = {"UCX_TLS": tls} if tls else {}
    one, two = start("p1", 1, **environment), start("p2", 2, **environment)
    for number in range(3):
        receive(d, one, f"a{number}", 200, number)
        receive(d, two, f"b{number}", 77, number)


def test_a_stopped_sender_is_fenced_until_it_wakes_up(start, d):
    """SIGSTOP: lost within the lease, quarantined; SIGCONT: it hears of it, stops, acknowledges."""
    peer, other = start("p1", 1), start("p2", 2)
    arrival = Arrival()
    d.belt.receive(TransferId("a"), 20.0, arrival)
    peer.send(d, "a", 10 * 16)
    peer.ask(do="some", id="a", blocks=[1, 2, 3])
    eventually(lambda: d.belt.snapshot().bytes_reserved > 0, "it is granted")
    peer.signal(signal.SIGSTOP)
    assert arrival.lost(10).reason == "lease"
    quarantined = LAYOUT.slot_bytes(10)
    assert d.belt.snapshot().bytes_quarantined == quarantined
    receive(d, other, "b", 6 * 16)
    assert d.belt.snapshot().bytes_quarantined == quarantined
    peer.signal(signal.SIGCONT)
    eventually(lambda: d.belt.snapshot().bytes_quarantined == 0, "it has acknowledged")
    assert peer.ask(do="outcome", id="a") in {"lease", "peer_lost"}
    receive(d, peer, "c", 200)


def test_a_killed_senders_slot_is_free_again(start, d):
    """Kill -9: lost within the lease; its death is seen in the process table."""
    peer = start("p1", 1)
    arrival = Arrival()
    d.belt.receive(TransferId("a"), 20.0, arrival)
    peer.send(d, "a", 16 * 16)
    eventually(lambda: d.belt.snapshot().bytes_reserved > 0, "it is granted")
    peer.signal(signal.SIGKILL)  # not waited for: a zombie is dead, too
    assert arrival.lost(10).reason in {"lease", "peer_lost"}
    eventually(lambda: d.belt.snapshot().bytes_quarantined == 0, "its death is noticed")
    receive(d, start("p1-again", 3), "b", 16 * 16)


def test_a_stopped_receiver_does_not_hold_the_sender(start):
    """The other way round: this process sends, and the receiver is frozen in the middle."""
    receiver = subprocess.Popen(
        [sys.executable, "-c", RECEIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address = json.loads(receiver.stdout.readline())
        name = f"p-{os.getpid()}-{random.randrange(1 << 30)}"
        with Side(name, "prefill", NixlChannel(name), settings=SETTINGS) as p:
            from kvbelt.wire.handoff import ReceiverAddress  # noqa: PLC0415
            from tests.transfer.belts import begin  # noqa: PLC0415

            sending, sent = begin(p, ReceiverAddress(**address), "a", 160)
            sending.blocks_written(0, 0, [1, 2, 3], None)
            eventually(lambda: p.belt.snapshot().writes_total > 0, "it writes")
            receiver.send_signal(signal.SIGSTOP)
            assert sent.outcome(10).reason == "peer_lost"
            assert sent.blocks_free.wait(10)
            eventually(lambda: p.belt.snapshot().staging_bytes_used == 0, "its staging is free")
    finally:
        receiver.kill()
        receiver.wait()
        receiver.stdin.close()
        receiver.stdout.close()


RECEIVER = """
import json, os, sys, msgspec
from kvbelt.channels.nixl import NixlChannel
from tests.transfer.belts import Side
with Side(f"d-{os.getpid()}", "decode", NixlChannel(f"d-{os.getpid()}")) as d:
    print(json.dumps(msgspec.to_builtins(d.belt.receiver_address())), flush=True)
    sys.stdin.read()
"""
