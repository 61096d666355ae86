"""Prompts larger than every buffer stream through a slot of two parts."""

import contextlib
import threading

import pytest
import torch

from kvbelt.transfer.ports import Lost, SlotGoneError
from kvbelt.transfer.send.pipeline import PLACES as PUMP_PLACES
from kvbelt.transfer.send.pipeline import WritePipeline
from kvbelt.wire.ids import TransferId
from tests.channels.memory import Fault, MemoryChannel, MemoryNetwork
from tests.transfer.belts import LAYOUT, SECONDS, Arrival, Side, begin, eventually, hand_over, patient

#: Of a prompt; the receive buffer has room for eight in every layer, so a part has two.
BLOCKS = 13
ROOM = 8 * LAYOUT.num_layers


@pytest.fixture
def network():
    """Where the channels meet."""
    return MemoryNetwork()


@contextlib.contextmanager
def made(network, verify, **times):
    """A prefill worker, and a decode worker whose buffer is smaller than the prompt."""
    sends, receives = patient(batch_bytes=1, **times), patient(verify=verify, **times)
    with (
        Side("p", "prefill", MemoryChannel("p", network), settings=sends) as p,
        Side("d", "decode", MemoryChannel("d", network), staging_blocks=ROOM, settings=receives) as d,
    ):
        p.fill(1)
        yield p, d


@pytest.fixture(params=["off", "always"])
def sides(request, network):
    """Both sides."""
    with made(network, request.param) as both:
        yield both


class Reader:
    """Scatters on a thread of its own, as a worker's loader does."""

    def __init__(self, side, transfer, blocks):
        self.error = None
        self._arrival = Arrival()
        side.belt.receive(TransferId(transfer), SECONDS, self._arrival)
        self._thread = threading.Thread(target=self._read, args=(blocks,), daemon=True)
        self._thread.start()

    def _read(self, blocks):
        kv = self._arrival.get()
        if isinstance(kv, Lost):
            self.error = kv
            return
        assert not kv.whole
        try:
            kv.scatter(blocks)
        except SlotGoneError as error:
            self.error = error
        finally:
            kv.release()

    def join(self):
        """Wait until it has read or given up."""
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the reader waits for ever"


def same(p, there, d, here):
    """Whether blocks are equal in every layer."""
    return torch.equal(p.pool[:, there], d.pool[:, here])


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_prompt_larger_than_the_buffer_arrives_whole(sides, chunk):
    """Every byte of every block is right, and nothing is held afterwards on either side."""
    p, d = sides
    there, here = list(range(20, 20 + BLOCKS)), list(range(40, 40 + BLOCKS))[::-1]
    reader = Reader(d, "a", here)
    sending, sent = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16)
    hand_over(sending, LAYOUT, there, chunk)
    reader.join()
    assert reader.error is None
    assert same(p, there, d, here)
    assert sent.outcome().ok
    assert sent.outcome().num_bytes == LAYOUT.slot_bytes(BLOCKS)
    sent.freed()
    eventually(lambda: d.belt.snapshot().arrivals == {}, "it is over")
    end = d.belt.snapshot()
    assert (end.bytes_reserved, end.bytes_committed, end.bytes_quarantined) == (0, 0, 0)
    assert end.received_total == {"done": 1}
    assert p.belt.snapshot().staging_bytes_used == 0


def test_a_reader_that_comes_late_gets_it_all_the_same(sides):
    """Two parts wait in the slot, and the rest in the prefill worker's blocks."""
    p, d = sides
    sending, sent = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16)
    blocks = list(range(BLOCKS))
    hand_over(sending, LAYOUT, blocks)
    eventually(lambda: p.belt.snapshot().writes_total > 0 and not p.belt.snapshot().staging_bytes_used, "it waits")
    assert not sent.ended.is_set()
    reader = Reader(d, "a", blocks)
    reader.join()
    assert reader.error is None
    assert sent.outcome().ok
    assert same(p, blocks, d, blocks)


def test_several_stream_through_one_buffer(sides):
    """A transfer with a slot waits for no further slot, so all of them end."""
    p, d = sides
    readers, sents, places = [], [], [list(range(start, start + BLOCKS)) for start in (0, 20, 40)]
    for number, blocks in enumerate(places):
        sending, sent = begin(p, d.belt.receiver_address(), f"t{number}", BLOCKS * 16)
        hand_over(sending, LAYOUT, blocks)
        readers.append(Reader(d, f"t{number}", blocks))
        sents.append(sent)
    for reader, sent, blocks in zip(readers, sents, places, strict=True):
        reader.join()
        assert reader.error is None
        assert sent.outcome().ok
        assert same(p, blocks, d, blocks)


def test_a_reader_that_leaves_ends_it(sides):
    """The sender is told to stop, and the slot is free once it has."""
    p, d = sides
    arrival = Arrival()
    d.belt.receive(TransferId("a"), 30.0, arrival)
    sending, sent = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16)
    kv = arrival.kv()
    kv.release()
    assert (sent.outcome().ok, sent.outcome().reason) == (False, "reader_gone")
    sending.computed()
    with pytest.raises(SlotGoneError):
        kv.scatter(list(range(BLOCKS)))
    eventually(lambda: d.belt.snapshot().arrivals == {}, "the slot is free")


def test_a_prompt_that_is_given_up_half_way_breaks_its_reader(sides):
    """The reader gets an error, because its first parts are useless."""
    p, d = sides
    reader = Reader(d, "a", list(range(BLOCKS)))
    sending, sent = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16)
    for layer in range(LAYOUT.num_layers):
        sending.blocks_written(layer, 0, list(range(5)), None)
    eventually(lambda: p.belt.snapshot().writes_total > 0, "some of it has gone")
    sending.cancel("aborted")
    reader.join()
    assert "aborted" in str(reader.error)
    assert sent.outcome().reason == "aborted"


@pytest.mark.parametrize("verify", ["off", "always"])
def test_a_writer_that_falls_silent_breaks_its_reader_and_is_fenced(network, verify):
    """Its slot is in quarantine until it acknowledges the end."""
    network.faults["d"] = Fault.STALL
    with made(network, verify, lease_seconds=3.0) as (p, d):  # after as long it aborts
        reader = Reader(d, "a", list(range(BLOCKS)))
        sending, sent = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16, deadline=1.0)
        hand_over(sending, LAYOUT, list(range(BLOCKS)))
        reader.join()
        assert "deadline" in str(reader.error)
        assert not sent.outcome().ok
        eventually(lambda: d.belt.snapshot().bytes_quarantined == 0, "its writer has stopped")


def test_closing_the_belt_wakes_a_reader(sides):
    p, d = sides
    reader = Reader(d, "a", list(range(BLOCKS)))
    begin(p, d.belt.receiver_address(), "a", BLOCKS * 16)
    eventually(lambda: d.belt.snapshot().arrivals == {"streaming": 1}, "it reads")
    d.belt.close()
    reader.join()
    assert reader.error is not None


def test_without_waiting_for_what_was_taken_parts_would_be_overwritten(sides, monkeypatch):
    """A sender that does not wait is refused, and no wrong byte is delivered."""
    p, d = sides
    assert PUMP_PLACES == 2
    begun = WritePipeline.begin

    def begin_without_waiting(self, load, target):
        begun(self, load, target)
        load.taken = len(load.parts) - 1

    monkeypatch.setattr(WritePipeline, "begin", begin_without_waiting)
    monkeypatch.setattr("kvbelt.transfer.send.pipeline.PLACES", 100)
    reader = Reader(d, "a", list(range(BLOCKS)))
    sending, sent = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16, deadline=1.0)
    hand_over(sending, LAYOUT, list(range(BLOCKS)))
    reader.join()
    assert not (reader.error is None and sent.outcome().ok and same(p, list(range(BLOCKS)), d, list(range(BLOCKS))))
    assert reader.error is not None


def test_what_is_delivered_while_the_belt_closes_waits_for_nothing(sides):
    """A prompt in parts that begins in the belt's last turn is lost at once."""
    p, d = sides
    first, sent = begin(p, d.belt.receiver_address(), "first", 16)
    hand_over(first, LAYOUT, [0])
    assert sent.outcome().ok  # they know each other
    wake = threading.Event()
    d.belt._driver.ask(lambda: wake.wait(SECONDS))
    reader = Reader(d, "a", list(range(BLOCKS)))
    sending, _ = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16)
    hand_over(sending, LAYOUT, list(range(BLOCKS)))
    eventually(lambda: p.belt.snapshot().sends == {"reserving": 1}, "it has asked for room")
    closing = threading.Thread(target=d.belt.close)
    closing.start()
    eventually(lambda: d.belt._driver._closed, "it closes")
    wake.set()
    closing.join(SECONDS)
    reader.join()
    assert reader.error is not None


def test_a_belt_that_fails_leaves_no_reader_waiting(sides):
    """An exception ends the belt's thread in the middle of a prompt in parts."""
    p, d = sides
    reader = Reader(d, "a", list(range(BLOCKS)))
    sending, _ = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16)
    sending.blocks_written(0, 0, [1], None)
    eventually(lambda: d.belt.snapshot().arrivals == {"streaming": 1}, "it has begun")

    def mistake() -> None:
        raise RuntimeError("on purpose")

    d.belt._driver.ask(mistake)
    reader.join()
    assert "released" in str(reader.error)
