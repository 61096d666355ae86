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
    """Neither the half-filled last block nor generated blocks are kept."""
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
    (restore,) = side.take_step([], ()).restores
    assert (restore.block_ids, restore.places) == ((2, 3), keep.places[1:])
    assert side.take_step([ScheduledPrompt("c", [1, 2, 3, 4], 12, 2)], ()).keeps == ()


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
    assert side.take_step([], ()).restores[0].block_ids == (1,)
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
