"""Models with several groups of layers: which cross, which blocks of them, and every byte of these."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from kvbelt.vllm.groups import ONE_GROUP, Groups, groups_of, kept, to_fill
from kvbelt.vllm.identity import ServerFacts, describe
from kvbelt.vllm.refusals import store_problem
from kvbelt.vllm.scheduler_side import SchedulerSide
from kvbelt.vllm.step_messages import Load, ScheduledPrompt, StepCommands
from kvbelt.wire.handoff import DecodeOutcome, HandoffState
from kvbelt.wire.health import Role
from kvbelt.wire.ids import TransferId
from kvbelt.wire.layout import KVLayout, first_kept
from tests.channels.memory import MemoryNetwork
from tests.vllm.belts import (
    BLOCK,
    BLOCKS,
    LAYERS,
    TO_LOAD,
    TO_SEND,
    BeltServer,
    Clock,
    claim,
    loaded,
    pacing,
    send,
    until,
)

WINDOW = 20
SEVERAL = Groups((1, 0), (WINDOW,))
LAYOUT = KVLayout(LAYERS, 2, 4, BLOCK, "float32", "x", 64, (WINDOW, 0))


class FullAttentionSpec(SimpleNamespace): ...


class SlidingWindowSpec(SimpleNamespace): ...


class MambaSpec(SimpleNamespace): ...


def full(**other: int) -> FullAttentionSpec:
    """What vLLM says of a group that sees all."""
    return FullAttentionSpec(**{"block_size": 16, "page_size_bytes": 1024, **other})


def window(tokens: int, **other: int) -> SlidingWindowSpec:
    """And of one that sees so many tokens."""
    return SlidingWindowSpec(**{"block_size": 16, "page_size_bytes": 1024, "sliding_window": tokens, **other})


def config(*specs: SimpleNamespace, layout: str | None = None) -> SimpleNamespace:
    """A ``KVCacheConfig`` with these groups."""
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    return SimpleNamespace(kv_cache_groups=groups, kv_cache_layout=layout)


def test_a_group_that_sees_all_leads() -> None:
    """Its blocks come first, whatever its number; the others follow as vLLM has them."""
    groups = groups_of(config(window(64), window(64), full(), full(), layout="LBHNC"))
    assert groups == Groups((2, 0, 1, 3), (64, 64, 0))
    assert (groups.lead("abcd"), groups.others("abcd")) == ("c", ("a", "b", "d"))


@pytest.mark.parametrize("spec", [full(), window(64), SimpleNamespace()])
def test_one_group_is_as_it_was(spec: SimpleNamespace) -> None:
    """Its pages are looked at when vLLM has allocated them."""
    assert groups_of(config(spec)) == ONE_GROUP


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (config(MambaSpec()), "a state and no KV"),
        (config(full(), MambaSpec()), "of 2 kinds of KV cache one is MambaSpec"),
        (config(full(), window(64, page_size_bytes=2048)), "16 tokens in 1024 bytes, 16 tokens in 2048 bytes"),
        (config(full(), window(64, block_size=32)), "16 tokens in 1024 bytes, 32 tokens in 1024 bytes"),
        (config(window(32), window(64)), "each of its 2 kinds of KV cache has a window"),
        (config(full(), window(64), layout="BLHNC"), "layout is BLHNC"),
    ],
)
def test_what_cannot_be_moved_is_named(config: SimpleNamespace, problem: str) -> None:
    """Such a server starts, and says why its KV stays."""
    assert problem in groups_of(config).problem


@pytest.mark.parametrize(
    ("num_tokens", "first"), [(1, 0), (WINDOW, 0), (WINDOW + BLOCK - 2, 0), (WINDOW + BLOCK - 1, 1), (100, 5)]
)
def test_a_window_keeps_what_the_next_token_sees(num_tokens: int, first: int) -> None:
    """Which is itself and the tokens before it, one less than the window has."""
    assert first_kept(num_tokens, WINDOW, BLOCK) == first
    assert first_kept(num_tokens, 0, BLOCK) == 0


def test_a_prompt_has_the_blocks_of_all_groups() -> None:
    """All of the first, those within the window of the second, all of the third."""
    assert LAYOUT.blocks(100) == 7 + 2 + 7
    assert kept(100, BLOCK, LAYOUT.windows, [[0, 0, 0, 0, 0, 8, 9], [1, 2, 3, 4, 5, 6, 7]]) == (
        8,
        9,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    )


def test_blocks_that_are_not_wanted_go_nowhere() -> None:
    """Cached ones, and the one that has only the token after those that are loaded."""
    load = Load("a", 5, (25,), 96, others=((35,), (45,)))
    assert to_fill(load, LAYOUT, 97) == (25, 0, 0, 35, 0, 0, 0, 0, 0, 0, 45, 0)


def test_a_block_that_was_given_back_before_it_was_sent_is_missed() -> None:
    """Where the last token is computed again, its window may begin a block earlier than what was kept."""
    num_tokens = WINDOW + BLOCK - 1
    load = Load("a", 0, (1, 2, 3), num_tokens - 1, others=((4, 5, 6), (7, 8, 9)))
    assert to_fill(load, LAYOUT, num_tokens) is None
    assert to_fill(load, LAYOUT, num_tokens - 1) is not None


@pytest.mark.parametrize(
    ("groups", "host_bytes", "refused"), [(SEVERAL, 1, True), (SEVERAL, 0, False), (ONE_GROUP, 1, False)]
)
def test_host_memory_keeps_one_group(groups: Groups, host_bytes: int, refused: bool) -> None:
    """More are refused with the way out."""
    problem = store_problem(groups, host_bytes)
    assert (problem is not None and "--disable-hybrid-kv-cache-manager" in problem) == refused


def scheduler(groups: Groups) -> SchedulerSide:
    """The scheduler's side of a server with these groups."""
    return SchedulerSide(BLOCK, partial(describe, ServerFacts(Role.BOTH, "m", 2048)), pacing(), Clock(), groups)


def test_the_last_step_sends_what_the_window_keeps() -> None:
    """Chunks send the first group's blocks, and the end of the prompt those of the others."""
    side = scheduler(SEVERAL)
    side.on_new_request("a", TO_SEND, 60, generates=False)
    first = side.take_step([ScheduledPrompt("a", [1, 2], 0, 32, ([11, 12],))], ())
    second = side.take_step([ScheduledPrompt("a", [3, 4], 32, 28, ([13, 14],))], ())
    assert [(one.first, one.block_ids, one.last) for one in first.written] == [(0, (1, 2), False)]
    # The token after 60 sees those from 41 on, which lie in the blocks from the third on.
    assert [(one.first, one.block_ids, one.last) for one in second.written] == [(2, (3, 4, 13, 14), True)]
    assert side.on_finished("a") == (True, HandoffState(TransferId("t"), "open"))


def test_blocks_that_vllm_has_given_up_are_not_sent() -> None:
    """The transfer is never complete, and fails."""
    side = scheduler(SEVERAL)
    side.on_new_request("a", TO_SEND, 60, generates=False)
    assert side.take_step([ScheduledPrompt("a", [1, 2, 3, 4], 0, 60, ([0, 0, 0, 14],))], ()).written == ()


def test_a_prompt_whose_answer_goes_on_here_is_not_sent() -> None:
    """Its window moves on, and vLLM gives blocks away that may still be read."""
    side = scheduler(SEVERAL)
    side.on_new_request("a", TO_SEND, 60)
    assert side.take_step([ScheduledPrompt("a", [1, 2, 3, 4], 0, 60, ([11, 12, 13, 14],))], ()).sends == ()
    assert side.on_finished("a") == (False, HandoffState(TransferId("t"), "failed", "kv_groups"))


def test_a_load_has_the_blocks_of_every_group() -> None:
    """From the first that is not cached on; vLLM has no block where the window has passed."""
    side = scheduler(SEVERAL)
    side.on_new_request("a", TO_LOAD, 61)
    assert side.loadable("a", 16).tokens == 44
    side.on_allocated("a", [1, 2, 3, 4], 44, [[0, 0, 13, 14]])
    (load,) = side.take_step([], ()).loads
    assert (load.first, load.block_ids, load.others) == (1, (2, 3, 4), ((0, 13, 14),))


def test_kv_that_cannot_be_moved_is_computed_on_both_sides() -> None:
    """Nothing is asked of a worker, no block is held, and both answers say why."""
    side = scheduler(Groups(problem="one is MambaSpec"))
    side.on_new_request("a", TO_SEND, 60, generates=False)
    side.on_new_request("b", TO_LOAD, 60)
    assert side.loadable("b", 0).tokens == 0
    side.on_allocated("b", [5, 6, 7, 8], 0)
    commands = side.take_step(
        [ScheduledPrompt("a", [1, 2, 3, 4], 0, 60), ScheduledPrompt("b", [5, 6, 7, 8], 0, 60)], ()
    )
    assert (commands.sends, commands.written, commands.claims, commands.loads, commands.drops) == ((), (), (), (), ())
    assert side.on_finished("a") == (False, HandoffState(TransferId("t"), "failed", "kv_groups"))
    assert side.on_finished("b") == (False, DecodeOutcome(TransferId("t"), "recomputed", "kv_groups"))
    assert side.num_requests == 0


@pytest.fixture
def pair() -> Iterator[tuple[BeltServer, BeltServer]]:
    """A prefill and a decode worker with a group that sees all and one with a window."""
    network = MemoryNetwork()
    servers = [BeltServer(role, network, windows=(WINDOW,)) for role in ("prefill", "decode")]
    yield servers[0], servers[1]
    for server in servers:
        server.close()


def prompt_of(scheduler_side: SchedulerSide, prefill: BeltServer, decode: BeltServer, *, hooks: bool) -> None:
    """Compute a prompt of 60 tokens in two steps, with the blocks of ``test_the_last_step…``."""
    order = send(decode, "a", 60)
    scheduler_side.on_new_request("a", TO_SEND, 60, generates=False)
    for blocks, others, start, count in (([1, 2], [11, 12], 0, 32), ([3, 4], [13, 14], 32, 28)):
        step = scheduler_side.take_step([ScheduledPrompt("a", blocks, start, count, (others,))], ())
        prefill.step(StepCommands(sends=(order,) if step.sends else (), written=step.written), hooks=hooks)


@pytest.mark.parametrize("hooks", [True, False], ids=["hooks", "one-graph"])
@pytest.mark.parametrize("num_tokens", [60, 59], ids=["first-token", "re-derive"])
def test_two_groups_arrive_whole(pair: tuple[BeltServer, BeltServer], hooks: bool, num_tokens: int) -> None:
    """Every byte of every block that is wanted, and no other block is touched."""
    prefill, decode = pair
    prompt_of(scheduler(SEVERAL), prefill, decode, hooks=hooks)
    before = {name: kv.clone() for name, kv in decode.kv.items()}
    load = Load("a", 0, (9, 8, 7, 6), num_tokens, others=((0, 0, 18, 17),))
    decode.step(StepCommands(claims=(claim("a"),), loads=(load,)))
    assert loaded(decode) == {"a"}
    assert (decode.side.take_bad_blocks(), decode.side.take_failed()) == (set(), set())
    assert decode.side.take_report().received == {"a": ""}
    untouched = [block for block in range(1, BLOCKS) if block not in (9, 8, 7, 6, 18, 17)]
    for name, ours in decode.kv.items():
        assert torch.equal(ours[[9, 8, 7, 6, 18, 17]], prefill.kv[name][[1, 2, 3, 4, 13, 14]])
        assert torch.equal(ours[untouched], before[name][untouched])
    assert prefill.side.finished({"a"})[0] or until(lambda: prefill.side.finished(set())[0]) == {"a"}


def test_only_what_a_window_keeps_travels(pair: tuple[BeltServer, BeltServer]) -> None:
    """Four blocks of one group and two of the other."""
    prefill, decode = pair
    prompt_of(scheduler(SEVERAL), prefill, decode, hooks=True)
    layout = decode.layout
    assert until(lambda: decode.belt.snapshot().bytes_committed) == LAYERS * 6 * layout.block_bytes


def test_a_row_waits_for_every_group(pair: tuple[BeltServer, BeltServer]) -> None:
    """A row goes once both groups' layers have been computed in the step."""
    prefill, decode = pair
    written = scheduler(SEVERAL)
    written.on_new_request("a", TO_SEND, 16, generates=False)
    step = written.take_step([ScheduledPrompt("a", [1], 0, 16, ([11],))], ())
    prefill.side.begin_step(StepCommands(sends=(send(decode, "a", 16),), written=step.written))
    for group in (0, 1):
        for layer in range(LAYERS):
            for kv in prefill.kv.values():
                kv[1 if group else 11] += 1  # the layer's own keys and values, as the forward pass writes them
            prefill.side.layer_written(layer, group)
    prefill.side.end_step()
    decode.step(StepCommands(claims=(claim("a"),), loads=(Load("a", 0, (5,), 16, others=((6,),)),)))
    assert loaded(decode) == {"a"}
    name = next(iter(decode.kv))
    assert torch.equal(decode.kv[name][6], prefill.kv[name][11])


@pytest.mark.parametrize(("seconds", "reason"), [(0.2, None), (10.0, "window_edge")])
def test_a_lost_load_is_told_by_its_request(
    pair: tuple[BeltServer, BeltServer], seconds: float, reason: str | None
) -> None:
    """Where there are several groups, a block says too little to vLLM."""
    prefill, decode = pair
    if reason is not None:
        prompt_of(scheduler(SEVERAL), prefill, decode, hooks=True)
    load = Load("a", 0, (9, 8, 7, 6), 60, others=((0, 16, 18, 17),))
    decode.step(StepCommands(claims=(claim("a", seconds),), loads=(load,)))
    assert loaded(decode) == {"a"}
    assert (decode.side.take_failed(), decode.side.take_bad_blocks()) == ({"a"}, set())
    assert decode.side.take_failed() == set()
    received = decode.side.take_report().received["a"]
    assert received == reason if reason is not None else received
