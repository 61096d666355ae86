"""Received bytes are compared with the sent ones before they become visible."""

import itertools

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from kvbelt.paged_copy import TorchPagedCopy
from kvbelt.transfer.receive.checks import Checks, cells_of
from kvbelt.transfer.receive.commands import Check
from kvbelt.transfer.receive.slots import Slot
from kvbelt.transfer.receive.states import Verified
from kvbelt.transfer.shape import SlotShape
from kvbelt.wire import reservation as w
from kvbelt.wire.digest import SAMPLE, Choice, joined, plus
from kvbelt.wire.ids import EngineId, SlotName, TransferId
from tests.channels.memory import Fault, MemoryChannel, MemoryNetwork
from tests.transfer.belts import LAYOUT, Arrival, Side, begin, eventually, hand_over, patient
from tests.transfer.sessions import COMMIT, receiver_in

BLOCKS = 16


@pytest.fixture(params=[64, 8], ids=["whole", "in parts"])
def pair(request):
    """Two sides with this check. The second buffer is smaller than the prompt."""
    network = MemoryNetwork()
    made = []

    def make(verify):
        room = request.param * LAYOUT.num_layers
        made.append(Side("p", "prefill", MemoryChannel("p", network)))
        made.append(
            Side("d", "decode", MemoryChannel("d", network), staging_blocks=room, settings=patient(verify=verify))
        )
        made[0].fill(7)
        return *made, network

    yield make
    for side in made:
        side.belt.close()


def fate(p, d):
    """Send a prompt. Returns the results of its reader and its sender."""
    arrival = Arrival()
    d.belt.receive(TransferId("a"), 20.0, arrival)
    sending, sent = begin(p, d.belt.receiver_address(), "a", BLOCKS * 16)
    hand_over(sending, LAYOUT, list(range(BLOCKS)))
    got = arrival.get()
    lost = getattr(got, "reason", None)
    if lost is None:
        try:
            got.scatter(list(range(BLOCKS)))
        except Exception as error:  # noqa: BLE001 -- its text is what is looked at
            lost = str(error).partition(":")[0]
        got.release()
    return lost, sent.outcome().reason


@pytest.mark.parametrize("verify", ["sample", "always"])
def test_bytes_that_never_landed_are_no_answer(pair, verify):
    """If a write is reported as done and has not landed, the reader loses its KV, and the failure is counted."""
    p, d, network = pair(verify)
    network.faults["d"] = Fault.DROP
    assert fate(p, d) == ("digest", "digest")
    assert d.belt.snapshot().received_total == {"digest": 1}
    assert p.belt.snapshot().sent_total == {"digest": 1}
    eventually(lambda: d.belt.snapshot().arrivals == {}, "nothing is held")


def test_with_the_check_off_the_same_fault_is_not_noticed(pair):
    """So the test above can fail."""
    p, d, network = pair("off")
    network.faults["d"] = Fault.DROP
    assert fate(p, d) == (None, "done")
    assert not torch.equal(p.pool[:, :BLOCKS], d.pool[:, :BLOCKS])


@pytest.mark.parametrize("verify", ["off", "sample", "always"])
def test_right_bytes_pass(pair, verify):
    """This holds for every kind of check."""
    p, d, _ = pair(verify)
    assert fate(p, d) == (None, "done")
    assert torch.equal(p.pool[:, :BLOCKS], d.pool[:, :BLOCKS])


class EndsBetweenLooks:
    """A copier whose digests are done at the third question."""

    def __init__(self):
        self.asked = 0

    def of(self, shape):
        return self

    def digest_received(self, offset, cells, region=0):
        return self

    def done(self):
        self.asked += 1
        return self.asked > 2

    def value(self):
        return 7


def test_a_check_that_ends_between_two_looks_is_reported_once():
    """A GPU computes the digest in parallel, so it may end at any time."""
    shape = SlotShape(LAYOUT, 4, 0, 4)
    slot = Slot(SlotName(EngineId("d"), 0, 1), 0, 0, shape.slot_bytes)
    checks = Checks(EndsBetweenLooks(), "always")
    assert checks.begin(Check(TransferId("a"), slot, shape, None, 7)) is None
    told = [verdict for _ in range(4) for verdict in checks.ended()]
    assert told == [(TransferId("a"), Verified(None, right=True))]
    assert not checks.under_way


def test_a_writer_hears_while_its_bytes_are_checked():
    """The sender gets answers during a long check, so it does not lose the receiver."""
    verifying = receiver_in("verifying")
    (answer,) = verifying.handle(msgspec.structs.replace(COMMIT, digest=7), 5.0)
    assert isinstance(answer.message, w.Renewed)


def staged(seed):
    """A staging buffer of random bytes, and its copier."""
    memory = torch.zeros(64 * LAYOUT.block_bytes, dtype=torch.uint8)
    memory.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    layers = [torch.zeros(4, LAYOUT.block_bytes, dtype=torch.uint8)]
    return memory, TorchPagedCopy(layers, send_staging=memory, receive_staging=memory)


def digest_of(copy, transfer="a", verify="always", blocks=16):
    """The digest of a slot at the buffer's start."""
    shape = SlotShape(LAYOUT, blocks, 0, blocks)
    cells = cells_of(TransferId(transfer), shape, shape.part(0), verify)
    return copy.digest_received(0, cells).value()


@settings(deadline=None, max_examples=50)
@given(at=strategies.integers(0, 64 * LAYOUT.block_bytes - 1), change=strategies.integers(1, 255))
def test_a_single_wrong_byte_is_found(at, change):
    """Its place and its value do not matter."""
    memory, copy = staged(3)
    before = digest_of(copy)
    memory[at] = (int(memory[at]) + change) % 256
    assert digest_of(copy) != before


def test_blocks_in_each_others_places_are_found():
    """A digest also covers each block's place."""
    memory, copy = staged(4)
    before = digest_of(copy)
    blocks = memory.view(64, LAYOUT.block_bytes)
    blocks[[5, 9]] = blocks[[9, 5]]
    assert digest_of(copy) != before


def test_another_transfers_bytes_are_found():
    """Bytes that are right for one transfer are wrong for any other."""
    _, copy = staged(5)
    assert digest_of(copy, "a") != digest_of(copy, "b")


@settings(deadline=None, max_examples=50)
@given(cuts=strategies.lists(strategies.integers(1, 15), max_size=5, unique=True), verify=strategies.sampled_from(["sample", "always"]))  # fmt: skip # noqa: E501
def test_the_pieces_of_a_prompt_add_up_to_the_whole(cuts, verify):
    """Sizes and order of the pieces do not matter."""
    _, copy = staged(6)
    choice = Choice(TransferId("a"), 16, verify)
    edges = [0, *sorted(cuts), 16]
    total = 0
    for layer in reversed(range(LAYOUT.num_layers)):
        for first, end in itertools.pairwise(edges):
            cells = joined([choice.of_run(layer, first, end - first, row=0)])
            if len(cells):
                offset = (layer * 16 + first) * LAYOUT.block_bytes
                total = plus(total, copy.digest_sent(offset, cells).value())
    assert total == digest_of(copy, verify=verify)


def test_a_sample_is_about_one_in_64_and_differs_between_transfers():
    """So another transfer finds what one transfer misses."""
    blocks = 100_000
    chosen = [Choice(TransferId(name), blocks, "sample").of_run(0, 0, blocks).rows for name in ("a", "b")]
    for rows in chosen:
        assert blocks / SAMPLE * 0.9 < len(rows) < blocks / SAMPLE * 1.1
    assert not np.array_equal(*chosen)


def test_blocks_of_odd_sizes_have_digests_too():
    """A block's last word may be padded with zeros."""
    memory = torch.arange(3 * 13, dtype=torch.uint8)
    copy = TorchPagedCopy([torch.zeros(4, 13, dtype=torch.uint8)], send_staging=memory, receive_staging=None)
    cells = Choice(TransferId("a"), 3, "always").of_run(0, 0, 3)
    before = copy.digest_sent(0, cells).value()
    memory[38] += 1
    assert copy.digest_sent(0, cells).value() != before
