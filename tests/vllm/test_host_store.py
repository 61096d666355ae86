"""The index of host memory, and the scheduler's half of mixed storage: values in, values out."""

import random
from functools import partial

import pytest

from kvbelt.about import of_this_process
from kvbelt.vllm.host_scheduler import HostIndex
from kvbelt.vllm.identity import RankIdentity, ServerFacts, describe
from kvbelt.vllm.requests import PromptTokens
from kvbelt.vllm.scheduler_side import SchedulerSide
from kvbelt.vllm.step_messages import ScheduledPrompt, StepReport
from kvbelt.wire.handoff import HandoffState
from kvbelt.wire.health import Role
from kvbelt.wire.ids import EngineId, TransferId
from tests.vllm.belts import pacing

BLOCK = 4


def chain(name: str, length: int) -> list[bytes]:
    """Hashes of one prompt's blocks."""
    return [f"{name}{number}".encode() for number in range(length)]


def test_what_is_kept_is_found_from_its_start() -> None:
    """A run ends at the first block without a place."""
    index = HostIndex(8)
    placed = index.keep(chain("a", 3))
    assert [number for number, _ in placed] == [0, 1, 2]
    assert index.find(chain("a", 5)) == tuple(place for _, place in placed)
    assert index.find(chain("b", 2)) == ()
    assert index.find(chain("a", 3)[1:]) == tuple(place for _, place in placed[1:])


def test_a_block_has_one_place() -> None:
    """A block that has a place gets no second one."""
    index = HostIndex(8)
    index.keep(chain("a", 3))
    assert index.keep(chain("a", 3)) == []
    assert [number for number, _ in index.keep(chain("a", 4))] == [3]


def test_the_least_recently_used_leave_first() -> None:
    """Looking a block up counts as use."""
    index = HostIndex(4)
    index.keep(chain("a", 2))
    index.keep(chain("b", 2))
    index.find(chain("a", 2))
    index.keep(chain("c", 2))
    assert len(index.find(chain("a", 2))) == 2
    assert index.find(chain("b", 2)) == ()
    assert index.num_evicted == 2


def test_a_prompt_s_tail_leaves_before_its_head() -> None:
    """The rest of a prompt is a prefix of it."""
    index = HostIndex(4)
    index.keep(chain("a", 4))
    index.keep(chain("b", 1))
    assert len(index.find(chain("a", 4))) == 3


def test_a_prompt_larger_than_the_room_keeps_its_head() -> None:
    """Only its head is kept, and it evicts none of its own blocks."""
    index = HostIndex(3)
    assert len(index.keep(chain("a", 5))) == 3
    assert len(index.find(chain("a", 5))) == 3
    assert index.num_evicted == 0


def test_spoiled_places_are_given_again() -> None:
    """A block that could not be copied is not found, and its place serves another."""
    index = HostIndex(2)
    ((_, first), _) = index.keep(chain("a", 2))
    index.forget([first])
    assert index.find(chain("a", 2)) == ()
    assert index.keep(chain("b", 1)) == [(0, first)]
    index.clear()
    assert len(index) == 0
    index.check()


@pytest.mark.parametrize("seed", range(20))
def test_no_place_is_lost_or_taken_twice(seed: int) -> None:
    """After any sequence of calls, every place is kept once, and a find never returns another block's place."""
    choose = random.Random(seed)
    index = HostIndex(choose.randint(1, 12))
    holds: dict[int, bytes] = {}
    for _ in range(300):
        hashes = chain(choose.choice("abcdef"), choose.randint(1, 15))
        if choose.random() < 0.6:
            for number, place in index.keep(hashes):
                holds[place] = hashes[number]
        elif choose.random() < 0.2:
            index.forget(choose.sample(range(index.capacity), 1))
        for number, place in enumerate(index.find(hashes)):
            assert holds[place] == hashes[number]
        index.check()


@pytest.fixture
def side() -> SchedulerSide:
    """A scheduler's side with room for 10 blocks in host memory."""
    side = SchedulerSide(BLOCK, partial(describe, ServerFacts(Role.PREFILL, "m", 2048)), pacing(), lambda: 0.0)
    side.on_workers_ready(RankIdentity(EngineId("p"), None, 10, of_this_process("prefill", "vllm")))
    return side


def come(side: SchedulerSide, name: str, tokens: range, salt: str = "") -> None:
    """A request without parameters."""
    side.on_new_request(name, None, len(tokens), PromptTokens(tokens, salt))


def test_whole_blocks_are_kept_as_steps_complete_them(side: SchedulerSide) -> None:
    """Neither the half-filled last block is kept, nor, by a step, a generated one."""
    come(side, "a", range(10))
    first = side.take_step([ScheduledPrompt("a", [5, 6], 0, 6)], ())
    second = side.take_step([ScheduledPrompt("a", [7], 6, 4)], ())
    third = side.take_step([ScheduledPrompt("a", [], 10, 2)], ())
    assert [keep.block_ids for keep in first.keeps] == [(5,)]
    assert [keep.block_ids for keep in second.keeps] == [(6,)]
    assert third.keeps == ()
    assert side.on_finished("a") == (True, None)
    assert side.num_requests == 0


def test_a_prompt_finds_what_another_has_left(side: SchedulerSide) -> None:
    """Blocks beyond the prefix cache, up to the last token, are loaded into the prompt's own blocks."""
    come(side, "a", range(12))
    (keep,) = side.take_step([ScheduledPrompt("a", [5, 6, 7], 0, 12)], ()).keeps
    come(side, "b", range(12))
    assert side.loadable("b", 0).tokens == 8  # the last block holds the last token
    come(side, "c", range(14))
    assert side.loadable("c", 4).tokens == 8
    side.on_allocated("c", [1, 2, 3, 4], 8)
    (restore,) = side.take_step([], ()).copies
    assert (restore.block_ids, restore.places) == ((2, 3), keep.places[1:])
    assert side.take_step([ScheduledPrompt("c", [1, 2, 3, 4], 12, 2)], ()).keeps == ()


def end(side: SchedulerSide, name: str, num_tokens: int, block_ids: list[int]) -> bool:
    """The request ends, and so many tokens of it were computed. Whether its blocks are still read."""
    return side.on_finished(name, PromptTokens(range(num_tokens)), block_ids)[0]


def test_an_answer_is_kept_when_it_ends(side: SchedulerSide) -> None:
    """The next turn finds its whole blocks after those of the prompt."""
    come(side, "a", range(10))
    side.take_step([ScheduledPrompt("a", [5, 6, 7], 0, 10)], ())
    assert end(side, "a", 17, [5, 6, 7, 8, 9])
    (keep,) = side.take_step([], ()).copies
    assert (keep.request_id, keep.block_ids, keep.to_host) == ("a", (7, 8), True)
    come(side, "b", range(20))
    assert side.loadable("b", 0).tokens == 16


def arrive(side: SchedulerSide, name: str, num_tokens: int) -> None:
    """A request whose KV comes over the belt, and is loaded."""
    to_load = {"transfer_id": name, "deadline_seconds": 30.0}
    side.on_new_request(name, to_load, num_tokens, PromptTokens(range(num_tokens)))
    side.on_allocated(name, [5, 6, 7], side.loadable(name, 0).tokens or 0)
    side.take_step([], ())


def test_what_came_over_the_belt_is_kept_when_its_answer_ends(side: SchedulerSide) -> None:
    """Prompt and answer at once, in a step of their own."""
    arrive(side, "a", 10)
    assert side.take_step([ScheduledPrompt("a", [5, 6, 7], 9, 1)], ()).keeps == ()
    assert end(side, "a", 13, [5, 6, 7, 8])
    (keep,) = side.take_step([], ()).copies
    assert keep.block_ids == (5, 6, 7)
    assert side.host is not None
    assert side.host.tokens_asked == 0


def test_what_may_not_have_come_is_not_kept(side: SchedulerSide) -> None:
    """A request that ends during its load, or before it has generated anything."""
    arrive(side, "a", 10)
    assert not end(side, "a", 9, [5, 6, 7])
    arrive(side, "b", 10)
    side.take_step([ScheduledPrompt("b", [5, 6, 7], 9, 1)], ())
    assert not end(side, "b", 9, [5, 6, 7])
    assert side.take_step([], ()).copies == ()


def test_what_may_not_have_been_restored_is_not_kept(side: SchedulerSide) -> None:
    """A preempted request that ends while it gets back what it had."""
    come(side, "a", range(10))
    side.take_step([ScheduledPrompt("a", [5, 6, 7], 0, 10)], ())
    side.take_step([], ("a",))
    side.on_allocated("a", [1, 2, 3, 4], side.loadable("a", 0).tokens or 0)
    side.take_step([], ())
    end(side, "a", 16, [1, 2, 3, 4])
    assert side.take_step([], ()).copies == ()


def test_copies_are_made_in_the_order_of_their_decisions(side: SchedulerSide) -> None:
    """A place is read before it gets another block."""
    come(side, "a", range(8))
    side.take_step([ScheduledPrompt("a", [5, 6], 0, 8)], ())
    side.on_new_request("long", None, 38, PromptTokens(range(100, 138)))
    side.take_step([ScheduledPrompt("long", range(10, 20), 38, 0)], ())
    come(side, "b", range(9))
    side.on_allocated("b", [1, 2, 3], side.loadable("b", 0).tokens or 0)
    tokens = [*range(100, 138), *range(200, 207)]
    side.on_finished("long", PromptTokens(tokens), [*range(10, 22)])
    restore, keep = side.take_step([], ()).copies
    assert (restore.to_host, keep.to_host) == (False, True)
    assert set(restore.places) & set(keep.places)


def test_loaded_blocks_are_sent_and_reported(side: SchedulerSide) -> None:
    """Restored blocks are sent with the first step, and the answer says how many tokens they hold."""
    come(side, "a", range(12))
    side.take_step([ScheduledPrompt("a", [5, 6, 7], 0, 12)], ())
    receiver = {"engine_id": "d", "host": "127.0.0.1", "init_port": 7300, "alloc_port": 7400}
    to_send = {"transfer_id": "t", "receiver": receiver, "deadline_seconds": 30.0}
    side.on_new_request("b", to_send, 12, PromptTokens(range(12)))
    side.on_allocated("b", [1, 2, 3], side.loadable("b", 0).tokens or 0)
    assert side.take_step([], ()).sends == ()
    orders = side.take_step([ScheduledPrompt("b", [1, 2, 3], 8, 4)], ())
    assert [written.block_ids for written in orders.written] == [(1, 2, 3)]
    held, answer = side.on_finished("b")
    assert held
    assert answer == HandoffState(TransferId("t"), "open", loaded_tokens=8)


def test_salts_share_nothing(side: SchedulerSide) -> None:
    """Blocks are found only under the salt that they were kept with."""
    come(side, "a", range(12), salt="x")
    side.take_step([ScheduledPrompt("a", [5, 6, 7], 0, 12)], ())
    come(side, "b", range(12), salt="y")
    come(side, "c", range(12), salt="x")
    assert side.loadable("b", 0).tokens == 0
    assert side.loadable("c", 0).tokens == 8


def test_a_preempted_prompt_is_read_no_more_and_begins_again(side: SchedulerSide) -> None:
    """The worker is told to stop; when the prompt comes back, it has other blocks."""
    come(side, "a", range(12))
    side.take_step([ScheduledPrompt("a", [5], 0, 4)], ())
    assert side.take_step([], ("a",)).preempted == ("a",)
    side.on_allocated("a", [1, 2, 3], side.loadable("a", 0).tokens or 0)
    assert side.take_step([], ()).copies[0].block_ids == (1,)
    assert side.take_step([ScheduledPrompt("a", [1, 2, 3], 4, 8)], ()).keeps[0].block_ids == (2, 3)


def test_spoiled_places_are_forgotten(side: SchedulerSide) -> None:
    """A block that a worker could not copy is not offered."""
    come(side, "a", range(12))
    (keep,) = side.take_step([ScheduledPrompt("a", [5, 6, 7], 0, 12)], ()).keeps
    side.on_report(StepReport(spoiled=frozenset(keep.places[1:2])), ())
    come(side, "b", range(12))
    assert side.loadable("b", 0).tokens == 4


def test_prompts_that_are_not_only_tokens_are_left_alone(side: SchedulerSide) -> None:
    """None of their blocks is kept, offered or held."""
    side.on_new_request("a", None, 12, None)
    assert side.take_step([ScheduledPrompt("a", [5, 6, 7], 0, 12)], ()).keeps == ()
    assert side.loadable("a", 0).tokens == 0
    assert side.on_finished("a") == (False, None)
