"""Belts with real sockets, in one process: over the memory channel, with faults, and over NIXL."""

import itertools
import random
import threading
import time

import msgspec
import pytest
import torch
import zmq

from kvbelt.channels.nixl import NixlChannel
from kvbelt.errors import SettingsError, StartError
from kvbelt.transfer.ports import Lost, SlotGoneError
from kvbelt.transfer.send.peers import Change
from kvbelt.transfer.settings import BeltSettings
from kvbelt.wire import codec
from kvbelt.wire import notification as n
from kvbelt.wire import reservation as w
from kvbelt.wire.handoff import DecodeOutcome, ReceiverAddress
from kvbelt.wire.handshake import PROTOCOL_VERSION
from kvbelt.wire.ids import EngineId, TransferId
from tests.channels.memory import Fault, MemoryChannel, MemoryNetwork
from tests.http.support import free_port
from tests.transfer.belts import (
    LAYOUT,
    SECONDS,
    Arrival,
    Side,
    begin,
    eventually,
    hand_over,
    pass_time,
    patient,
    some_blocks,
    transfer_once,
)
from tests.wire.messages import STEPS
from tests.wire.support import FROM_SENDER

NAMES = itertools.count()
#: For what ends when a time has passed.
QUICK = BeltSettings(lease_seconds=0.4, heartbeat_seconds=0.05, handshake_seconds=0.6)


@pytest.fixture(params=["memory", "nixl"])
def channels(request):
    """Makes channels of one kind; each name is used once."""
    network = MemoryNetwork()

    def make(name):
        unique = f"{name}-{next(NAMES)}"
        return MemoryChannel(unique, network) if request.param == "memory" else NixlChannel(unique)

    make.network = network
    return make


@pytest.fixture
def memory():
    """The memory channel, with its faults."""
    network = MemoryNetwork()

    def make(name):
        return MemoryChannel(name, network)

    make.network = network
    return make


@pytest.fixture
def pair(channels):
    """One prefill and one decode worker."""
    with Side("p", "prefill", channels("p")) as p, Side("d", "decode", channels("d")) as d:
        p.fill(1)
        yield p, d


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 200, 256])
def test_every_byte_arrives(pair, num_tokens):
    """Every byte arrives, from shuffled to shuffled blocks, whole and in chunks."""
    p, d = pair
    outcome = transfer_once(p, d, "whole", num_tokens)
    assert outcome.num_bytes == LAYOUT.slot_bytes(LAYOUT.blocks(num_tokens))
    transfer_once(p, d, "chunks", num_tokens, chunk=3)
    eventually(lambda: d.belt.snapshot().bytes_committed == 0, "the slots are free")


def test_a_short_prompt_is_few_descriptors(pair):
    """Blocks that are gathered together are written with one write."""
    p, d = pair
    assert transfer_once(p, d, "t", 100).num_writes <= 3


def test_a_prompt_larger_than_the_staging_goes_through_in_pieces(channels):
    """A prompt may be larger than the sender's buffer."""
    with (
        Side("p", "prefill", channels("p"), staging_blocks=2) as p,
        Side("d", "decode", channels("d"), staging_blocks=256) as d,
    ):
        p.fill(1)
        transfer_once(p, d, "t", 60 * 16)
        eventually(lambda: p.belt.snapshot().staging_bytes_used == 0, "the staging is free")


def test_two_senders_fill_one_receiver(channels):
    """Transfers of several prefill workers do not mix."""
    with (
        Side("p1", "prefill", channels("p1")) as p1,
        Side("p2", "prefill", channels("p2")) as p2,
        Side("d", "decode", channels("d"), staging_blocks=8 * 4 * 13) as d,
    ):
        p1.fill(1)
        p2.fill(2)
        under_way = []
        for number in range(8):
            p = (p1, p2)[number % 2]
            blocks, arrival = some_blocks(13, number), Arrival()
            d.belt.receive(TransferId(f"t{number}"), 20.0, arrival)
            sending, sent = begin(p, d.belt.receiver_address(), f"t{number}", 13 * 16)
            hand_over(sending, LAYOUT, blocks, 4)
            under_way.append((p, blocks, arrival, sent))
        for number, (p, blocks, arrival, sent) in enumerate(under_way):
            assert sent.outcome().ok
            kv, there = arrival.kv(), some_blocks(13, 100 + number)
            kv.scatter(there)
            kv.release()
            assert torch.equal(d.pool[:, there], p.pool[:, blocks])


def test_a_full_receiver_serves_waiting_transfers(channels):
    """A transfer waits for a slot, and gets the one that another consumer has released."""
    with Side("p", "prefill", channels("p")) as p, Side("d", "decode", channels("d"), staging_blocks=4 * 8) as d:
        p.fill(1)
        first, second = Arrival(), Arrival()
        d.belt.receive(TransferId("a"), 20.0, first)
        sending, _ = begin(p, d.belt.receiver_address(), "a", 8 * 16)
        hand_over(sending, LAYOUT, list(range(8)))
        kv = first.kv()
        waiting, sent = begin(p, d.belt.receiver_address(), "b", 8 * 16)
        hand_over(waiting, LAYOUT, list(range(8, 16)))
        eventually(lambda: p.belt.snapshot().sends == {"waiting": 1}, "b waits")
        assert not sent.blocks_free.is_set()
        kv.release()
        assert sent.outcome().ok
        d.belt.receive(TransferId("b"), 20.0, second)
        second.kv().scatter(list(range(20, 28)))
        assert torch.equal(d.pool[:, 20:28], p.pool[:, 8:16])
        second.kv().release()


def test_a_receiver_that_stays_full_is_the_reason(memory):
    """The deadline ends the wait for a slot, with the reason ``receiver_full``."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d"), staging_blocks=4 * 8) as d:
        sending, _ = begin(p, d.belt.receiver_address(), "a", 8 * 16)
        hand_over(sending, LAYOUT, list(range(8)))
        _, sent = begin(p, d.belt.receiver_address(), "b", 8 * 16, deadline=10.0)
        eventually(lambda: p.belt.snapshot().sends.get("waiting"), "b waits")
        pass_time(p, 10.0)
        outcome = sent.outcome()
        assert (outcome.ok, outcome.reason) == (False, "receiver_full")
        sent.freed()


def test_a_prompt_of_which_not_two_blocks_fit_is_refused(memory):
    """A prompt that can never fit is refused at once, with both sizes."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d"), staging_blocks=4) as d:
        sending, sent = begin(p, d.belt.receiver_address(), "a", 3 * 16)
        outcome = sent.outcome()
        assert outcome.reason == "too_large"
        assert f"{3 * 4 * 2048} bytes" in outcome.detail
        assert sending.failure == "too_large"
        sending.blocks_written(0, 0, [1, 2], None)  # the engine may not know yet
        sending.computed()


def test_different_layouts_are_refused_with_both_values(memory):
    """No memory is shared between engines that do not fit."""
    other = msgspec.structs.replace(LAYOUT, dtype="bfloat16")
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d"), layout=other) as d:
        _, sent = begin(p, d.belt.receiver_address(), "a", 16)
        outcome = sent.outcome()
        assert outcome.reason == "refused_dtype"
        assert "float32 here" in outcome.detail
        assert "bfloat16 there" in outcome.detail


def test_different_models_are_refused_with_both_values(memory):
    """Another model of the same shape is refused."""
    with (
        Side("p", "prefill", memory("p"), model="a", fingerprint="1") as p,
        Side("d", "decode", memory("d"), model="b", fingerprint="2") as d,
    ):
        _, sent = begin(p, d.belt.receiver_address(), "a", 16)
        outcome = sent.outcome()
        assert outcome.reason == "refused_model"
        assert "a (fingerprint 1)" in outcome.detail
        assert "b (fingerprint 2)" in outcome.detail


def test_an_engine_that_is_gone_is_named(memory):
    """A handoff to an older incarnation of a decode worker fails at once."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        address = msgspec.structs.replace(d.belt.receiver_address(), engine_id=EngineId("d-before"))
        _, sent = begin(p, address, "a", 16)
        assert sent.outcome().reason == "stale_engine"
        _, sent = begin(p, d.belt.receiver_address(), "b", 16)
        eventually(lambda: p.belt.snapshot().sends == {"writing": 1}, "the living one is reached")


def test_a_handshake_without_an_answer_is_an_outcome(memory):
    """A handshake that is not answered ends after the handshake time."""
    with Side("p", "prefill", memory("p"), settings=QUICK) as p:
        _, sent = begin(p, ReceiverAddress(EngineId("d"), "127.0.0.1", 1, 1), "a", 16)
        assert sent.outcome().reason == "peer_unreachable"


def test_a_silent_peer_does_not_hold_up_another(memory):
    """A receiver that takes nothing does not stop transfers to another one."""
    with (
        Side("p", "prefill", memory("p"), staging_blocks=16) as p,
        Side("d", "decode", memory("d")) as d,
        Side("slow", "decode", memory("slow")) as slow,
    ):
        p.fill(1)
        memory.network.faults["slow"] = Fault.STALL
        stuck, stuck_sent = begin(p, slow.belt.receiver_address(), "stuck", 8 * 16)
        hand_over(stuck, LAYOUT, list(range(8)))
        eventually(lambda: p.belt.snapshot().staging_bytes_used > 0, "it is stuck")
        for number in range(3):
            transfer_once(p, d, f"t{number}", 100, seed=number)
        assert not stuck_sent.ended.is_set()
        del memory.network.faults["slow"]
        assert stuck_sent.outcome().ok


def test_a_transfer_abandoned_in_the_turn_of_its_handshake_disturbs_no_other(memory):
    """A Welcome between the owner's cancel and the end of the bytes does no harm."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        p.fill(1)
        asked = threading.Event()

        def cancelled_then_welcomed() -> None:
            sender = p.belt._driver.sender
            (transfer,) = sender.transfers
            sender.abort(transfer, "aborted")
            sender._on_change(Change(transfer.peer))
            asked.set()

        begun = []

        def begin_and_ask() -> None:
            # Both from the belt's own thread, so that they are done in one turn: no real welcome comes between.
            begun.append(begin(p, d.belt.receiver_address(), "a", 100)[1])
            p.belt._driver.ask(cancelled_then_welcomed)

        p.belt._driver.ask(begin_and_ask)
        assert asked.wait(SECONDS)
        assert begun[0].outcome().reason == "aborted"
        transfer_once(p, d, "b", 100)


def test_a_write_that_fails_loses_the_transfer_and_nothing_else(memory):
    """After a failed write both sides end the transfer, the slot is freed, and the next transfer works."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        p.fill(1)
        memory.network.faults["d"] = Fault.FAIL
        arrival = Arrival()
        d.belt.receive(TransferId("a"), 20.0, arrival)
        sending, sent = begin(p, d.belt.receiver_address(), "a", 100)
        hand_over(sending, LAYOUT, list(range(7)))
        assert sent.outcome().reason == "write_failed"
        assert arrival.lost().reason == "write_failed"
        sent.freed()
        del memory.network.faults["d"]
        transfer_once(p, d, "b", 100)
        assert d.belt.snapshot().bytes_quarantined == 0


def test_a_stuck_write_is_fenced_until_it_is_aborted(memory):
    """The deadline tells both sides at once; the slot is quarantined until the write is known to be dead."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        memory.network.faults["d"] = Fault.STALL
        arrival = Arrival()
        d.belt.receive(TransferId("a"), 20.0, arrival)
        sending, sent = begin(p, d.belt.receiver_address(), "a", 100, deadline=10.0)
        hand_over(sending, LAYOUT, list(range(7)))
        eventually(lambda: p.belt.snapshot().staging_bytes_used > 0, "it is stuck")
        pass_time(p, 10.0)
        assert sent.outcome().reason == "deadline"
        assert arrival.lost().reason == "deadline"
        assert d.belt.snapshot().bytes_quarantined > 0
        pass_time(p, 20.0)  # a lease
        eventually(lambda: d.belt.snapshot().bytes_quarantined == 0, "the sender aborts and acknowledges")
        eventually(lambda: p.belt.snapshot().staging_bytes_used == 0, "its staging is free")
        del memory.network.faults["d"]
        assert not d.staging.any()


def test_a_cancelled_request_frees_both_sides(memory):
    """A cancel in the middle of the prompt ends the transfer and frees the blocks."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        arrival = Arrival()
        d.belt.receive(TransferId("a"), 20.0, arrival)
        sending, sent = begin(p, d.belt.receiver_address(), "a", 100)
        sending.blocks_written(0, 0, [1, 2, 3], None)
        eventually(lambda: d.belt.snapshot().bytes_reserved > 0, "it is granted")
        sending.cancel("client_gone")
        assert sent.outcome().reason == "client_gone"
        sent.freed()
        assert arrival.lost().reason == "client_gone"
        assert d.belt.snapshot().arrivals == {}
        sending.cancel("again")
        assert len(sent.outcomes) == 1


def test_a_reader_that_goes_away_frees_both_sides(memory):
    """A read that is cancelled on the decode worker ends the transfer on both sides."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        arrival = Arrival()
        cancel = d.belt.receive(TransferId("a"), 20.0, arrival)
        _, sent = begin(p, d.belt.receiver_address(), "a", 100)
        eventually(lambda: d.belt.snapshot().bytes_reserved > 0, "it is granted")
        cancel()
        assert arrival.lost().reason == "reader_gone"
        assert sent.outcome().reason == "reader_gone"
        eventually(lambda: d.belt.snapshot().bytes_quarantined == 0, "the writer has acknowledged")
        cancel()
        assert len(arrival.arrivals) == 1


def test_an_incomplete_prompt_is_never_committed(memory):
    """An engine that leaves out a layer gets an error, and the consumer no KV."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        arrival = Arrival()
        d.belt.receive(TransferId("a"), 20.0, arrival)
        sending, sent = begin(p, d.belt.receiver_address(), "a", 32)
        sending.blocks_written(0, 0, [1, 2], None)
        sending.computed()
        assert sent.outcome().reason == "incomplete"
        assert arrival.lost().reason == "incomplete"


def test_blocks_that_cannot_be_gathered_end_one_transfer(memory):
    """An engine that names a block it does not have fails its own transfer only."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        p.fill(1)
        sending, sent = begin(p, d.belt.receiver_address(), "a", 32)
        hand_over(sending, LAYOUT, [1, 64])
        outcome = sent.outcome()
        assert outcome.reason == "gather_failed"
        assert "pool of 64 blocks" in outcome.detail
        sent.freed()
        transfer_once(p, d, "b", 100)


def test_blocks_out_of_turn_are_the_callers_mistake(memory):
    """Blocks out of order, twice or beyond the prompt raise ValueError."""
    with Side("p", "prefill", memory("p")) as p:
        sending, _ = begin(p, ReceiverAddress(EngineId("d"), "127.0.0.1", 1, 1), "a", 48)
        sending.blocks_written(0, 0, [1, 2], None)
        for layer, first, blocks in ((0, 0, [1]), (0, 3, [1]), (0, 2, [1, 2]), (9, 0, [1]), (1, 1, [1])):
            with pytest.raises(ValueError, match="layer"):
                sending.blocks_written(layer, first, blocks, None)


def test_a_transfer_id_is_used_once_at_a_time(memory):
    """A second transfer of the same name fails and leaves the first alone."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        sending, sent = begin(p, d.belt.receiver_address(), "a", 16)
        _, second = begin(p, d.belt.receiver_address(), "a", 16)
        assert second.outcome().reason == "duplicate_transfer"
        assert second.blocks_free.is_set()
        hand_over(sending, LAYOUT, [3])
        assert sent.outcome().ok


def test_an_unknown_transfer_is_lost_after_a_lease(memory):
    """A transfer that no sender has mentioned is lost after a lease."""
    with Side("d", "decode", memory("d"), settings=QUICK) as d:
        arrival = Arrival()
        d.belt.receive(TransferId("a"), 20.0, arrival)
        assert arrival.lost().reason == "unknown_transfer"


def test_a_released_slot_is_gone(pair):
    """Scatter after release raises; release twice is one release."""
    p, d = pair
    arrival = Arrival()
    sending, _ = begin(p, d.belt.receiver_address(), "a", 16)
    hand_over(sending, LAYOUT, [3])
    d.belt.receive(TransferId("a"), 20.0, arrival)
    kv = arrival.kv()
    with pytest.raises(ValueError, match="0 to 1 were sent"):
        kv.scatter([1, 2])
    kv.release()
    kv.release()
    with pytest.raises(SlotGoneError):
        kv.scatter([1])


def test_the_proxy_is_notified_of_every_end(memory):
    """TransferDone has the figures, and TransferFailed has the reason."""
    context = zmq.Context()
    proxy = context.socket(zmq.PULL)
    proxy.rcvtimeo = 20_000
    port = proxy.bind_to_random_port("tcp://127.0.0.1")
    try:
        told = patient(notification_endpoint=f"tcp://127.0.0.1:{port}")
        with Side("p", "prefill", memory("p"), settings=told) as p, Side("d", "decode", memory("d")) as d:
            transfer_once(p, d, "a", 100)
            done = n.decode(proxy.recv())
            assert isinstance(done, n.TransferDone)
            assert (done.transfer_id, done.sender, done.receiver) == ("a", "p", "d")
            assert (done.num_tokens, done.num_bytes, done.channel) == (100, LAYOUT.slot_bytes(7), "memory")
            sending, _ = begin(p, d.belt.receiver_address(), "b", 100)
            sending.cancel("client_gone")
            failed = n.decode(proxy.recv())
            assert isinstance(failed, n.TransferFailed)
            assert (failed.transfer_id, failed.reason) == ("b", "client_gone")
    finally:
        proxy.close()
        context.term()


def test_the_proxy_is_told_the_newest_steps(memory):
    """By a receiver, too. What was said while there was no proxy comes once: the last."""
    context = zmq.Context()
    proxy = context.socket(zmq.PULL)
    proxy.rcvtimeo = 20_000
    port = free_port()
    try:
        told = patient(notification_endpoint=f"tcp://127.0.0.1:{port}")
        with Side("d", "decode", memory("d"), settings=told) as d:
            for decodes in range(50):
                d.belt.tell(msgspec.structs.replace(STEPS, decodes=decodes))
            d.belt.snapshot()  # the belt's thread has taken them all
            proxy.bind(f"tcp://127.0.0.1:{port}")
            first = n.decode(proxy.recv())
            assert first == n.StepsReport(engine=EngineId("d"), steps=msgspec.structs.replace(STEPS, decodes=49))
            d.belt.tell(STEPS)
            assert n.decode(proxy.recv()).steps == STEPS
    finally:
        proxy.close()
        context.term()


def test_the_proxy_is_told_every_outcome(memory):
    """Unlike steps, none may be replaced by a later one."""
    context = zmq.Context()
    proxy = context.socket(zmq.PULL)
    proxy.rcvtimeo = 20_000
    port = proxy.bind_to_random_port("tcp://127.0.0.1")
    try:
        told = patient(notification_endpoint=f"tcp://127.0.0.1:{port}")
        outcomes = [DecodeOutcome(TransferId(f"t{i}"), "recomputed", "deadline") for i in range(5)]
        with Side("d", "decode", memory("d"), settings=told) as d:
            for outcome in outcomes:
                d.belt.tell_outcome(outcome)
            got = [n.decode(proxy.recv()) for _ in outcomes]
        assert got == [n.OutcomeReport(engine=EngineId("d"), outcome=outcome) for outcome in outcomes]
    finally:
        proxy.close()
        context.term()


def test_noise_on_the_ports_is_counted_and_ignored(memory):
    """Malformed messages from unknown peers change nothing on a receiver."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        address = d.belt.receiver_address()
        context = zmq.Context()
        unknown_peer = context.socket(zmq.DEALER)
        unknown_peer.linger = 1000
        unknown_peer.connect(f"tcp://127.0.0.1:{address.init_port}")
        unknown_peer.connect(f"tcp://127.0.0.1:{address.alloc_port}")
        for _ in range(4):
            for frame in (b"", b"hello", bytes(62_000), bytes([*b"KB", PROTOCOL_VERSION, 0xC1]), b"KB\x63"):
                unknown_peer.send(frame)
        each = {"malformed": 6, "oversized": 2, "version": 2}
        eventually(lambda: d.belt.snapshot().refused_total == {"init": each, "alloc": each}, "all was counted")
        unknown_peer.close()
        context.term()
        transfer_once(p, d, "a", 100)


def test_a_sender_without_a_handshake_gets_no_slot(memory):
    """A reservation without a handshake is refused."""
    with Side("d", "decode", memory("d")) as d:
        context = zmq.Context()
        unknown_peer = context.socket(zmq.DEALER)
        unknown_peer.rcvtimeo = 20_000
        unknown_peer.connect(f"tcp://127.0.0.1:{d.belt.receiver_address().alloc_port}")
        unknown_peer.send(codec.from_sender().encode(FROM_SENDER[0]))
        assert codec.from_receiver().decode(unknown_peer.recv()).reason == "no_handshake"
        unknown_peer.close(linger=0)
        context.term()


def test_an_unknown_senders_end_message_is_acknowledged(memory):
    """A receiver that does not know a sender acknowledges its end message."""
    with Side("d", "decode", memory("d")) as d, zmq.Context() as context, context.socket(zmq.DEALER) as unknown_peer:
        unknown_peer.linger, unknown_peer.rcvtimeo = 0, 20_000
        unknown_peer.connect(f"tcp://127.0.0.1:{d.belt.receiver_address().alloc_port}")
        end_message = w.Cancel(transfer_id=TransferId("t"), slot=None, reason="lease", sender=EngineId("p"))
        unknown_peer.send(codec.from_sender().encode(end_message))
        assert codec.from_receiver().decode(unknown_peer.recv()) == w.Cancelled(transfer_id=TransferId("t"), slot=None)


def test_a_taken_port_is_named_at_start(memory):
    """A taken port is named together with the setting to change."""
    context = zmq.Context()
    taken = context.socket(zmq.ROUTER)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    try:
        with pytest.raises(StartError, match=f"port {port}.*pd_peer_alloc_port"):
            Side("d", "decode", memory("d"), settings=BeltSettings(alloc_port=port))
    finally:
        taken.close()
        context.term()


def test_a_receiver_that_restarts_is_found_again(memory):
    """A decode worker that restarts on the same ports is connected to again."""
    with Side("p", "prefill", memory("p")) as p:
        p.fill(1)
        settings = patient(init_port=free_port(), alloc_port=free_port())
        with Side("d1", "decode", memory("d1"), settings=settings) as d:
            transfer_once(p, d, "a", 100)
        with Side("d2", "decode", memory("d2"), settings=settings) as d:
            transfer_once(p, d, "b", 100)
            assert p.belt.snapshot().peers == 1


def test_closing_calls_every_callback_once(memory):
    """Closing calls every callback exactly once; afterwards every call ends with "closed"."""
    p, d = Side("p", "prefill", memory("p")), Side("d", "decode", memory("d"))
    arrival, late = Arrival(), Arrival()
    d.belt.receive(TransferId("a"), 20.0, arrival)
    _, sent = begin(p, d.belt.receiver_address(), "a", 100)
    eventually(lambda: d.belt.snapshot().bytes_reserved > 0, "it is granted")
    p.belt.close()
    assert sent.outcomes[0].reason == "closed"
    assert sent.frees == 1
    assert arrival.lost().reason == "closed"
    d.belt.receive(TransferId("b"), 20.0, late)
    d.belt.close()
    assert late.lost().reason in {"closed", "reader_gone"}
    d.belt.close()
    after = Arrival()
    d.belt.receive(TransferId("c"), 20.0, after)
    assert after.lost() == Lost("closed", "the belt is closed")
    _, sent = begin(p, ReceiverAddress(EngineId("d"), "127.0.0.1", 1, 1), "d", 16)
    assert sent.outcome().reason == "closed"
    assert p.belt.snapshot().sends == {}


def test_a_callback_that_raises_harms_no_other(memory, caplog):
    """A callback that raises is logged, and the belt goes on."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        p.fill(1)

        def bad(arrival):
            raise RuntimeError("on purpose")

        d.belt.receive(TransferId("a"), 0.05, bad)
        eventually(lambda: "on purpose" in caplog.text, "it is logged")
        transfer_once(p, d, "b", 100)


def test_an_idle_pair_sleeps(pair):
    """After a transfer both belts sleep until the next event, counted in turns of their threads."""
    p, d = pair
    transfer_once(p, d, "a", 100)
    turns = []
    for side in pair:
        driver = side.belt._driver
        eventually(lambda driver=driver: driver._progress_every == float("inf"), "the connection has been opened")
    for side in pair:
        turn = side.belt._driver._turn
        side.belt._driver._turn = lambda *a, turn=turn: (turns.append(1), turn(*a))[1]
    threading.Event().wait(0.5)
    assert len(turns) <= 4


def test_settings_that_cannot_work_are_refused():
    """A setting that cannot work is refused with its name and value."""
    with pytest.raises(SettingsError, match="lease_seconds is 0"):
        BeltSettings(lease_seconds=0)
    with pytest.raises(SettingsError, match="a lease must outlast two heartbeats"):
        BeltSettings(heartbeat_seconds=1.5)
    with pytest.raises(SettingsError, match="init_port is 70000"):
        BeltSettings(init_port=70000)


def test_many_transfers_at_once_over_a_small_receiver(channels):
    """Thirty transfers through a buffer for a few all arrive, whatever the order of the consumers."""
    with (
        Side("p", "prefill", channels("p"), staging_blocks=20) as p,
        Side("d", "decode", channels("d"), staging_blocks=4 * 16) as d,
    ):
        p.fill(3)
        rng = random.Random(7)
        under_way = {}
        for number in range(30):
            blocks, arrival = rng.sample(range(64), rng.randint(1, 9)), Arrival()
            d.belt.receive(TransferId(f"t{number}"), SECONDS, arrival)
            sending, sent = begin(p, d.belt.receiver_address(), f"t{number}", len(blocks) * 16, SECONDS)
            hand_over(sending, LAYOUT, blocks, rng.randint(1, 9))
            under_way[number] = (blocks, arrival, sent)
        give_up = time.monotonic() + SECONDS
        while under_way and time.monotonic() < give_up:
            for number, (blocks, arrival, _sent) in list(under_way.items()):
                if arrival.happened.wait(0.01):
                    there = rng.sample(range(64), len(blocks))
                    arrival.kv().scatter(there)
                    arrival.kv().release()
                    assert torch.equal(d.pool[:, there], p.pool[:, blocks])
                    del under_way[number]
        assert not under_way
        eventually(lambda: p.belt.snapshot().sent_total == {"done": 30}, "the sender knows it too")


def test_a_stall_in_the_middle_of_a_turn_is_no_silence_of_a_peer(memory):
    """What peers said meanwhile has not been read."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        p.fill(1)
        sending, sent = begin(p, d.belt.receiver_address(), "a", 100)
        eventually(lambda: p.belt.snapshot().sends == {"writing": 1}, "it is under way")
        clock = p.belt._driver.clock
        now = clock._clock

        def stand_still() -> None:
            clock._clock = lambda: now() + 1000.0

        p.belt._driver.seen(stand_still)
        hand_over(sending, LAYOUT, list(range(7)))
        assert sent.outcome().ok
