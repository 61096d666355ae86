"""The worker's side, with real belts over memory in one process: every byte that arrives is compared."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch

from kvbelt.channels.memory import MemoryChannel, MemoryNetwork
from kvbelt.paged_copy import TorchPagedCopy
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import Region
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.vllm.compute import CpuCompute
from kvbelt.vllm.orders import Claim, Load, Orders, Send, Written
from kvbelt.vllm.pages import pages_of
from kvbelt.vllm.worker_side import WorkerSide
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout

LAYERS, BLOCKS, BLOCK, WIDTH = 3, 20, 16, 8


class Server:
    """What one vLLM worker process has: KV, a belt, the worker's side."""

    def __init__(self, role: str, network: MemoryNetwork) -> None:
        self.kv = {f"model.layers.{i}.attn": torch.randn(BLOCKS, 2, BLOCK, WIDTH) for i in range(LAYERS)}
        block_bytes = 2 * BLOCK * WIDTH * 4
        pages = pages_of(self.kv, BLOCKS, block_bytes, "test")
        layout = KVLayout(LAYERS, 2, WIDTH // 2, BLOCK, "float32", pages.order, block_bytes)
        staging = torch.zeros(LAYERS * BLOCKS * block_bytes, dtype=torch.uint8)
        region = Region(staging.data_ptr(), staging.numel(), "cpu")
        sends = role == "prefill"
        copy = TorchPagedCopy(pages.rows, staging if sends else None, None if sends else staging)
        identity = BeltIdentity(EngineId(uuid.uuid4().hex), role, "m", "f", layout)
        channel = MemoryChannel(identity.engine_id, network)
        self.belt = Belt(identity, BeltSettings(), channel, copy, region if sends else None, None if sends else region)
        self.belt.start()
        self.side = WorkerSide(self.belt, LAYERS, CpuCompute())

    def step(self, orders: Orders, *, hooks: bool = True) -> None:
        """One step of the model runner."""
        self.side.begin_step(orders)
        if hooks:
            for layer in range(LAYERS):
                self.side.layer_written(layer)
        self.side.end_step()

    def close(self) -> None:
        """End."""
        self.belt.close()
        self.side.close()


@pytest.fixture
def network() -> MemoryNetwork:
    """What joins the two."""
    return MemoryNetwork()


@pytest.fixture
def prefill(network: MemoryNetwork) -> Iterator[Server]:
    """A prefill worker."""
    server = Server("prefill", network)
    yield server
    server.close()


@pytest.fixture
def decode(network: MemoryNetwork) -> Iterator[Server]:
    """A decode worker."""
    server = Server("decode", network)
    yield server
    server.close()


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Poll for something true."""
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up, "it never came"
        threading.Event().wait(0.002)
    return found


def send(decode: Server, name: str, num_tokens: int, seconds: float = 10.0) -> Send:
    """The order to send to a decode worker."""
    receiver = decode.belt.receiver_address()
    assert receiver is not None
    return Send(name, PrefillHandoff(TransferId(name), receiver, seconds), num_tokens)


def claim(name: str, seconds: float = 10.0) -> Claim:
    """The order to wait for KV."""
    return Claim(name, DecodeHandoff(TransferId(name), seconds))


def loaded(server: Server) -> set[str]:
    """Poll for ended loads, as vLLM does with each step."""
    return until(lambda: server.side.finished(set())[1])


@pytest.mark.parametrize("hooks", [True, False], ids=["hooks", "one-graph"])
def test_chunks_arrive_whole(prefill: Server, decode: Server, hooks: bool) -> None:
    """A prompt sent in two chunks lies in the decode worker's blocks byte for byte, and everything is given back."""
    prefill.step(Orders(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7,), False),)), hooks=hooks)
    prefill.step(Orders(written=(Written("a", 1, (2, 11), True),)), hooks=hooks)
    decode.step(Orders(claims=(claim("a"),), loads=(Load("a", 0, (4, 3, 9), 40),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == set()
    for name, ours in decode.kv.items():
        assert torch.equal(ours[[4, 3, 9]], prefill.kv[name][[7, 2, 11]])
    assert decode.side.take_news().received == {"a": ""}
    assert prefill.side.finished({"a"})[0] or until(lambda: prefill.side.finished(set())[0]) == {"a"}


def test_only_what_is_lacking_is_filled(prefill: Server, decode: Server) -> None:
    """Blocks that the decode worker has cached are not touched."""
    before = {name: kv.clone() for name, kv in decode.kv.items()}
    prefill.step(Orders(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7, 2, 11), True),)))
    decode.step(Orders(claims=(claim("a"),), loads=(Load("a", 2, (9,), 39),)))
    loaded(decode)
    for name, ours in decode.kv.items():
        assert torch.equal(ours[9], prefill.kv[name][11])
        untouched = [block for block in range(BLOCKS) if block != 9]
        assert torch.equal(ours[untouched], before[name][untouched])


def test_kv_of_another_length_is_not_used(prefill: Server, decode: Server) -> None:
    """A transfer whose prompt is not this prompt is refused, and its blocks are computed."""
    prefill.step(Orders(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7, 2, 11), True),)))
    decode.step(Orders(claims=(claim("a"),), loads=(Load("a", 0, (4, 5), 20),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == {4, 5}
    assert decode.side.take_news().received == {"a": "wrong_length"}


def test_lost_kv_is_reported_with_its_blocks(decode: Server) -> None:
    """KV that does not come within the deadline: the request goes on, its blocks are named."""
    decode.step(Orders(claims=(claim("a", 0.2),), loads=(Load("a", 0, (4, 5), 20),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == {4, 5}
    assert decode.side.take_bad_blocks() == set()
    assert decode.side.take_news().received["a"]


def test_a_dropped_load_ends_without_bad_blocks(decode: Server) -> None:
    """An aborted request's load is reported, so that vLLM frees its blocks, and nothing is to be recomputed."""
    decode.step(Orders(claims=(claim("a", 60.0),), loads=(Load("a", 0, (4, 5), 20),)))
    assert decode.side.finished(set()) == (set(), set())
    decode.step(Orders(drops=("a",)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == set()


def test_a_dropped_claim_frees_its_slot(prefill: Server, decode: Server) -> None:
    """KV that came and is not needed gives its place back, and nothing is reported."""
    prefill.step(Orders(sends=(send(decode, "a", 16),), written=(Written("a", 0, (1,), True),)))
    until(lambda: decode.belt.snapshot().bytes_committed)
    decode.step(Orders(claims=(claim("a"),)))
    decode.step(Orders(drops=("a",)))
    until(lambda: decode.belt.snapshot().bytes_committed == 0)
    assert decode.side.finished(set()) == (set(), set())


def test_an_aborted_prompt_gives_its_blocks_back(prefill: Server, decode: Server) -> None:
    """A request that ends before its prompt is complete: the decode worker learns it, the blocks are free."""
    prefill.step(Orders(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7,), False),)))
    decode.step(Orders(claims=(claim("a"),), loads=(Load("a", 0, (4, 5, 6), 40),)))
    sent, _ = prefill.side.finished({"a"})
    assert sent == {"a"} or until(lambda: prefill.side.finished(set())[0]) == {"a"}
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == {4, 5, 6}


def test_a_preempted_prompt_is_read_no_more(prefill: Server, decode: Server) -> None:
    """When a step that takes blocks away begins, the belt has let go of them; nothing is reported twice."""
    prefill.step(Orders(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7,), False),)))
    prefill.step(Orders(preempted=("a",)))
    assert prefill.belt.snapshot().staging_bytes_used == 0
    decode.step(Orders(claims=(claim("a"),), loads=(Load("a", 0, (4, 5, 6), 40),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == {4, 5, 6}
    assert prefill.side.finished({"a"}) == (set(), set())


def test_a_mismatch_is_refused_and_recomputed(prefill: Server, decode: Server) -> None:
    """A decode worker of another life refuses; both sides learn it."""
    order = send(decode, "a", 16)
    stale = msgspec.structs.replace(order.handoff.receiver, engine_id=EngineId("another"))
    order = Send("a", msgspec.structs.replace(order.handoff, receiver=stale), 16)
    prefill.step(Orders(sends=(order,), written=(Written("a", 0, (1,), True),)))
    until(lambda: prefill.side.finished({"a"})[0])
    assert until(lambda: prefill.side.take_news().sent)["a"]
