"""Different tensor-parallel degrees on the two sides, a belt for each rank: every byte that arrives is compared."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from kvbelt.vllm.identity import Rank, together
from kvbelt.vllm.step_messages import Claim, Load, Send, StepCommands, Written
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff
from kvbelt.wire.ids import TransferId
from tests.channels.memory import MemoryNetwork
from tests.vllm.belts import BeltServer, loaded, until

HERE, THERE = (7, 2, 11), (4, 3, 9)

#: No peer is lost while the machine stalls for some seconds.
PATIENT = {"verify": "always", "lease_seconds": 20.0, "claim_seconds": 30.0, "handshake_seconds": 20.0}


@contextlib.contextmanager
def servers(senders: int, receivers: int, kv_heads: int, **shape: bool) -> Iterator[tuple[list[BeltServer], ...]]:
    """The ranks of a prefill and of a decode server. Ranks with the same head have the same KV of it."""
    network = MemoryNetwork()
    with contextlib.ExitStack() as ending:

        def start(role: str, ranks: int) -> list[BeltServer]:
            made = []
            for number in range(ranks):
                server = BeltServer(role, network, Rank(number, ranks), kv_heads=kv_heads, **PATIENT, **shape)
                ending.callback(server.close)
                made.append(server)
            return made

        prefill, decode = start("prefill", senders), start("decode", receivers)
        for rank in prefill:
            for layer, kv in enumerate(rank.kv.values()):
                for place, head in enumerate(rank.heads):
                    chance = torch.Generator().manual_seed(100 * layer + head)
                    kv[:, place] = torch.randn(kv[:, place].shape, generator=chance)
        yield prefill, decode


def model_of(ranks: list[BeltServer], name: str) -> dict[int, torch.Tensor]:
    """One layer's KV, by head of the model."""
    return {head: rank.kv[name][:, place] for rank in ranks for place, head in enumerate(rank.heads)}


def send(prefill: list[BeltServer], decode: list[BeltServer], num_tokens: int = 40) -> None:
    """Every rank computes and sends a prompt, in two steps."""
    receiver = together([rank.identity for rank in decode]).receiver
    assert receiver is not None
    order = Send("a", PrefillHandoff(TransferId("a"), receiver, 20.0), num_tokens)
    for rank in prefill:
        rank.step(StepCommands(sends=(order,), written=(Written("a", 0, HERE[:1], False),)))
        rank.step(StepCommands(written=(Written("a", 1, HERE[1:], True),)))


def load(decode: list[BeltServer], tp_size: int | None, seconds: float = 20.0) -> None:
    """Every rank waits for it, and loads it."""
    claim = Claim("a", DecodeHandoff(TransferId("a"), seconds, tp_size=tp_size))
    for rank in decode:
        rank.step(StepCommands(claims=(claim,), loads=(Load("a", 0, THERE, 40),)))
        assert loaded(rank) == {"a"}


@pytest.mark.parametrize(
    ("senders", "receivers", "kv_heads", "tokens_first"),
    [
        (2, 1, 4, False),
        (2, 1, 4, True),
        (1, 2, 4, False),
        (1, 2, 4, True),
        (4, 2, 4, False),
        (2, 1, 1, False),
        (1, 2, 1, True),
        (4, 2, 2, True),
        (2, 3, 6, True),
    ],
    ids=str,
)
def test_every_head_of_every_block_arrives(senders: int, receivers: int, kv_heads: int, tokens_first: bool) -> None:
    """Byte for byte on each rank that has it, all blocks are given back, and the slots are free."""
    with servers(senders, receivers, kv_heads, tokens_first=tokens_first) as (prefill, decode):
        send(prefill, decode)
        load(decode, senders)
        for rank in decode:
            assert rank.side.take_bad_blocks() == set()
            assert rank.side.take_report().received == {"a": ""}
            for name, kv in rank.kv.items():
                sent = model_of(prefill, name)
                for place, head in enumerate(rank.heads):
                    assert torch.equal(kv[list(THERE), place], sent[head][list(HERE)])
        for rank in prefill:
            assert rank.side.finished({"a"})[0] or until(lambda rank=rank: rank.side.finished(set())[0]) == {"a"}
            until(lambda rank=rank: rank.belt.snapshot().sends == {})
            assert set(rank.side.take_report().sent.values()) <= {""}


@pytest.mark.parametrize(("senders", "kv_heads"), [(2, 4), (4, 2)])
def test_each_head_travels_once(senders: int, kv_heads: int) -> None:
    """To one rank come as many bytes as its blocks have, however many ranks have the heads."""
    with servers(senders, 1, kv_heads) as (prefill, decode):
        send(prefill, decode)
        load(decode, senders)
        assert decode[0].belt.snapshot().received_bytes_total == decode[0].layout.slot_bytes(len(HERE))


def test_other_bytes_of_the_blocks_are_not_touched() -> None:
    """Blocks that are not loaded stay as they are, whatever part of a block travels."""
    with servers(2, 1, 4) as (prefill, decode):
        before = {name: kv.clone() for name, kv in decode[0].kv.items()}
        send(prefill, decode)
        load(decode, 2)
        for name, kv in decode[0].kv.items():
            others = [block for block in range(len(kv)) if block not in THERE]
            assert torch.equal(kv[others], before[name][others])


def test_a_rank_that_sends_nothing_costs_the_load() -> None:
    """One of two ranks is gone: the load ends with the request's deadline, and its blocks are computed."""
    with servers(2, 1, 4) as (prefill, decode):
        send(prefill[:1], decode)
        load(decode, 2, 1.0)
        assert decode[0].side.take_bad_blocks() == set(THERE)
        assert decode[0].side.take_report().received["a"]
        until(lambda: decode[0].belt.snapshot().bytes_committed == 0)


def test_half_of_the_heads_are_no_prompt() -> None:
    """A decode server that was not told of the prefill server's degree reads one piece, and computes the prompt."""
    with servers(2, 1, 4) as (prefill, decode):
        send(prefill, decode)
        load(decode, None)
        assert decode[0].side.take_bad_blocks() == set(THERE)
        assert decode[0].side.take_report().received == {"a": "heads_missing"}


def test_a_dropped_claim_frees_every_slot() -> None:
    """What has come from both ranks, and is not needed, is released."""
    with servers(2, 1, 4) as (prefill, decode):
        send(prefill, decode)
        until(lambda: decode[0].belt.snapshot().arrivals.get("committed") == 2)
        decode[0].step(StepCommands(claims=(Claim("a", DecodeHandoff(TransferId("a"), 20.0, tp_size=2)),)))
        assert decode[0].side.loading.arrived("a", 10.0) is None
        decode[0].step(StepCommands(drops=("a",)))
        until(lambda: decode[0].belt.snapshot().bytes_committed == 0)
        assert decode[0].side.finished(set()) == (set(), set())


def test_a_prompt_computed_with_one_rank_is_preempted_for_both_receivers() -> None:
    """Neither reads its blocks any more when the step that preempts it begins."""
    with servers(1, 2, 4) as (prefill, decode):
        receiver = together([rank.identity for rank in decode]).receiver
        assert receiver is not None
        order = Send("a", PrefillHandoff(TransferId("a"), receiver, 20.0), 40)
        prefill[0].step(StepCommands(sends=(order,), written=(Written("a", 0, HERE[:1], False),)))
        prefill[0].step(StepCommands(preempted=("a",)))
        assert prefill[0].belt.snapshot().staging_bytes_used == 0
        load(decode, 1, 0.5)
        assert [rank.side.take_bad_blocks() for rank in decode] == [set(THERE)] * 2


def test_every_rank_of_a_decode_server_is_connected_to() -> None:
    """It is ready once all ranks that get something are."""
    with servers(1, 2, 4) as (prefill, decode):
        receiver = together([rank.identity for rank in decode]).receiver
        assert receiver is not None
        prefill[0].step(StepCommands(warms=(receiver,)))
        assert until(lambda: prefill[0].side.take_report().peers) == {receiver.engine_id: ""}
        assert prefill[0].belt.snapshot().peers == 2
