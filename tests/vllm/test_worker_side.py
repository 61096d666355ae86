"""The worker's side, with real belts over memory in one process: every byte that arrives is compared."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import pytest
import torch

from kvbelt.channels.memory import MemoryChannel, MemoryNetwork
from kvbelt.channels.nixl import NixlChannel
from kvbelt.paged_copy import TorchPagedCopy
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import Region
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.vllm.about import Looks, look_at
from kvbelt.vllm.belt_setup import Rank
from kvbelt.vllm.compute import CpuCompute
from kvbelt.vllm.held_prefixes import HeldPrefixes
from kvbelt.vllm.host_memory import host_memory
from kvbelt.vllm.host_worker import HostWorker
from kvbelt.vllm.identity import RankIdentity, together
from kvbelt.vllm.orders import Claim, Keep, Load, Orders, Restore, Send, Written
from kvbelt.vllm.pages import pages_of
from kvbelt.vllm.worker_side import WorkerSide
from kvbelt.wire.about import About
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout

LAYERS, BLOCKS, BLOCK, WIDTH = 3, 20, 16, 8


class Server:
    """What one vLLM worker process has: KV, a belt, the worker's side."""

    def __init__(self, role: str, network: MemoryNetwork, rank: Rank = Rank()) -> None:  # noqa: B008 -- frozen
        self.kv = {f"model.layers.{i}.attn": torch.randn(BLOCKS, 2, BLOCK, WIDTH) for i in range(LAYERS)}
        block_bytes = 2 * BLOCK * WIDTH * 4
        pages = pages_of(self.kv, BLOCKS, block_bytes, "test")
        layout = KVLayout(LAYERS, 2, WIDTH // 2, BLOCK, "float32", pages.order, block_bytes)
        staging = torch.zeros(LAYERS * BLOCKS * block_bytes, dtype=torch.uint8)
        region = Region(staging.data_ptr(), staging.numel(), "cpu")
        sends = role == "prefill"
        copy = TorchPagedCopy(pages.rows, staging if sends else None, None if sends else staging)
        engine_id = EngineId(uuid.uuid4().hex)
        identity = BeltIdentity(engine_id, role, "m", "f", layout, tp_rank=rank.number, tp_size=rank.size)
        channel = MemoryChannel(identity.engine_id, network)
        held = HeldPrefixes()
        send, receive = (region, None) if sends else (None, region)
        self.belt = Belt(identity, BeltSettings(), channel, copy, send, receive, prefix=held)
        self.belt.start()
        self.host = HostWorker(host_memory(pages.rows, LAYERS * block_bytes * 10)) if sends else None
        looks = Looks(partial(look_at, self.belt, NixlChannel(engine_id)))
        self.side = WorkerSide(self.belt, LAYERS, CpuCompute(), self.host, held, rank.number, looks)
        self.identity = RankIdentity(engine_id, self.belt.receiver_address(), 0, About(role=role))

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


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
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


def test_blocks_from_host_memory_are_sent(prefill: Server, decode: Server) -> None:
    """A prompt whose head was loaded instead of computed arrives whole; its blocks come back once nobody reads them."""
    prefill.step(Orders(keeps=(Keep("old", (7, 2), (0, 1)),)))
    until(lambda: prefill.side.finished({"old"})[0] or prefill.side.finished(set())[0])
    kept = {name: kv[[7, 2]].clone() for name, kv in prefill.kv.items()}
    for kv in prefill.kv.values():
        kv[[7, 2]] = 0
    prefill.step(Orders(restores=(Restore("a", (10, 12), (0, 1)),)))
    assert loaded(prefill) == {"a"}
    orders = Orders(
        sends=(send(decode, "a", 40),), written=(Written("a", 0, (10, 12, 3), True),), keeps=(Keep("a", (3,), (2,)),)
    )
    prefill.step(orders)
    decode.step(Orders(claims=(claim("a"),), loads=(Load("a", 0, (4, 5, 9), 40),)))
    assert loaded(decode) == {"a"}
    for name, ours in decode.kv.items():
        assert torch.equal(ours[[4, 5]], kept[name])
        assert torch.equal(ours[9], prefill.kv[name][3])
    assert prefill.side.finished({"a"})[0] or until(lambda: prefill.side.finished(set())[0]) == {"a"}


def test_a_decode_server_is_connected_to_before_a_prompt_comes(prefill: Server, decode: Server) -> None:
    """The handshake is over when the first transfer begins."""
    receiver = decode.belt.receiver_address()
    assert receiver is not None
    prefill.step(Orders(warms=(receiver,)))
    assert until(lambda: prefill.side.take_news().peers) == {receiver.engine_id: ""}
    assert prefill.belt.snapshot().peers == 1


@pytest.fixture
def ranks(network: MemoryNetwork) -> Iterator[dict[str, list[Server]]]:
    """Two tensor-parallel ranks on either side."""
    servers = {role: [Server(role, network, Rank(number, 2)) for number in range(2)] for role in ("prefill", "decode")}
    yield servers
    for side in servers.values():
        for server in side:
            server.close()


def send_to(ranks: list[Server], name: str, num_tokens: int) -> Send:
    """The order that every rank of the prefill worker gets."""
    receiver = together([rank.identity for rank in ranks]).receiver
    assert receiver is not None
    return Send(name, PrefillHandoff(TransferId(name), receiver, 10.0), num_tokens)


def test_each_rank_sends_to_its_own(ranks: dict[str, list[Server]]) -> None:
    """Rank i's part of every block arrives at rank i, byte for byte."""
    order = send_to(ranks["decode"], "a", 40)
    for rank in ranks["prefill"]:
        rank.step(Orders(sends=(order,), written=(Written("a", 0, (7, 2, 11), True),)))
    for ours, theirs in zip(ranks["decode"], ranks["prefill"], strict=True):
        ours.step(Orders(claims=(claim("a"),), loads=(Load("a", 0, (4, 3, 9), 40),)))
        assert loaded(ours) == {"a"}
        assert ours.side.take_bad_blocks() == set()
        for name, kv in ours.kv.items():
            assert torch.equal(kv[[4, 3, 9]], theirs.kv[name][[7, 2, 11]])


def test_one_rank_that_is_lost_is_told_by_itself(ranks: dict[str, list[Server]]) -> None:
    """Rank 1 never sends: rank 0 has its part, rank 1 names its blocks, and together that is a loss."""
    order = send_to(ranks["decode"], "a", 40)
    ranks["prefill"][0].step(Orders(sends=(order,), written=(Written("a", 0, (7, 2, 11), True),)))
    for ours in ranks["decode"]:
        ours.step(Orders(claims=(claim("a", 1.0),), loads=(Load("a", 0, (4, 3, 9), 40),)))
        assert loaded(ours) == {"a"}
    bad = [rank.side.take_bad_blocks() for rank in ranks["decode"]]
    assert bad == [set(), {4, 3, 9}]
    first, second = (rank.side.take_news() for rank in ranks["decode"])
    assert first.plus(second).received["a"] == second.received["a"] != ""


def test_a_rank_without_a_counterpart_sends_nothing(decode: Server, ranks: dict[str, list[Server]]) -> None:
    """A receiver of another degree is refused by every rank, and no block is held."""
    order = send(decode, "a", 16)
    for rank in ranks["prefill"]:
        rank.step(Orders(sends=(order,), written=(Written("a", 0, (1,), True),)))
        assert rank.side.finished({"a"})[0] or until(lambda rank=rank: rank.side.finished(set())[0]) == {"a"}
        assert until(lambda rank=rank: rank.side.take_news().sent) == {"a": "refused_tp_size"}


def test_kv_at_hand_is_in_place_when_the_step_begins(prefill: Server, decode: Server) -> None:
    """Loaded at once, it can be computed on in the same step; its slot is free, and no load is reported as ended."""
    prefill.step(Orders(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7, 2, 11), True),)))
    until(lambda: decode.belt.snapshot().bytes_committed)
    decode.side.claim(claim("a"))
    kv = decode.side.at_hand("a", 10.0)
    assert kv is not None
    assert (kv.num_tokens, kv.first_block) == (40, 0)
    decode.side.begin_step(Orders(loads=(Load("a", 0, (4, 3, 9), 40, now=True),)))
    for name, ours in decode.kv.items():
        assert torch.equal(ours[[4, 3, 9]], prefill.kv[name][[7, 2, 11]])
    decode.side.end_step()
    assert decode.side.finished(set()) == (set(), set())
    assert decode.side.take_bad_blocks() == set()
    assert decode.side.take_news().received == {"a": ""}
    until(lambda: decode.belt.snapshot().bytes_committed == 0)


def test_kv_that_is_still_to_come_is_not_at_hand(prefill: Server, decode: Server) -> None:
    """The belt has looked, and nobody waits until it has come: it is loaded beside the batch, as ever."""
    decode.side.claim(claim("a"))
    assert decode.side.at_hand("a", 10.0) is None
    assert decode.side.at_hand("another", 10.0) is None
    prefill.step(Orders(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7, 2, 11), True),)))
    decode.step(Orders(loads=(Load("a", 0, (4, 3, 9), 40),)))
    assert loaded(decode) == {"a"}
    for name, ours in decode.kv.items():
        assert torch.equal(ours[[4, 3, 9]], prefill.kv[name][[7, 2, 11]])


def test_kv_at_hand_that_nobody_wants_frees_its_slot(prefill: Server, decode: Server) -> None:
    """A request that is aborted before it was scheduled leaves nothing, also in a server that takes no more steps."""
    prefill.step(Orders(sends=(send(decode, "a", 16),), written=(Written("a", 0, (1,), True),)))
    decode.side.claim(claim("a"))
    until(lambda: decode.side.at_hand("a", 0.1))
    decode.side.drop("a")
    until(lambda: decode.belt.snapshot().bytes_committed == 0)
    assert decode.side.at_hand("a", 0.0) is None
