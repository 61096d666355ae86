"""Pipelines on the two sides, a belt for each rank of each stage: every byte that arrives is compared."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from kvbelt.vllm.identity import Rank, together
from kvbelt.vllm.step_messages import Claim, Load, Send, StepCommands, Written
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff
from kvbelt.wire.ids import TransferId
from tests.channels.memory import MemoryNetwork
from tests.vllm.belts import LAYERS, BeltServer, loaded, until

HERE, THERE, TOKENS, KV_HEADS = (7, 2, 11), (4, 3, 9), 40, 4

ONE, TWO, EACH = (0,), (0, 2), tuple(range(LAYERS))

#: No peer is lost while the machine stalls for some seconds.
PATIENT = {"verify": "always", "lease_seconds": 20.0, "claim_seconds": 30.0, "handshake_seconds": 20.0}

Server = list[BeltServer]


@contextlib.contextmanager
def servers(
    senders: tuple[int, ...], receivers: tuple[int, ...], tp: tuple[int, int] = (1, 1)
) -> Iterator[tuple[Server, Server]]:
    """The ranks of a prefill and of a decode server; ``tp`` of a stage of each."""
    network = MemoryNetwork()
    with contextlib.ExitStack() as ending:

        def start(role: str, stages: tuple[int, ...], size: int) -> Server:
            made = []
            for stage in range(len(stages)):
                for number in range(size):
                    rank = Rank(number, size, stage, stages, LAYERS)
                    server = BeltServer(role, network, rank, kv_heads=KV_HEADS, **PATIENT)
                    ending.callback(server.close)
                    made.append(server)
            return made

        yield start("prefill", senders, tp[0]), start("decode", receivers, tp[1])


def cross(prefill: Server, decode: Server, senders: tuple[int, ...], receivers: tuple[int, ...]) -> None:
    """A prompt is computed in two steps, and loaded."""
    receiver = together([rank.identity for rank in decode], receivers).receiver
    assert receiver is not None
    order = Send("a", PrefillHandoff(TransferId("a"), receiver, 20.0), TOKENS)
    for rank in prefill:
        rank.step(StepCommands(sends=(order,), written=(Written("a", 0, HERE[:1], False),)))
        rank.step(StepCommands(written=(Written("a", 1, HERE[1:], True),)))
    tp_size = len(prefill) // len(senders)
    claim = Claim("a", DecodeHandoff(TransferId("a"), 20.0, tp_size=tp_size, stages=senders))
    for rank in decode:
        rank.step(StepCommands(claims=(claim,), loads=(Load("a", 0, THERE, TOKENS),)))
        assert loaded(rank) == {"a"}


def parts_of(server: Server) -> dict[tuple[str, int], torch.Tensor]:
    """KV by layer and head of the model."""
    found = {}
    for rank in server:
        for name, kv in rank.kv.items():
            found |= {(name, head): kv[:, place] for place, head in enumerate(rank.heads)}
    return found


@pytest.mark.parametrize(
    ("senders", "receivers", "tp"),
    [
        (TWO, ONE, (1, 1)),
        (ONE, TWO, (1, 1)),
        (TWO, TWO, (1, 1)),
        (TWO, (0, 1), (1, 1)),
        (EACH, TWO, (1, 1)),
        (TWO, ONE, (2, 1)),
        (ONE, TWO, (2, 2)),
        (TWO, (0, 1), (1, 2)),
    ],
    ids=str,
)
def test_every_layer_of_every_block_arrives(
    senders: tuple[int, ...], receivers: tuple[int, ...], tp: tuple[int, int]
) -> None:
    """Byte for byte, other blocks stay as they are, all blocks are given back, and the slots are free."""
    with servers(senders, receivers, tp) as (prefill, decode):
        before = {part: kv.clone() for part, kv in parts_of(decode).items()}
        cross(prefill, decode, senders, receivers)
        for rank in decode:
            assert rank.side.take_bad_blocks() == set()
            assert rank.side.take_report().received == {"a": ""}
        sent, got = parts_of(prefill), parts_of(decode)
        assert got.keys() == before.keys() == sent.keys()
        for part, kv in got.items():
            assert torch.equal(kv[list(THERE)], sent[part][list(HERE)])
            others = [block for block in range(len(kv)) if block not in THERE]
            assert torch.equal(kv[others], before[part][others])
        for rank in prefill:
            assert rank.side.finished({"a"})[0] or until(lambda rank=rank: rank.side.finished(set())[0]) == {"a"}
            until(lambda rank=rank: rank.belt.snapshot().sends == {})
            assert set(rank.side.take_report().sent.values()) <= {""}
        for rank in decode:
            until(lambda rank=rank: rank.belt.snapshot().bytes_committed == 0)


def test_each_layer_travels_once() -> None:
    """To a server of one rank come as many bytes as its blocks have."""
    with servers(TWO, ONE) as (prefill, decode):
        cross(prefill, decode, TWO, ONE)
        assert decode[0].belt.snapshot().received_bytes_total == decode[0].layout.slot_bytes(len(HERE))


def test_a_stage_that_sends_nothing_costs_the_load() -> None:
    """One of two stages is gone: the load ends with the request's deadline, and its blocks are computed."""
    with servers(TWO, ONE) as (prefill, decode):
        receiver = together([rank.identity for rank in decode]).receiver
        assert receiver is not None
        order = Send("a", PrefillHandoff(TransferId("a"), receiver, 20.0), TOKENS)
        prefill[1].step(StepCommands(sends=(order,), written=(Written("a", 0, HERE, True),)))
        claim = Claim("a", DecodeHandoff(TransferId("a"), 1.0, tp_size=1, stages=TWO))
        decode[0].step(StepCommands(claims=(claim,), loads=(Load("a", 0, THERE, TOKENS),)))
        assert loaded(decode[0]) == {"a"}
        assert decode[0].side.take_bad_blocks() == set(THERE)
        until(lambda: decode[0].belt.snapshot().bytes_committed == 0)


def test_some_layers_are_no_prompt() -> None:
    """A decode server that was not told of the prefill server's stages reads one piece, and computes the prompt."""
    with servers(TWO, ONE) as (prefill, decode):
        receiver = together([rank.identity for rank in decode]).receiver
        assert receiver is not None
        order = Send("a", PrefillHandoff(TransferId("a"), receiver, 20.0), TOKENS)
        for rank in prefill:
            rank.step(StepCommands(sends=(order,), written=(Written("a", 0, HERE, True),)))
        claim = Claim("a", DecodeHandoff(TransferId("a"), 20.0))
        decode[0].step(StepCommands(claims=(claim,), loads=(Load("a", 0, THERE, TOKENS),)))
        assert loaded(decode[0]) == {"a"}
        assert decode[0].side.take_bad_blocks() == set(THERE)
        assert decode[0].side.take_report().received == {"a": "heads_missing"}
