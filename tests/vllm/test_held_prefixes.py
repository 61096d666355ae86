"""What a decode server holds of prompts: followed through evictions, told to its workers, and left out by senders."""

import random
from typing import Any

import pytest
import torch

from kvbelt.vllm.held_prefixes import HeldPrefixes, PrefixLedger
from kvbelt.vllm.orders import Load, News, Orders, ScheduledPrompt, Send, Written
from kvbelt.vllm.scheduler_side import PromptTokens, SchedulerSide
from kvbelt.wire.block_hash import block_hashes
from tests.vllm.test_scheduler_side import BLOCK, TO_LOAD, TO_SEND
from tests.vllm.test_worker_side import Server, claim, decode, loaded, network, prefill, send, until  # noqa: F401

A, B, C = b"a", b"b", b"c"


class Pool:
    """vLLM's blocks, and what is cached in them."""

    def __init__(self) -> None:
        self.contents: dict[int, Any] = {}

    def ledger(self) -> PrefixLedger:
        """One that looks at it."""
        return PrefixLedger(self.contents.get)


def test_what_is_cached_is_held() -> None:
    """Said once; a block that vLLM has not cached is not."""
    pool = Pool()
    pool.contents.update({1: "x", 2: "y"})
    ledger = pool.ledger()
    ledger.holds((A, B, C), (1, 2, 3))
    assert ledger.take_changes() == ((A, B), ())
    ledger.holds((A, B, C), (1, 2, 3))
    assert ledger.take_changes() == ((), ())


def test_a_block_given_to_another_is_gone() -> None:
    """But not one that is given to a request because of what it holds."""
    pool = Pool()
    pool.contents.update({1: "x", 2: "y"})
    ledger = pool.ledger()
    ledger.holds((A, B), (1, 2))
    ledger.take_changes()
    pool.contents[2] = None
    ledger.taken((1, 2, 7))
    assert ledger.take_changes() == ((), (B,))


def test_a_cache_that_was_emptied_is_noticed() -> None:
    """Though nobody says so, and no block was given away: by the probes of the next step."""
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
    """Within one step the last word counts."""
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
    """Over any sequence of changes; and after a look at everything nothing is held that the pool does not have."""
    choose = random.Random(seed)
    pool, there = Pool(), HeldPrefixes()
    ledger = pool.ledger()
    for _ in range(200):
        block, content = choose.randrange(12), choose.choice([None, "x", "y", "z"])
        pool.contents[block] = content
        if content is not None and choose.random() < 0.7:
            ledger.holds((content.encode(),), (block,))
        if choose.random() < 0.3:
            ledger.taken(choose.sample(range(12), 3))
        if choose.random() < 0.1:
            ledger.look_at_all()
        there.update(*ledger.take_changes())
    ledger.look_at_all()
    there.update(*ledger.take_changes())
    for content in "xyz":
        held = there.held((content.encode(),)) == 1
        assert held <= (content in pool.contents.values())


def test_a_prefix_ends_where_a_block_is_missing() -> None:
    """Counted from the first block on."""
    held = HeldPrefixes()
    held.update((A, C), ())
    assert (held.held((A, B, C)), held.held((B,)), held.held((A,)), held.held(())) == (1, 0, 1, 0)


@pytest.fixture
def side() -> SchedulerSide:
    """A decode server's scheduler side, with ten cached blocks."""
    side = SchedulerSide(BLOCK, dict, lambda: 0.0)
    side.ledger = PrefixLedger({number: f"content {number}" for number in range(1, 11)}.get)
    return side


def test_loaded_prompts_are_held_from_their_first_step(side: SchedulerSide) -> None:
    """Whole blocks, in the order of the prompt; with the answer's blocks at the end."""
    tokens = list(range(40))
    side.on_new_request("a", TO_LOAD, 40, PromptTokens(tokens))
    side.on_allocated("a", [3, 4, 5], 39)
    assert side.orders([], ()).held == ()
    assert side.orders([ScheduledPrompt("a", [3, 4, 5], 39, 1)], ()).held == block_hashes(tokens, BLOCK)
    answered = [*tokens, *range(100, 110)]
    side.on_computed(PromptTokens(answered), [3, 4, 5, 6])
    assert side.orders([], ()).held == block_hashes(answered, BLOCK)[2:]


def test_what_turned_out_to_be_gone_is_looked_for(side: SchedulerSide) -> None:
    """A load that lacks what this server was thought to hold: everything is looked at."""
    contents = dict.fromkeys(range(1, 40), "x")
    side.ledger = PrefixLedger(contents.get)
    side.ledger.holds([bytes([number]) for number in range(39)], range(1, 40))
    side.on_new_request("a", TO_LOAD, 40, PromptTokens(range(40)))
    side.on_allocated("a", [3, 4, 5], 39)
    side.orders([], ())
    del contents[39]
    side.on_news(News(received={"a": "prefix_evicted"}), ["a"])
    assert side.orders([], ()).gone == (bytes([38]),)


def test_a_prompt_is_sent_with_its_hashes(side: SchedulerSide) -> None:
    """So that the receiver can say what it holds."""
    side.on_new_request("a", TO_SEND, 40, PromptTokens(range(40), "salt"))
    (order,) = side.orders([ScheduledPrompt("a", [3, 4, 5], 0, 40)], ()).sends
    assert order.prefix_hashes == block_hashes(range(40), BLOCK, "salt")


def test_only_what_is_lacking_travels(prefill: Server, decode: Server) -> None:  # noqa: F811
    """Of a prompt whose first block the decode server holds, the others come, and the first is not touched."""
    hashes = block_hashes(range(40), BLOCK)
    decode.step(Orders(held=hashes[:1]))
    before = {name: kv[4].clone() for name, kv in decode.kv.items()}
    plain = send(decode, "a", 40)
    order = Send("a", plain.handoff, 40, hashes)
    prefill.step(Orders(sends=(order,), written=(Written("a", 0, (7, 2, 11), True),)))
    decode.step(Orders(claims=(claim("a"),), loads=(Load("a", 1, (3, 9), 40),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == set()
    for name, ours in decode.kv.items():
        assert torch.equal(ours[[3, 9]], prefill.kv[name][[2, 11]])
        assert torch.equal(ours[4], before[name])
    assert until(lambda: decode.belt.snapshot().reused_bytes_total) > 0


def test_what_has_been_evicted_meanwhile_is_computed(prefill: Server, decode: Server) -> None:  # noqa: F811
    """The block that was left out is missing now: no block of the prompt counts as loaded, and the reason is told."""
    hashes = block_hashes(range(40), BLOCK)
    decode.step(Orders(held=hashes[:1]))
    order = Send("a", send(decode, "a", 40).handoff, 40, hashes)
    prefill.step(Orders(sends=(order,), written=(Written("a", 0, (7, 2, 11), True),)))
    until(lambda: decode.belt.snapshot().bytes_committed)
    decode.step(Orders(gone=hashes[:1], claims=(claim("a"),), loads=(Load("a", 0, (4, 3, 9), 40),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == {4, 3, 9}
    assert decode.side.take_news().received == {"a": "prefix_evicted"}
    until(lambda: decode.belt.snapshot().bytes_committed == 0)
