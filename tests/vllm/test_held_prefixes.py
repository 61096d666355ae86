"""The prompt blocks that a decode server holds: evicted ones are noticed, and senders leave them out."""

import random
from functools import partial
from typing import Any

import pytest
import torch

from kvbelt.vllm.held_prefixes import HeldPrefixes, PrefixLedger
from kvbelt.vllm.identity import ServerFacts, describe
from kvbelt.vllm.requests import PromptTokens
from kvbelt.vllm.scheduler_side import SchedulerSide
from kvbelt.vllm.step_messages import Load, ScheduledPrompt, Send, StepCommands, StepReport, Written
from kvbelt.wire.block_hash import block_hashes
from kvbelt.wire.health import Role
from tests.vllm.belts import BLOCK, TO_LOAD, TO_SEND, BeltServer, claim, loaded, pacing, send, until

A, B, C = b"a", b"b", b"c"


class Pool:
    """vLLM's blocks and their contents."""

    def __init__(self) -> None:
        self.contents: dict[int, Any] = {}

    def ledger(self) -> PrefixLedger:
        return PrefixLedger(self.contents.get)


def test_what_is_cached_is_held() -> None:
    """A cached block is reported as held, once; an uncached one is not."""
    pool = Pool()
    pool.contents.update({1: "x", 2: "y"})
    ledger = pool.ledger()
    ledger.holds((A, B, C), (1, 2, 3))
    assert ledger.take_changes() == ((A, B), ())
    ledger.holds((A, B, C), (1, 2, 3))
    assert ledger.take_changes() == ((), ())


def test_a_block_given_to_another_is_gone() -> None:
    """A block that a request overwrites is reported as gone; one that it shares is not."""
    pool = Pool()
    pool.contents.update({1: "x", 2: "y"})
    ledger = pool.ledger()
    ledger.holds((A, B), (1, 2))
    ledger.take_changes()
    pool.contents[2] = None
    ledger.taken((1, 2, 7))
    assert ledger.take_changes() == ((), (B,))


def test_a_cache_that_was_emptied_is_noticed() -> None:
    """The next step's probes notice an emptied cache, though no block was given away."""
    pool = Pool()
    pool.contents.update({number: number for number in range(50)})
    ledger = pool.ledger()
    hashes = [bytes([number]) for number in range(50)]
    ledger.holds(hashes, range(50))
    ledger.take_changes()
    pool.contents.clear()
    assert set(ledger.take_changes()[1]) == set(hashes)
    assert len(ledger) == 0


def test_what_is_gone_and_comes_back_is_held() -> None:
    """Within one step the last change counts."""
    pool = Pool()
    pool.contents[1] = "x"
    ledger = pool.ledger()
    ledger.holds((A,), (1,))
    ledger.take_changes()
    pool.contents.update({1: None, 4: "x"})
    ledger.taken((1,))
    ledger.holds((A,), (4,))
    assert ledger.take_changes() == ((A,), ())


@pytest.mark.parametrize("seed", range(10))
def test_the_workers_know_what_the_ledger_knows(seed: int) -> None:
    """After any sequence of changes the worker holds what the ledger holds, and the pool has all of it."""
    choose = random.Random(seed)
    pool, there = Pool(), HeldPrefixes()
    ledger = pool.ledger()
    most_held = 0
    for _ in range(200):
        block, content = choose.randrange(12), choose.choice([None, "x", "y", "z"])
        pool.contents[block] = content
        if content is not None and choose.random() < 0.7:
            ledger.holds((content.encode(),), (block,))
        if choose.random() < 0.3:
            ledger.taken(choose.sample(range(12), 3))
        if choose.random() < 0.1:
            ledger.check_all()
        there.update(*ledger.take_changes())
        most_held = max(most_held, len(ledger))
    ledger.check_all()
    there.update(*ledger.take_changes())
    held = {content for content in "xyz" if there.held((content.encode(),)) == 1}
    assert held == {name.decode() for name in ledger._block_of}
    assert held <= set(pool.contents.values())
    assert most_held > 0


def test_a_prefix_ends_where_a_block_is_missing() -> None:
    """Held blocks are counted from the first one on."""
    held = HeldPrefixes()
    held.update((A, C), ())
    assert (held.held((A, B, C)), held.held((B,)), held.held((A,)), held.held(())) == (1, 0, 1, 0)


@pytest.fixture
def side() -> SchedulerSide:
    """A decode server's scheduler side, with ten cached blocks."""
    side = SchedulerSide(BLOCK, partial(describe, ServerFacts(Role.DECODE, "m", 2048)), pacing(), lambda: 0.0)
    side.watch_prefix_cache({number: f"content {number}" for number in range(1, 11)}.get)
    return side


def test_loaded_prompts_are_held_from_their_first_step(side: SchedulerSide) -> None:
    """Whole blocks are held in the prompt's order, and the answer's blocks at the end."""
    tokens = list(range(40))
    side.on_new_request("a", TO_LOAD, 40, PromptTokens(tokens))
    side.on_allocated("a", [3, 4, 5], 39)
    assert side.take_step([], ()).held == ()
    assert side.take_step([ScheduledPrompt("a", [3, 4, 5], 39, 1)], ()).held == block_hashes(tokens, BLOCK)
    answered = [*tokens, *range(100, 110)]
    side.on_finished("a", PromptTokens(answered), [3, 4, 5, 6])
    assert side.take_step([], ()).held == block_hashes(answered, BLOCK)[2:]


def test_a_server_that_no_kv_is_sent_to_keeps_no_ledger(side: SchedulerSide) -> None:
    """Whole requests cost it no hashes; from its first load on it knows what ends."""
    tokens = PromptTokens(range(BLOCK))
    for number, held in ((1, ()), (2, block_hashes(range(BLOCK), BLOCK))):
        side.on_new_request("whole", None, BLOCK, tokens)
        side.take_step([ScheduledPrompt("whole", [number], 0, BLOCK)], ())
        side.on_finished("whole", tokens, [number])
        assert side.take_step([], ()).held == held
        side.on_new_request("a", TO_LOAD, 40, PromptTokens(range(100, 140)))


def test_what_turned_out_to_be_gone_is_looked_for(side: SchedulerSide) -> None:
    """If a load lacks a block that was thought to be held, all blocks are checked."""
    contents = dict.fromkeys(range(1, 40), "x")
    side.watch_prefix_cache(contents.get)
    before = list(range(39 * BLOCK))
    side.on_new_request("a", TO_LOAD, 40, PromptTokens(range(40)))
    side.on_finished("before", PromptTokens(before), range(1, 40))
    side.on_allocated("a", [3, 4, 5], 39)
    side.take_step([], ())
    del contents[39]
    side.on_report(StepReport(received={"a": "prefix_evicted"}), ["a"])
    assert side.take_step([], ()).gone == block_hashes(before, BLOCK)[38:]


def test_a_prompt_is_sent_with_its_hashes(side: SchedulerSide) -> None:
    """The hashes let the receiver say what it holds."""
    side.on_new_request("a", TO_SEND, 40, PromptTokens(range(40), "salt"))
    (order,) = side.take_step([ScheduledPrompt("a", [3, 4, 5], 0, 40)], ()).sends
    assert order.prefix_hashes == block_hashes(range(40), BLOCK, "salt")


def test_only_what_is_lacking_travels(prefill: BeltServer, decode: BeltServer) -> None:
    """Blocks that the decode server holds are not sent, and not touched."""
    hashes = block_hashes(range(40), BLOCK)
    decode.step(StepCommands(held=hashes[:1]))
    before = {name: kv[4].clone() for name, kv in decode.kv.items()}
    plain = send(decode, "a", 40)
    order = Send("a", plain.handoff, 40, hashes)
    prefill.step(StepCommands(sends=(order,), written=(Written("a", 0, (7, 2, 11), True),)))
    decode.step(StepCommands(claims=(claim("a"),), loads=(Load("a", 1, (3, 9), 40),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == set()
    for name, ours in decode.kv.items():
        assert torch.equal(ours[[3, 9]], prefill.kv[name][[2, 11]])
        assert torch.equal(ours[4], before[name])
    assert until(lambda: decode.belt.snapshot().reused_bytes_total) > 0


def test_what_has_been_evicted_meanwhile_is_computed(prefill: BeltServer, decode: BeltServer) -> None:
    """If a block that was left out has been evicted, the prompt is computed and the reason reported."""
    hashes = block_hashes(range(40), BLOCK)
    decode.step(StepCommands(held=hashes[:1]))
    order = Send("a", send(decode, "a", 40).handoff, 40, hashes)
    prefill.step(StepCommands(sends=(order,), written=(Written("a", 0, (7, 2, 11), True),)))
    until(lambda: decode.belt.snapshot().bytes_committed)
    decode.step(StepCommands(gone=hashes[:1], claims=(claim("a"),), loads=(Load("a", 0, (4, 3, 9), 40),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == {4, 3, 9}
    assert decode.side.take_report().received == {"a": "prefix_evicted"}
    until(lambda: decode.belt.snapshot().bytes_committed == 0)


@pytest.mark.parametrize(("held", "used"), [((), 0), ((b"a",), 0), ((b"a", b"b"), 1), ((b"a", b"c"), 0)])
def test_a_block_that_is_computed_again_travels(held: tuple[bytes, ...], used: int) -> None:
    """A drafter of hidden states wants those of the last block that is held."""
    prefixes = HeldPrefixes(unused=1)
    prefixes.update(held, ())
    assert prefixes.held((b"a", b"b", b"c")) == used
