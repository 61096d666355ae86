"""What the decode worker holds of a prompt does not travel, and what finds no room in its buffer goes beside it."""

import pytest
import torch

from kvbelt.wire.block_hash import block_hashes
from kvbelt.wire.ids import TransferId
from tests.channels.memory import MemoryChannel, MemoryNetwork
from tests.transfer.belts import LAYOUT, Arrival, Side, begin, eventually, hand_over

BLOCKS = 8
HASHES = block_hashes(list(range(BLOCKS * 16)), 16)


class Holds:
    """An engine that has the prompts' blocks with these hashes."""

    def __init__(self, hashes):
        self._hashes = set(hashes)

    def held(self, hashes):
        """As ``PrefixIndex``."""
        count = 0
        for each in hashes:
            if each not in self._hashes:
                break
            count += 1
        return count


@pytest.fixture
def make():
    """Sides of one network."""
    network, made = MemoryNetwork(), []

    def side(name, role, **options):
        made.append(Side(name, role, MemoryChannel(name, network), **options))
        return made[-1]

    yield side
    for each in made:
        each.belt.close()


@pytest.mark.parametrize("room", [64, 4], ids=["whole", "in parts"])
def test_only_the_missing_tail_travels(make, room):
    """The reader learns where it begins. Both sides count sent and reused bytes."""
    p = make("p", "prefill")
    d = make("d", "decode", prefix=Holds(HASHES[:3]), staging_blocks=room * LAYOUT.num_layers)
    p.fill(1)
    sending, sent = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16, prefix_hashes=HASHES)
    hand_over(sending, LAYOUT, list(range(BLOCKS)), chunk=2)
    arrival = Arrival()
    d.belt.receive(TransferId("a"), 20.0, arrival)
    kv = arrival.kv()
    assert (kv.first_block, kv.num_blocks) == (3, BLOCKS)
    kv.scatter(list(range(13, 18)))
    kv.release()
    assert torch.equal(d.pool[:, 13:18], p.pool[:, 3:8])
    assert not d.pool[:, :13].any()
    assert sent.outcome().num_bytes == LAYOUT.slot_bytes(5)
    sent.freed()
    eventually(lambda: d.belt.snapshot().received_total == {"done": 1}, "it is over")
    assert d.belt.snapshot().received_bytes_total == LAYOUT.slot_bytes(5)
    assert d.belt.snapshot().reused_bytes_total == LAYOUT.slot_bytes(3)


def test_blocks_that_were_not_sent_cannot_be_read(make):
    """An engine that has evicted them gets an error, and computes the prompt."""
    p, d = make("p", "prefill"), make("d", "decode", prefix=Holds(HASHES[:3]))
    sending, _ = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16, prefix_hashes=HASHES)
    hand_over(sending, LAYOUT, list(range(BLOCKS)))
    arrival = Arrival()
    d.belt.receive(TransferId("a"), 20.0, arrival)
    with pytest.raises(ValueError, match="blocks 2 to 8 to fill; 3 to 8 were sent"):
        arrival.kv().scatter(list(range(6)), first=2)


def test_of_a_prompt_that_is_all_there_the_last_block_travels(make):
    """A slot is never empty."""
    p, d = make("p", "prefill"), make("d", "decode", prefix=Holds(HASHES))
    sending, sent = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16, prefix_hashes=HASHES)
    hand_over(sending, LAYOUT, list(range(BLOCKS)))
    assert sent.outcome().num_bytes == LAYOUT.slot_bytes(1)


def test_another_prompt_shares_nothing(make):
    """Its hashes differ from the first block on."""
    p, d = make("p", "prefill"), make("d", "decode", prefix=Holds(HASHES))
    other = block_hashes([7, *range(1, BLOCKS * 16)], 16)
    sending, sent = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16, prefix_hashes=other)
    hand_over(sending, LAYOUT, list(range(BLOCKS)))
    assert sent.outcome().num_bytes == LAYOUT.slot_bytes(BLOCKS)


def test_what_finds_the_buffer_full_goes_into_the_overflow(make):
    """It is read from there byte for byte."""
    p = make("p", "prefill")
    d = make("d", "decode", staging_blocks=BLOCKS * LAYOUT.num_layers, overflow_blocks=BLOCKS * LAYOUT.num_layers)
    p.fill(2)
    arrivals = [Arrival(), Arrival()]
    for number, first in enumerate((0, 20)):
        sending, sent = begin(p, d.belt.receiver_address(), f"t{number}", BLOCKS * 16)
        hand_over(sending, LAYOUT, list(range(first, first + BLOCKS)))
        assert sent.outcome().ok
        assert d.belt.snapshot().overflow_bytes_used == number * LAYOUT.slot_bytes(BLOCKS)
    for number, first in enumerate((0, 20)):
        d.belt.receive(TransferId(f"t{number}"), 20.0, arrivals[number])
        kv = arrivals[number].kv()
        kv.scatter(list(range(first, first + BLOCKS)))
        kv.release()
        assert torch.equal(d.pool[:, first : first + BLOCKS], p.pool[:, first : first + BLOCKS])
    eventually(lambda: d.belt.snapshot().overflow_bytes_used == 0, "it is empty again")


def test_without_an_overflow_the_second_one_waits(make):
    """So the test above can fail."""
    p, d = make("p", "prefill"), make("d", "decode", staging_blocks=BLOCKS * LAYOUT.num_layers)
    begin(p, d.belt.receiver_address(), "t0", BLOCKS * 16)
    begin(p, d.belt.receiver_address(), "t1", BLOCKS * 16)
    eventually(lambda: d.belt.snapshot().arrivals == {"reserved": 1, "queued": 1}, "one has room")
