"""Block sizes that are multiples of each other, with real belts: every token that arrives is compared."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from kvbelt.vllm.identity import Rank, together
from kvbelt.vllm.step_messages import Claim, Load, Send, StepCommands, Written
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff
from kvbelt.wire.ids import TransferId
from tests.channels.memory import MemoryNetwork
from tests.vllm.belts import BLOCKS, BeltServer, loaded, until
from tests.vllm.test_degrees import PATIENT

HERE, THERE = (7, 2, 11, 12, 13, 5, 0, 19, 3, 4), (4, 3, 9, 8, 0, 1, 2, 17, 18, 10)

#: Known to keep a token's keys and values together.
APART = {"tokens_first": True, "backend": "FLASH_ATTN"}


@contextlib.contextmanager
def two(here: int, there: int, senders: int = 1, **shape) -> Iterator[tuple[list[BeltServer], BeltServer]]:
    """A prefill server with so many ranks, and a decode server, with different block sizes."""
    network = MemoryNetwork()
    with contextlib.ExitStack() as ending:
        prefill = [
            BeltServer("prefill", network, Rank(n, senders), kv_heads=4, block=here, **PATIENT, **shape)
            for n in range(senders)
        ]
        decode = BeltServer("decode", network, kv_heads=4, block=there, **PATIENT, **shape)
        for server in (*prefill, decode):
            ending.callback(server.close)
        yield prefill, decode


def send(prefill: list[BeltServer], decode: BeltServer, here: int, num_tokens: int, name: str = "a") -> None:
    """Every rank computes and sends a prompt, in two steps."""
    receiver = together([decode.identity]).receiver
    assert receiver is not None
    order = Send(name, PrefillHandoff(TransferId(name), receiver, 20.0), num_tokens)
    blocks = HERE[: -(-num_tokens // here)]
    for rank in prefill:
        rank.step(StepCommands(sends=(order,), written=(Written(name, 0, blocks[:1], len(blocks) == 1),)))
        if len(blocks) > 1:
            rank.step(StepCommands(written=(Written(name, 1, blocks[1:], True),)))


def load(decode: BeltServer, there: int, num_tokens: int, name: str = "a", *, senders: int = 1, first: int = 0) -> None:
    """Wait for it, and load it."""
    claim = Claim(name, DecodeHandoff(TransferId(name), 20.0, tp_size=senders))
    blocks = THERE[first : -(-num_tokens // there)]
    decode.step(StepCommands(claims=(claim,), loads=(Load(name, first, blocks, num_tokens),)))
    assert loaded(decode) == {name}


def tokens(server: BeltServer, name: str, blocks: tuple[int, ...]) -> torch.Tensor:
    """One layer's KV in these blocks, ``[heads, tokens, content]``."""
    return torch.cat(list(server.kv[name][list(blocks)]), dim=1)


@pytest.mark.parametrize(("here", "there", "senders"), [(16, 64, 2), (64, 16, 2), (16, 32, 1)], ids=str)
def test_every_token_arrives(here: int, there: int, senders: int) -> None:
    """In the decode server's own blocks, also from two ranks; every other block is as it was."""
    with two(here, there, senders, **APART) as (prefill, decode):
        for num_tokens in (1, 40, 64, 150):
            name = f"of {num_tokens}"
            before = {layer: kv.clone() for layer, kv in decode.kv.items()}
            send(prefill, decode, here, num_tokens, name)
            load(decode, there, num_tokens, name, senders=senders)
            assert decode.side.take_bad_blocks() == set()
            assert decode.side.take_report().received == {name: ""}
            filled = THERE[: -(-num_tokens // there)]
            others = [block for block in range(BLOCKS) if block not in filled]
            for layer, kv in decode.kv.items():
                sent = torch.cat([tokens(rank, layer, HERE[: -(-num_tokens // here)]) for rank in prefill])
                assert torch.equal(tokens(decode, layer, filled)[:, :num_tokens], sent[:, :num_tokens])
                assert torch.equal(kv[others], before[layer][others])
            for rank in prefill:
                free = rank.side.finished({name})[0]
                assert free or until(lambda rank=rank: rank.side.finished(set())[0]) == {name}


def test_what_the_decode_server_has_is_not_written() -> None:
    """It loads from its own second block on."""
    with two(16, 64, **APART) as (prefill, decode):
        before = {name: kv.clone() for name, kv in decode.kv.items()}
        send(prefill, decode, 16, 150)
        load(decode, 64, 150, first=1)
        for name, kv in decode.kv.items():
            assert torch.equal(kv[THERE[0]], before[name][THERE[0]])
            sent = tokens(prefill[0], name, HERE)
            assert torch.equal(tokens(decode, name, THERE[1:3])[:, : 150 - 64], sent[:, 64:150])


def test_a_prompt_larger_than_the_buffer_comes_in_parts() -> None:
    """Parts end where blocks that travel end, and not where those of the decode server do."""
    with two(16, 64, **APART) as (prefill, decode):
        incoming = decode.belt._driver.receiver.incoming
        incoming.sizes = (decode.layout.slot_bytes(3) // 2,)
        send(prefill, decode, 16, 150)
        load(decode, 64, 150)
        assert decode.side.take_report().received == {"a": ""}
        for name in decode.kv:
            sent = tokens(prefill[0], name, HERE)
            assert torch.equal(tokens(decode, name, THERE[:3])[:, :150], sent[:, :150])


@pytest.mark.parametrize(
    ("here", "there", "shape"),
    [
        (16, 64, {"tokens_first": False, "backend": "FLASH_ATTN"}),
        (16, 64, {"tokens_first": True, "backend": "CPU_ATTN"}),
        (32, 48, APART),
        (16, 32, APART | {"windows": (80,)}),
    ],
    ids=["heads-first", "cpu", "no-multiple", "windows"],
)
def test_blocks_that_cannot_be_cut_do_not_travel(here: int, there: int, shape: dict) -> None:
    """The handshake is refused by the name of the setting, and the decode server computes the prompt."""
    with two(here, there, **shape) as (prefill, decode):
        send(prefill, decode, here, 16)
        assert until(lambda: prefill[0].side.take_report().sent) == {"a": "refused_block_size"}
        assert until(lambda: prefill[0].side.finished({"a"})[0] or prefill[0].side.finished(set())[0]) == {"a"}
