"""Belts over small pools, for tests: every byte of every block is known, so every byte can be compared."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from kvbelt.paged_copy import TorchPagedCopy
from kvbelt.security.keys import new_engine_id
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import Channel, Lost, PrefixIndex, ReceivedKV, Region, TransferOutcome
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.wire.handoff import PrefillHandoff, ReceiverAddress
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout

LAYOUT = KVLayout(
    num_layers=4, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32", order="T2HD", block_bytes=2048
)


#: How long anything may take before a test gives up, on a machine that does much else.
SECONDS = 60.0


def patient(**changes) -> BeltSettings:
    """Settings of a belt that loses no peer while the machine stalls for some seconds."""
    given = {"lease_seconds": 20.0, "claim_seconds": 30.0, "handshake_seconds": 20.0}
    return BeltSettings(**(given | changes))


def identity(engine: str, role: str, **changes) -> BeltIdentity:
    """An identity that fits all others made here, except for ``changes``."""
    given = {"engine_id": EngineId(engine), "model": "tiny", "fingerprint": "f1", "layout": LAYOUT}
    return BeltIdentity(role=role, **{**given, **changes})


def eventually(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    """Wait for a condition that must become true."""
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            raise AssertionError(f"did not happen within {seconds:g} s: {what}")
        time.sleep(0.002)


def pass_time(side: "Side", seconds: float) -> None:
    """Let a belt's time pass. Its clock takes no jump of the machine's clock for time: that is a stall."""
    clock = side.belt._driver.clock

    def jump() -> None:
        clock._stalled -= seconds

    side.belt._driver.seen(jump)


class Side:
    """One belt with its pool and its staging memory."""

    def __init__(
        self,
        engine: str,
        role: str,
        channel: Channel,
        *,
        staging_blocks: int = 64,
        overflow_blocks: int = 0,
        prefix: PrefixIndex | None = None,
        pool_blocks: int = 64,
        layout: KVLayout = LAYOUT,
        settings: BeltSettings | None = None,
        buffer_of: Callable[[Region], Any] = Region.take,
        **changes,
    ) -> None:
        self.layout = layout
        self.pool = torch.zeros((layout.num_layers, pool_blocks, layout.block_bytes), dtype=torch.uint8)
        self.staging = torch.zeros(staging_blocks * layout.block_bytes, dtype=torch.uint8)
        region = Region(self.staging.data_ptr(), self.staging.numel(), "cpu")
        self.overflow = torch.zeros(overflow_blocks * layout.block_bytes, dtype=torch.uint8)
        overflow = Region(self.overflow.data_ptr(), self.overflow.numel(), "cpu") if overflow_blocks else None
        self.buffer = buffer_of(region)
        sends = role != "decode"
        settings = settings or patient()
        self.belt = Belt(
            identity(new_engine_id(settings.keys, engine), role, layout=layout, **changes),
            settings,
            channel,
            TorchPagedCopy(
                list(self.pool),
                send_staging=self.staging if sends else None,
                receive_staging=None if sends else self.staging,
                overflow_staging=self.overflow if overflow is not None else None,
            ),
            send_buffer=self.buffer if sends else None,
            receive_buffer=None if sends else self.buffer,
            overflow_buffer=overflow,
            prefix=prefix,
        )
        self.belt.start()

    def fill(self, seed: int) -> None:
        """Random bytes in every block."""
        generator = torch.Generator().manual_seed(seed)
        self.pool.random_(0, 256, generator=generator)

    def __enter__(self) -> Self:
        """Nothing more."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the belt."""
        self.belt.close()


@dataclass
class Sent:
    """The fate of an outgoing transfer."""

    ended: threading.Event = field(default_factory=threading.Event)
    blocks_free: threading.Event = field(default_factory=threading.Event)
    outcomes: list[TransferOutcome] = field(default_factory=list)
    frees: int = 0

    def on_end(self, outcome: TransferOutcome) -> None:
        """Callback."""
        self.outcomes.append(outcome)
        self.ended.set()

    def on_free(self) -> None:
        """Callback."""
        self.frees += 1
        self.blocks_free.set()

    def freed(self) -> None:
        """Wait until the blocks are free."""
        assert self.blocks_free.wait(SECONDS), "its blocks are still being read"

    def outcome(self, seconds: float = SECONDS) -> TransferOutcome:
        """Wait for the end."""
        assert self.ended.wait(seconds), "the transfer did not end"
        return self.outcomes[0]


class Told:
    """The result that a belt passes to a callback, which ``ask`` gets."""

    def __init__(self, ask: Callable[[Callable[[Any], None]], object]) -> None:
        self._told = threading.Event()
        self.answers: list[Any] = []
        ask(self._on_end)

    def _on_end(self, answer: Any) -> None:
        self.answers.append(answer)
        self._told.set()

    def answer(self) -> Any:
        """Wait for it."""
        assert self._told.wait(SECONDS), "nothing was told"
        return self.answers[0]


@dataclass
class Arrival:
    """The fate of an incoming transfer."""

    happened: threading.Event = field(default_factory=threading.Event)
    arrivals: list[ReceivedKV | Lost] = field(default_factory=list)

    def __call__(self, arrival: ReceivedKV | Lost) -> None:
        """Callback."""
        self.arrivals.append(arrival)
        self.happened.set()

    def get(self, seconds: float = SECONDS) -> ReceivedKV | Lost:
        """Wait for it."""
        assert self.happened.wait(seconds), "nothing was told"
        return self.arrivals[0]

    def kv(self, seconds: float = SECONDS) -> ReceivedKV:
        """Wait for KV."""
        got = self.get(seconds)
        assert not isinstance(got, Lost), got
        return got

    def lost(self, seconds: float = SECONDS) -> Lost:
        """Wait for a loss."""
        got = self.get(seconds)
        assert isinstance(got, Lost), got
        return got


def begin(  # noqa: PLR0917 -- as Belt.send
    sender: Side,
    to: ReceiverAddress,
    transfer: str,
    num_tokens: int,
    deadline: float = 30.0,
    prefix_hashes: Sequence[bytes] = (),
):
    """Begin a transfer without any blocks."""
    sent = Sent()
    handoff = PrefillHandoff(TransferId(transfer), to, deadline)
    sending = sender.belt.send(handoff, num_tokens, sent.on_free, sent.on_end, prefix_hashes)
    return sending, sent


def hand_over(sending, layout: KVLayout, block_ids: list[int], chunk: int = 1000) -> None:
    """Hand over every block, layer after layer and chunk after chunk, as an engine does."""
    for first in range(0, len(block_ids), chunk):
        for layer in range(layout.num_layers):
            sending.blocks_written(layer, first, block_ids[first : first + chunk], None)
    sending.computed()


class Warmed(Told):
    """The result of connecting to a receiver."""

    def __init__(self, side, address):
        super().__init__(lambda on_end: side.belt.warm(address, on_end))


class Asked(Told):
    """The result of a measurement."""

    def __init__(self, side, engine="d"):
        super().__init__(lambda on_end: side.belt.probe(EngineId(engine), on_end))


def some_blocks(count, seed):
    """Block ids in no order."""
    return random.Random(seed).sample(range(64), count)


def transfer_once(p, d, name, num_tokens, *, seed=0, chunk=1000):
    """Make one whole transfer and compare every byte."""
    blocks = LAYOUT.blocks(num_tokens)
    here, there = some_blocks(blocks, seed), some_blocks(blocks, seed + 1)
    arrival = Arrival()
    d.belt.receive(TransferId(name), 20.0, arrival)
    sending, sent = begin(p, d.belt.receiver_address(), name, num_tokens)
    hand_over(sending, LAYOUT, here, chunk)
    outcome = sent.outcome()
    assert outcome.ok, outcome
    kv = arrival.kv()
    assert kv.num_tokens == num_tokens
    kv.scatter(there)
    kv.release()
    assert torch.equal(d.pool[:, there], p.pool[:, here])
    sent.freed()
    assert sent.frees == 1
    assert sending.failure is None
    return outcome
