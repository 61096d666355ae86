"""The index of host memory, and the scheduler's half of mixed storage: values in, values out."""

import random

import pytest

from kvbelt.vllm.host_scheduler import HostScheduler
from kvbelt.vllm.host_store import HostIndex
from kvbelt.vllm.orders import News, ScheduledPrompt
from kvbelt.vllm.scheduler_side import PromptTokens, SchedulerSide

BLOCK = 4


def chain(name: str, length: int) -> list[bytes]:
    """Hashes of one prompt's blocks."""
    return [f"{name}{number}".encode() for number in range(length)]


def test_what_is_kept_is_found_from_its_start() -> None:
    """A run ends at the first block that has no place."""
    index = HostIndex(8)
    placed = index.keep(chain("a", 3))
    assert [number for number, _ in placed] == [0, 1, 2]
    assert index.find(chain("a", 5)) == tuple(place for _, place in placed)
    assert index.find(chain("b", 2)) == ()
    assert index.find(chain("a", 3)[1:]) == tuple(place for _, place in placed[1:])


def test_a_block_has_one_place() -> None:
    """Keeping again asks for nothing, and a longer prompt only for what is new."""
    index = HostIndex(8)
    index.keep(chain("a", 3))
    assert index.keep(chain("a", 3)) == []
    assert [number for number, _ in index.keep(chain("a", 4))] == [3]


def test_the_least_recently_used_leave_first() -> None:
    """Looking a block up is using it."""
    index = HostIndex(4)
    index.keep(chain("a", 2))
    index.keep(chain("b", 2))
    index.find(chain("a", 2))
    index.keep(chain("c", 2))
    assert len(index.find(chain("a", 2))) == 2
    assert index.find(chain("b", 2)) == ()
    assert index.evicted == 2


def test_a_prompt_s_tail_leaves_before_its_head() -> None:
    """What is left of a prompt is a prefix of it."""
    index = HostIndex(4)
    index.keep(chain("a", 4))
    index.keep(chain("b", 1))
    assert len(index.find(chain("a", 4))) == 3


def test_a_prompt_larger_than_the_room_keeps_its_head() -> None:
    """And does not push itself out."""
    index = HostIndex(3)
    assert len(index.keep(chain("a", 5))) == 3
    assert len(index.find(chain("a", 5))) == 3
    assert index.evicted == 0


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
    """Over any sequence of calls, and a find never names a place that another block has."""
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
    side = SchedulerSide(BLOCK, dict, lambda: 0.0)
    side.host = HostScheduler(BLOCK, 10)
    return side


def come(side: SchedulerSide, name: str, tokens: range, salt: str = "") -> None:
    """A request without parameters."""
    side.on_new_request(name, None, len(tokens), PromptTokens(tokens, salt))


def test_whole_blocks_are_kept_as_steps_complete_them(side: SchedulerSide) -> None:
    """The half-filled last block is not, and neither is anything that is generated."""
    come(side, "a", range(10))
    first = side.orders([ScheduledPrompt("a", [5, 6], 0, 6)], ())
    second = side.orders([ScheduledPrompt("a", [7], 6, 4)], ())
    third = side.orders([ScheduledPrompt("a", [], 10, 2)], ())
    assert [keep.block_ids for keep in first.keeps] == [(5,)]
    assert [keep.block_ids for keep in second.keeps] == [(6,)]
    assert third.keeps == ()
    assert side.on_finished("a") == (True, None)
    assert side.num_requests == 0


def test_a_prompt_finds_what_another_has_left(side: SchedulerSide) -> None:
    """Beyond what the prefix cache has, up to its last token; and it is loaded into its own blocks."""
    come(side, "a", range(12))
    (keep,) = side.orders([ScheduledPrompt("a", [5, 6, 7], 0, 12)], ()).keeps
    come(side, "b", range(12))
    assert side.loadable_tokens("b", 0) == 8  # the last block holds the last token
    come(side, "c", range(14))
    assert side.loadable_tokens("c", 4) == 8
    side.on_allocated("c", [1, 2, 3, 4], 8)
    (restore,) = side.orders([], ()).restores
    assert (restore.block_ids, restore.places) == ((2, 3), keep.places[1:])
    assert side.orders([ScheduledPrompt("c", [1, 2, 3, 4], 12, 2)], ()).keeps == ()


def test_loaded_blocks_are_sent_and_reported(side: SchedulerSide) -> None:
    """What comes from host memory leaves over the belt with the first step, and the answer says how much it was."""
    come(side, "a", range(12))
    side.orders([ScheduledPrompt("a", [5, 6, 7], 0, 12)], ())
    receiver = {"engine_id": "d", "host": "127.0.0.1", "init_port": 7300, "alloc_port": 7400}
    to_send = {"transfer_id": "t", "receiver": receiver, "deadline_seconds": 30.0}
    side.on_new_request("b", to_send, 12, PromptTokens(range(12)))
    side.on_allocated("b", [1, 2, 3], side.loadable_tokens("b", 0) or 0)
    assert side.orders([], ()).sends == ()
    orders = side.orders([ScheduledPrompt("b", [1, 2, 3], 8, 4)], ())
    assert [written.block_ids for written in orders.written] == [(1, 2, 3)]
    held, answer = side.on_finished("b")
    assert held
    assert answer == {"transfer_id": "t", "state": "open", "reason": None, "loaded_tokens": 8}


def test_salts_share_nothing(side: SchedulerSide) -> None:
    """A tenant's blocks are found by that tenant."""
    come(side, "a", range(12), salt="x")
    side.orders([ScheduledPrompt("a", [5, 6, 7], 0, 12)], ())
    come(side, "b", range(12), salt="y")
    come(side, "c", range(12), salt="x")
    assert side.loadable_tokens("b", 0) == 0
    assert side.loadable_tokens("c", 0) == 8


def test_a_preempted_prompt_is_read_no_more_and_begins_again(side: SchedulerSide) -> None:
    """The worker is told to stop; when the prompt comes back, its blocks are others."""
    come(side, "a", range(12))
    side.orders([ScheduledPrompt("a", [5], 0, 4)], ())
    assert side.orders([], ("a",)).preempted == ("a",)
    side.on_allocated("a", [1, 2, 3], side.loadable_tokens("a", 0) or 0)
    assert side.orders([], ()).restores[0].block_ids == (1,)
    assert side.orders([ScheduledPrompt("a", [1, 2, 3], 4, 8)], ()).keeps[0].block_ids == (2, 3)


def test_spoiled_places_are_forgotten(side: SchedulerSide) -> None:
    """What a worker could not copy is not offered."""
    come(side, "a", range(12))
    (keep,) = side.orders([ScheduledPrompt("a", [5, 6, 7], 0, 12)], ()).keeps
    side.on_news(News(spoiled=frozenset(keep.places[1:2])), ())
    come(side, "b", range(12))
    assert side.loadable_tokens("b", 0) == 4


def test_prompts_that_are_not_only_tokens_are_left_alone(side: SchedulerSide) -> None:
    """Nothing is kept of them, nothing offered, nothing held."""
    side.on_new_request("a", None, 12, None)
    assert side.orders([ScheduledPrompt("a", [5, 6, 7], 0, 12)], ()).keeps == ()
    assert side.loadable_tokens("a", 0) == 0
    assert side.on_finished("a") == (False, None)
