"""The scheduler's side: values in, values out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvbelt.vllm.about import BeltLook
from kvbelt.vllm.orders import Claim, News, Orders, ScheduledPrompt
from kvbelt.vllm.scheduler_side import SchedulerSide
from kvbelt.wire.ids import EngineId

BLOCK = 16
RECEIVER = {"engine_id": "d", "host": "127.0.0.1", "init_port": 7300, "alloc_port": 7400}
TO_SEND = {"transfer_id": "t", "receiver": RECEIVER, "deadline_seconds": 30.0}
TO_LOAD = {"transfer_id": "t", "deadline_seconds": 30.0}


class Clock:
    """Time, set by hand."""

    now = 100.0

    def __call__(self) -> float:
        """Now."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock of its own for each test."""
    return Clock()


@pytest.fixture
def side(clock: Clock) -> SchedulerSide:
    """A scheduler's side that calls itself X."""
    return SchedulerSide(BLOCK, lambda looks: {"engine_id": "X", "looks": dict(looks)}, clock)


def step(side: SchedulerSide, *prompts: tuple[str, list[int], int, int], preempted: tuple[str, ...] = ()) -> Orders:
    """One scheduled step."""
    return side.orders([ScheduledPrompt(*prompt) for prompt in prompts], preempted)


def test_a_prompt_in_one_step_is_sent_whole(side: SchedulerSide) -> None:
    """Every block goes with the step that computes the prompt, the half-filled last one too."""
    side.on_new_request("a", TO_SEND, 40)
    orders = step(side, ("a", [5, 6, 7], 0, 40))
    assert [(send.request_id, send.num_tokens) for send in orders.sends] == [("a", 40)]
    (written,) = orders.written
    assert (written.first, written.block_ids, written.last) == (0, (5, 6, 7), True)


def test_chunks_send_what_they_complete(side: SchedulerSide) -> None:
    """A block goes with the chunk that fills it; the last one with the end of the prompt."""
    side.on_new_request("a", TO_SEND, 50)
    first = step(side, ("a", [5, 6], 0, 20))
    second = step(side, ("a", [], 20, 5))
    third = step(side, ("a", [7, 8], 25, 25))
    assert [(w.first, w.block_ids, w.last) for w in first.written] == [(0, (5,), False)]
    assert second.written == ()
    assert [(w.first, w.block_ids, w.last) for w in third.written] == [(1, (6, 7, 8), True)]
    assert not second.sends
    assert not third.sends


def test_cached_blocks_go_with_the_first_step(side: SchedulerSide) -> None:
    """What earlier prompts have left in the prefix cache is sent like what this one computes."""
    side.on_new_request("a", TO_SEND, 33)
    (written,) = step(side, ("a", [1, 2, 9], 32, 1)).written
    assert written.block_ids == (1, 2, 9)


def test_later_tokens_are_not_sent(side: SchedulerSide) -> None:
    """A request that goes on decoding here announces nothing more."""
    side.on_new_request("a", TO_SEND, 16)
    step(side, ("a", [1], 0, 16))
    assert step(side, ("a", [2], 16, 1)).written == ()


def test_remaining_time_travels(side: SchedulerSide, clock: Clock) -> None:
    """What a request has waited here is taken off its deadline."""
    side.on_new_request("a", TO_SEND, 16)
    clock.now += 10.0
    (send,) = step(side, ("a", [1], 0, 16)).sends
    assert send.handoff.deadline_seconds == pytest.approx(20.0)


def test_blocks_are_held_once_the_worker_sends(side: SchedulerSide) -> None:
    """A request that was scheduled keeps its blocks until the worker has read them; one that was not, does not."""
    side.on_new_request("a", TO_SEND, 16)
    side.on_new_request("b", {**TO_SEND, "transfer_id": "u"}, 16)
    step(side, ("a", [1], 0, 16))
    assert side.on_finished("a") == (
        True,
        {"transfer_id": "t", "state": "open", "reason": None, "loaded_tokens": 0},
    )
    assert side.on_finished("b")[0] is False
    assert side.num_requests == 0


def test_a_preempted_prompt_is_given_up(side: SchedulerSide) -> None:
    """Its worker is told to stop, nothing more is announced, and nothing is held at its end."""
    side.on_new_request("a", TO_SEND, 40)
    step(side, ("a", [1], 0, 20))
    assert step(side, preempted=("a", "other")).preempted == ("a",)
    assert step(side, ("a", [3, 4, 5], 0, 40)).written == ()
    held, params = side.on_finished("a")
    assert not held
    assert params is not None
    assert (params["state"], params["reason"]) == ("failed", "preempted")


def test_everything_but_the_last_token_is_loaded(side: SchedulerSide) -> None:
    """The blocks of the prompt without its last token are filled; those cached here are left alone."""
    side.on_new_request("a", TO_LOAD, 50)
    assert side.loadable_tokens("a", 16) == 33
    side.on_allocated("a", [1, 2, 3, 4], 33)
    orders = step(side)
    assert [claim.request_id for claim in orders.claims] == ["a"]
    (load,) = orders.loads
    assert (load.first, load.block_ids, load.num_tokens) == (1, (2, 3, 4), 49)


def test_a_block_for_the_last_token_alone_is_not_filled(side: SchedulerSide) -> None:
    """The prefill worker's prompt may end where a block ends."""
    side.on_new_request("a", TO_LOAD, 33)
    assert side.loadable_tokens("a", 0) == 32
    side.on_allocated("a", [1, 2, 3], 32)
    assert step(side).loads[0].block_ids == (1, 2)


def test_asking_changes_nothing(side: SchedulerSide) -> None:
    """The scheduler may ask as often as it likes before it has blocks."""
    side.on_new_request("a", TO_LOAD, 33)
    assert [side.loadable_tokens("a", 0), side.loadable_tokens("a", 16), side.loadable_tokens("a", 0)] == [32, 16, 32]


def test_a_prompt_that_is_cached_drops_its_transfer(side: SchedulerSide) -> None:
    """KV that nobody needs is released where it waits."""
    side.on_new_request("a", TO_LOAD, 33)
    step(side)
    assert side.loadable_tokens("a", 32) == 0
    side.on_allocated("a", [1, 2, 3], 0)
    assert step(side).drops == ("a",)
    assert side.on_finished("a") == (False, {"transfer_id": "t", "kv": "received", "reason": "cached"})


def test_it_is_loaded_once(side: SchedulerSide) -> None:
    """After a load that failed, the scheduler asks again, and computes."""
    side.on_new_request("a", TO_LOAD, 33)
    side.on_allocated("a", [1, 2, 3], 32)
    step(side)
    assert side.loadable_tokens("a", 0) == 0
    side.on_news(News(received={"a": "deadline"}), ["a"])
    assert side.loadable_tokens("a", 0) == 0
    side.on_allocated("a", [1, 2, 3], 0)
    assert step(side).drops == ()
    assert side.on_finished("a") == (False, {"transfer_id": "t", "kv": "recomputed", "reason": "deadline"})


def test_ranks_report_one_by_one(side: SchedulerSide) -> None:
    """What one rank lacks the request lacks, in whichever order they come."""
    side.on_new_request("a", TO_LOAD, 33)
    side.on_allocated("a", [1, 2, 3], 32)
    step(side)
    side.on_news(News(received={"a": "deadline"}), [])
    side.on_news(News(received={"a": ""}), ["a"])
    assert side.on_finished("a") == (False, {"transfer_id": "t", "kv": "recomputed", "reason": "deadline"})


def test_a_request_that_waited_too_long_computes(side: SchedulerSide, clock: Clock) -> None:
    """A deadline that passes in the queue is the end of the transfer."""
    side.on_new_request("a", TO_LOAD, 33)
    step(side)
    clock.now += 31.0
    assert side.loadable_tokens("a", 0) == 0
    side.on_allocated("a", [1, 2, 3], 0)
    assert step(side).drops == ("a",)


def test_an_aborted_load_is_dropped(side: SchedulerSide) -> None:
    """An aborted request: vLLM waits for the load to end; the worker is told to end it."""
    side.on_new_request("a", TO_LOAD, 33)
    side.on_allocated("a", [1, 2, 3], 32)
    step(side)
    held, _ = side.on_finished("a")
    assert not held
    assert step(side).drops == ("a",)
    assert side.num_requests == 0


def test_choices_of_one_request_share_a_transfer(side: SchedulerSide) -> None:
    """One loads; the others wait for it, and then find it cached, or compute."""
    side.on_new_request("0_cmpl-x-0-abcdef01", TO_LOAD, 33)
    side.on_new_request("1_cmpl-x-0-abcdef01", TO_LOAD, 33)
    side.on_allocated("0_cmpl-x-0-abcdef01", [1, 2, 3], 32)
    assert [claim.request_id for claim in step(side).claims] == ["0_cmpl-x-0-abcdef01"]
    assert side.loadable_tokens("1_cmpl-x-0-abcdef01", 0) is None
    side.on_news(News(), ["0_cmpl-x-0-abcdef01"])
    assert side.loadable_tokens("1_cmpl-x-0-abcdef01", 32) == 0


def test_prompts_of_one_request_have_transfers_of_their_own(side: SchedulerSide) -> None:
    """Which one it is vLLM writes in the request's id."""
    side.on_new_request("cmpl-x-0-abcdef01", TO_SEND, 16)
    side.on_new_request("cmpl-x-1-abcdef01", TO_SEND, 16)
    orders = step(side, ("cmpl-x-0-abcdef01", [1], 0, 16), ("cmpl-x-1-abcdef01", [2], 0, 16))
    assert [send.handoff.transfer_id for send in orders.sends] == ["t", "t.1"]


def test_who_are_you(side: SchedulerSide) -> None:
    """The proxy's question is answered in the answer."""
    side.on_new_request("a", {"kvbelt": "describe"}, 1)
    assert side.on_finished("a") == (False, {"engine_id": "X", "looks": {}})
    assert side.num_requests == 0


def test_how_are_you(side: SchedulerSide) -> None:
    """Ranks look at their belts with the question's first step; what they see until its end is in the answer."""
    assert not step(side).look
    side.on_new_request("a", {"kvbelt": "describe"}, 1)
    assert [step(side, ("a", [1], 0, 1)).look, step(side).look] == [True, False]
    seen = {rank: BeltLook(complaints=(f"of rank {rank}",)) for rank in (0, 1)}
    side.on_news(News(looks={0: BeltLook(), 1: seen[1]}), ())
    side.on_news(News(looks={0: seen[0]}), ())
    assert side.on_finished("a") == (False, {"engine_id": "X", "looks": seen})


def test_decode_servers_are_connected_to_beforehand(side: SchedulerSide) -> None:
    """Once, with the request's step; its answer says what has come of it by then."""
    three = [RECEIVER | {"engine_id": name} for name in "def"]
    side.on_new_request("a", {"kvbelt": "warm", "receivers": three}, 1)
    assert [receiver.engine_id for receiver in step(side, ("a", [1], 0, 1)).warms] == ["d", "e", "f"]
    assert step(side).warms == ()
    side.on_news(News(peers={EngineId("d"): "", EngineId("e"): "refused_model"}), ())
    held, answer = side.on_finished("a")
    assert not held
    assert answer is not None
    assert [(peer["state"], peer["reason"]) for peer in answer["peers"]] == [
        ("ready", ""),
        ("failed", "refused_model"),
        ("failed", "not_yet"),
    ]
    assert side.num_requests == 0


@pytest.mark.parametrize(
    "params", [{"transfer_id": 7}, {**TO_SEND, "receiver": 1}, {**TO_LOAD, "surplus": 1}, {"kvbelt": "warm"}]
)
def test_what_is_no_handoff_is_named(side: SchedulerSide, params: dict[str, Any]) -> None:
    """The request is served, and its answer says why there was no transfer."""
    side.on_new_request("a", params, 16)
    assert side.loadable_tokens("a", 0) == 0
    held, answer = side.on_finished("a")
    assert not held
    assert answer is not None
    assert answer["reason"] == "bad_handoff"


def test_other_requests_are_none_of_ours(side: SchedulerSide) -> None:
    """Without parameters nothing is known, done or said."""
    side.on_new_request("a", None, 16)
    side.on_allocated("a", [1], 0)
    assert step(side, ("a", [1], 0, 16)) == Orders()
    assert side.on_finished("a") == (False, None)


@dataclass
class Held:
    """KV that has come; what is scattered is not looked at here."""

    num_tokens: int
    first_block: int = 0
    num_blocks: int = 0
    whole: bool = True

    def scatter(self, block_ids: Sequence[int], first: int | None = None) -> None:
        """Not called."""

    def release(self) -> None:
        """Not called."""


@dataclass
class Hands:
    """A worker in this process, and what it has at hand."""

    held: dict[str, Held]
    claimed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    def claim(self, claim: Claim) -> None:
        """Noted."""
        self.claimed.append(claim.request_id)

    def at_hand(self, request_id: str, seconds: float) -> Held | None:
        """What the test has put there."""
        self.waited.append(seconds)
        return self.held.get(request_id)

    def drop(self, request_id: str) -> None:
        """Noted."""
        self.dropped.append(request_id)


def test_kv_at_hand_is_loaded_before_the_step(side: SchedulerSide) -> None:
    """It is claimed when the request comes; the step that loads it computes the request's last token."""
    side.worker = hands = Hands({"a": Held(49)})
    side.on_new_request("a", TO_LOAD, 50)
    assert hands.claimed == ["a"]
    assert (side.loadable_tokens("a", 0), side.loads_now("a")) == (49, True)
    side.on_allocated("a", [1, 2, 3, 4], 49)
    orders = step(side, ("a", [1, 2, 3, 4], 49, 1))
    assert orders.claims == ()
    assert [(load.block_ids, load.num_tokens, load.now) for load in orders.loads] == [((1, 2, 3, 4), 49, True)]
    assert side.on_finished("a") == (False, {"transfer_id": "t", "kv": "received", "reason": None})
    assert hands.dropped == []


def test_a_preempted_request_is_not_loaded_twice(side: SchedulerSide) -> None:
    """What was at hand was released when it was loaded: a request that comes back is computed."""
    side.worker = Hands({"a": Held(49)})
    side.on_new_request("a", TO_LOAD, 50)
    side.loadable_tokens("a", 0)
    side.on_allocated("a", [1, 2, 3, 4], 49)
    step(side, ("a", [1, 2, 3, 4], 49, 1))
    assert side.loadable_tokens("a", 0) == 0


@pytest.mark.parametrize(
    "held",
    [{}, {"a": Held(20)}, {"a": Held(49, first_block=2)}],
    ids=["not here yet", "of another prompt", "without blocks that were evicted"],
)
def test_what_cannot_be_loaded_at_once_is_loaded_beside(side: SchedulerSide, held: dict[str, Held]) -> None:
    """A step reads only what is surely there; a loader finds out about everything else, beside the running batch."""
    side.worker = Hands(held)
    side.on_new_request("a", TO_LOAD, 50)
    assert (side.loadable_tokens("a", 16), side.loads_now("a")) == (33, False)
    side.on_allocated("a", [1, 2, 3, 4], 33)
    assert [load.now for load in step(side).loads] == [False]


def test_one_prompt_a_step_is_loaded_at_once(side: SchedulerSide) -> None:
    """The running batch waits for one copy, not for those of everybody who comes at the same time."""
    side.worker = Hands({"a": Held(49), "b": Held(49)})
    for name in ("a", "b"):
        side.on_new_request(name, TO_LOAD | {"transfer_id": name}, 50)
        side.loadable_tokens(name, 0)
        side.on_allocated(name, [1, 2, 3, 4], 49)
    assert [(load.request_id, load.now) for load in step(side).loads] == [("a", True), ("b", False)]


def test_the_belt_is_waited_for_once_a_request(side: SchedulerSide) -> None:
    """A scheduler that asks again, for want of blocks, is answered at once."""
    side.worker = hands = Hands({})
    side.on_new_request("a", TO_LOAD, 50)
    for _ in range(3):
        side.loadable_tokens("a", 0)
    assert hands.waited[0] > 0.0
    assert hands.waited[1:] == [0.0, 0.0]


def test_a_request_aborted_before_its_first_step_is_dropped_at_once(side: SchedulerSide) -> None:
    """A server with nothing to do takes no step with which the worker could be told."""
    side.worker = hands = Hands({"a": Held(49)})
    side.on_new_request("a", TO_LOAD, 50)
    side.on_finished("a")
    assert hands.dropped == ["a"]
    assert step(side).drops == ()
