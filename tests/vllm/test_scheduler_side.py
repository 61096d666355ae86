"""The scheduler's side: values in, values out."""

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest

from kvbelt.about import of_this_process
from kvbelt.belt_facts import BeltView
from kvbelt.vllm.handoff import BadHandoff
from kvbelt.vllm.identity import RankIdentity, ServerFacts, describe
from kvbelt.vllm.requests import LOADING, SENDING, Effect, Loadable, LoadEvent, LoadState, SendEvent, SendState
from kvbelt.vllm.scheduler_side import ARRIVAL_WAIT_SECONDS, SchedulerSide
from kvbelt.vllm.step_messages import Arrived, ScheduledPrompt, StepCommands, StepReport
from kvbelt.wire.handoff import DecodeOutcome, HandoffState
from kvbelt.wire.health import Role, ServerDescription
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.peers import PeerStates
from tests.vllm.belts import BLOCK, RECEIVER, TO_LOAD, TO_SEND, Clock, pacing


@pytest.fixture
def clock() -> Clock:
    """A new clock for each test."""
    return Clock()


@pytest.fixture
def side(clock: Clock) -> SchedulerSide:
    """The scheduler's side of a server whose workers have started."""
    side = SchedulerSide(BLOCK, partial(describe, ServerFacts(Role.BOTH, "m", 2048)), pacing(), clock)
    side.on_workers_ready(RankIdentity(EngineId("X"), None, 0, of_this_process("both", "vllm")))
    return side


def step(
    side: SchedulerSide, *prompts: tuple[str, list[int], int, int], preempted: tuple[str, ...] = ()
) -> StepCommands:
    """One scheduled step."""
    return side.take_step([ScheduledPrompt(*prompt) for prompt in prompts], preempted)


def test_a_prompt_in_one_step_is_sent_whole(side: SchedulerSide) -> None:
    """Every block is sent with the step that computes the prompt, including the half-filled last one."""
    side.on_new_request("a", TO_SEND, 40)
    commands = step(side, ("a", [5, 6, 7], 0, 40))
    assert [(send.request_id, send.num_tokens) for send in commands.sends] == [("a", 40)]
    (written,) = commands.written
    assert (written.first, written.block_ids, written.last) == (0, (5, 6, 7), True)


def test_chunks_send_what_they_complete(side: SchedulerSide) -> None:
    """A block is sent with the chunk that fills it, and the last one with the end of the prompt."""
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
    """Blocks from the prefix cache are sent like computed ones."""
    side.on_new_request("a", TO_SEND, 33)
    (written,) = step(side, ("a", [1, 2, 9], 32, 1)).written
    assert written.block_ids == (1, 2, 9)


def test_later_tokens_are_not_sent(side: SchedulerSide) -> None:
    """A request that goes on decoding here sends nothing more."""
    side.on_new_request("a", TO_SEND, 16)
    step(side, ("a", [1], 0, 16))
    assert step(side, ("a", [2], 16, 1)).written == ()


def test_remaining_time_travels(side: SchedulerSide, clock: Clock) -> None:
    """The time that a request has waited here is taken off its deadline."""
    side.on_new_request("a", TO_SEND, 16)
    clock.now += 10.0
    (send,) = step(side, ("a", [1], 0, 16)).sends
    assert send.handoff.deadline_seconds == pytest.approx(20.0)


def test_blocks_are_held_once_the_worker_sends(side: SchedulerSide) -> None:
    """A scheduled request keeps its blocks until the worker has read them; an unscheduled one does not."""
    side.on_new_request("a", TO_SEND, 16)
    side.on_new_request("b", {**TO_SEND, "transfer_id": "u"}, 16)
    step(side, ("a", [1], 0, 16))
    assert side.on_finished("a") == (True, HandoffState(TransferId("t"), "open"))
    assert side.on_finished("b")[0] is False
    assert side.num_requests == 0


def test_a_preempted_prompt_is_given_up(side: SchedulerSide) -> None:
    """The worker is told to stop, nothing more is sent, and no block is held at the end."""
    side.on_new_request("a", TO_SEND, 40)
    step(side, ("a", [1], 0, 20))
    assert step(side, preempted=("a", "other")).preempted == ("a",)
    assert step(side, ("a", [3, 4, 5], 0, 40)).written == ()
    held, params = side.on_finished("a")
    assert not held
    assert params == HandoffState(TransferId("t"), "failed", "preempted")


def test_everything_but_the_last_token_is_loaded(side: SchedulerSide) -> None:
    """The prompt's blocks are filled except for its last token; cached blocks are left alone."""
    side.on_new_request("a", TO_LOAD, 50)
    assert side.loadable("a", 16).tokens == 33
    side.on_allocated("a", [1, 2, 3, 4], 33)
    commands = step(side)
    assert [claim.request_id for claim in commands.claims] == ["a"]
    (load,) = commands.loads
    assert (load.first, load.block_ids, load.num_tokens) == (1, (2, 3, 4), 49)


def test_a_block_for_the_last_token_alone_is_not_filled(side: SchedulerSide) -> None:
    """The prefill worker's prompt may end at a block's end."""
    side.on_new_request("a", TO_LOAD, 33)
    assert side.loadable("a", 0).tokens == 32
    side.on_allocated("a", [1, 2, 3], 32)
    assert step(side).loads[0].block_ids == (1, 2)


def test_asking_changes_nothing(side: SchedulerSide) -> None:
    """The scheduler may ask repeatedly before it has blocks."""
    side.on_new_request("a", TO_LOAD, 33)
    assert [side.loadable("a", 0).tokens, side.loadable("a", 16).tokens, side.loadable("a", 0).tokens] == [32, 16, 32]


def test_a_prompt_that_is_cached_drops_its_transfer(side: SchedulerSide) -> None:
    """KV that is not needed is released."""
    side.on_new_request("a", TO_LOAD, 33)
    step(side)
    assert side.loadable("a", 32).tokens == 0
    side.on_allocated("a", [1, 2, 3], 0)
    assert step(side).drops == ("a",)
    assert side.on_finished("a") == (False, DecodeOutcome(TransferId("t"), "received", "cached"))


def test_it_is_loaded_once(side: SchedulerSide) -> None:
    """After a failed load the request is computed."""
    side.on_new_request("a", TO_LOAD, 33)
    side.on_allocated("a", [1, 2, 3], 32)
    step(side)
    assert side.loadable("a", 0).tokens == 0
    side.on_report(StepReport(received={"a": "deadline"}), ["a"])
    assert side.loadable("a", 0).tokens == 0
    side.on_allocated("a", [1, 2, 3], 0)
    assert step(side).drops == ()
    assert side.on_finished("a") == (False, DecodeOutcome(TransferId("t"), "recomputed", "deadline"))


@pytest.mark.parametrize(("reason", "kv"), [("", "received"), ("deadline", "recomputed")])
def test_the_end_of_a_load_is_told_once(side: SchedulerSide, reason: str, kv: str) -> None:
    """With the next step: a stream has no other place for it."""
    side.on_new_request("a", TO_LOAD, 33)
    side.on_allocated("a", [1, 2, 3], 32)
    assert step(side).outcomes == ()
    side.on_report(StepReport(received={"a": reason}), ["a"])
    assert step(side).outcomes == (DecodeOutcome(TransferId("t"), kv, reason or None),)
    assert step(side).outcomes == ()


def test_kv_that_is_not_needed_or_too_late_is_told_with_the_step(side: SchedulerSide, clock: Clock) -> None:
    """The step that computes the request."""
    for seconds, outcome in ((0.0, ("received", "cached")), (31.0, ("recomputed", "deadline"))):
        side.on_new_request("a", TO_LOAD, 33)
        clock.now += seconds
        side.on_allocated("a", [1, 2, 3], 0)
        assert step(side).outcomes == (DecodeOutcome(TransferId("t"), *outcome),)
        side.on_finished("a")


def test_kv_at_hand_is_told_and_corrected(side: SchedulerSide) -> None:
    """It counts as received with the step that copies it, unless that step reports that the copy failed."""
    side.on_new_request("a", TO_LOAD, 33)
    step(side)
    assert side.loadable("a", 0, Arrived(33, 0)).now
    side.on_allocated("a", [1, 2, 3], 32)
    assert step(side).outcomes == (DecodeOutcome(TransferId("t"), "received"),)
    side.on_report(StepReport(received={"a": "prefix_evicted"}), [])
    assert step(side).outcomes == (DecodeOutcome(TransferId("t"), "recomputed", "prefix_evicted"),)


def test_ranks_report_one_by_one(side: SchedulerSide) -> None:
    """One rank's loss is the request's loss, whatever the order of the reports."""
    side.on_new_request("a", TO_LOAD, 33)
    side.on_allocated("a", [1, 2, 3], 32)
    step(side)
    side.on_report(StepReport(received={"a": "deadline"}), [])
    side.on_report(StepReport(received={"a": ""}), ["a"])
    assert side.on_finished("a") == (False, DecodeOutcome(TransferId("t"), "recomputed", "deadline"))


def test_a_request_that_waited_too_long_computes(side: SchedulerSide, clock: Clock) -> None:
    """A request whose deadline has passed drops its transfer and is computed."""
    side.on_new_request("a", TO_LOAD, 33)
    step(side)
    clock.now += 31.0
    assert side.loadable("a", 0).tokens == 0
    side.on_allocated("a", [1, 2, 3], 0)
    assert step(side).drops == ("a",)


def test_an_aborted_load_is_dropped(side: SchedulerSide) -> None:
    """The worker is told to end the load of an aborted request, because vLLM waits for it."""
    side.on_new_request("a", TO_LOAD, 33)
    side.on_allocated("a", [1, 2, 3], 32)
    step(side)
    held, _ = side.on_finished("a")
    assert not held
    assert step(side).drops == ("a",)
    assert side.num_requests == 0


def test_choices_of_one_request_share_a_transfer(side: SchedulerSide) -> None:
    """One choice loads; the others wait, and then use the cache or compute."""
    side.on_new_request("0_cmpl-x-0-abcdef01", TO_LOAD, 33)
    side.on_new_request("1_cmpl-x-0-abcdef01", TO_LOAD, 33)
    side.on_allocated("0_cmpl-x-0-abcdef01", [1, 2, 3], 32)
    assert [claim.request_id for claim in step(side).claims] == ["0_cmpl-x-0-abcdef01"]
    assert side.loadable("1_cmpl-x-0-abcdef01", 0).tokens is None
    side.on_report(StepReport(), ["0_cmpl-x-0-abcdef01"])
    assert side.loadable("1_cmpl-x-0-abcdef01", 32).tokens == 0


def test_each_prompt_of_a_request_has_its_transfer(side: SchedulerSide) -> None:
    """The index in vLLM's request id selects the transfer."""
    side.on_new_request("cmpl-x-0-abcdef01", TO_SEND, 16)
    side.on_new_request("cmpl-x-1-abcdef01", TO_SEND, 16)
    commands = step(side, ("cmpl-x-0-abcdef01", [1], 0, 16), ("cmpl-x-1-abcdef01", [2], 0, 16))
    assert [send.handoff.transfer_id for send in commands.sends] == ["t", "t.1"]


def described(side: SchedulerSide, request_id: str) -> ServerDescription:
    """The answer to a request that asks for the server's description."""
    held, answer = side.on_finished(request_id)
    assert not held
    assert isinstance(answer, ServerDescription)
    return answer


def test_the_description_names_the_server(side: SchedulerSide) -> None:
    """A request that asks for the description gets it in its answer."""
    side.on_new_request("a", {"kvbelt": "describe"}, 1)
    answer = described(side, "a")
    assert (answer.engine_id, answer.role, answer.model, answer.max_model_len) == ("X", Role.BOTH, "m", 2048)
    assert side.num_requests == 0


def test_a_server_that_is_starting_has_no_engine_id(clock: Clock) -> None:
    """Until its belts run a server says what its configuration says."""
    side = SchedulerSide(BLOCK, partial(describe, ServerFacts(Role.DECODE, "m", 2048)), pacing(), clock)
    side.on_new_request("a", {"kvbelt": "describe"}, 1)
    answer = described(side, "a")
    assert (answer.engine_id, answer.receiver, answer.about, answer.role) == (None, None, None, Role.DECODE)


def test_the_description_says_what_steps_cost(side: SchedulerSide) -> None:
    """Placement can begin with it."""
    side.on_new_request("b", None, 16)
    side.on_new_request("a", {"kvbelt": "describe"}, 1)
    steps = described(side, "a").steps
    assert steps is not None
    assert (steps.prompt_tokens, steps.most_prompt_tokens, steps.most_requests) == (16, 512, 64)
    assert steps.most_kv_tokens == 100 * BLOCK


def test_the_level_between_tokens_is_the_last_that_was_named(side: SchedulerSide) -> None:
    """A question that names none, as the doctor's, changes nothing; 0 is no level."""
    for params, level in (({"itl_seconds": 0.05}, 0.05), ({}, 0.05), ({"itl_seconds": 0.0}, 0.0)):
        side.on_new_request("a", {"kvbelt": "describe", **params}, 1)
        described(side, "a")
        assert side.pacing.level == level


@pytest.mark.parametrize("level", [-0.01, "0.05", [0.05]])
def test_a_level_that_is_none_is_refused(side: SchedulerSide, level: object) -> None:
    """The answer names it, and the level stays."""
    side.on_new_request("a", {"kvbelt": "describe", "itl_seconds": level}, 1)
    _, answer = side.on_finished("a")
    assert isinstance(answer, BadHandoff)
    assert "itl_seconds" in answer.detail
    assert side.pacing.level == 0.0


def test_a_step_tells_the_proxy_of_work(side: SchedulerSide) -> None:
    """It is told by a worker, with the step's commands."""
    side.on_new_request("a", None, 16)
    told = step(side).steps
    assert told is not None
    assert told.prompt_tokens == 16
    side.on_finished("a")
    told = step(side).steps
    assert told is not None
    assert told.prompt_tokens == 0


def test_the_description_has_the_last_view_of_each_rank(side: SchedulerSide) -> None:
    """Ranks read their belts with the question's first step; what they report before its end is in the answer."""
    assert not step(side).view
    side.on_new_request("a", {"kvbelt": "describe"}, 1)
    assert [step(side, ("a", [1], 0, 1)).view, step(side).view] == [True, False]
    views = {rank: BeltView(complaints=(f"of rank {rank}",)) for rank in (0, 1)}
    side.on_report(StepReport(views={0: BeltView(), 1: views[1]}), ())
    side.on_report(StepReport(views={0: views[0]}), ())
    about = described(side, "a").about
    assert about is not None
    assert about.complaints == ["of rank 0", "of rank 1"]


def test_decode_servers_are_connected_to_beforehand(side: SchedulerSide) -> None:
    """The command goes with the request's step, once; the answer reports each connection."""
    three = [RECEIVER | {"engine_id": name} for name in "def"]
    side.on_new_request("a", {"kvbelt": "warm", "receivers": three}, 1)
    assert [receiver.engine_id for receiver in step(side, ("a", [1], 0, 1)).warms] == ["d", "e", "f"]
    assert step(side).warms == ()
    side.on_report(StepReport(peers={EngineId("d"): "", EngineId("e"): "refused_model"}), ())
    held, answer = side.on_finished("a")
    assert not held
    assert isinstance(answer, PeerStates)
    assert [(peer.state, peer.reason) for peer in answer.peers] == [
        ("ready", ""),
        ("failed", "refused_model"),
        ("failed", "not_yet"),
    ]
    assert side.num_requests == 0


@pytest.mark.parametrize(
    "params",
    [{"transfer_id": 7}, {**TO_SEND, "receiver": 1}, {"deadline_seconds": 1.0}, {"kvbelt": "warm"}, {"kvbelt": "?"}],
)
def test_what_is_no_handoff_is_named(side: SchedulerSide, params: dict[str, Any]) -> None:
    """The request is served, and its answer says what is wrong with its parameters."""
    side.on_new_request("a", params, 16)
    assert side.loadable("a", 0).tokens == 0
    held, answer = side.on_finished("a")
    assert not held
    assert isinstance(answer, BadHandoff)
    assert answer.detail


def test_a_request_without_parameters_is_left_alone(side: SchedulerSide) -> None:
    """Nothing is recorded, commanded or answered."""
    side.on_new_request("a", None, 16)
    side.on_allocated("a", [1], 0)
    assert replace(step(side, ("a", [1], 0, 16)), steps=None) == StepCommands()
    assert side.on_finished("a") == (False, None)


class Local:
    """The only worker, in the scheduler's process, driven as the connector does it."""

    def __init__(self, side: SchedulerSide, arrived: dict[str, Arrived]) -> None:
        self.side = side
        self.arrived = arrived
        self.claimed: list[str] = []
        self.dropped: list[str] = []
        self.waits: list[float | None] = []

    def comes(self, request_id: str, transfer_id: str = "t") -> None:
        """A request with a prompt of 50 tokens."""
        self.side.on_new_request(request_id, TO_LOAD | {"transfer_id": transfer_id}, 50)
        self.tell()

    def tell(self) -> None:
        commands = self.side.take_claims()
        self.claimed += [claim.request_id for claim in commands.claims]
        self.dropped += commands.drops

    def loadable(self, request_id: str, num_computed_tokens: int = 0) -> Loadable:
        self.waits.append(self.side.arrival_wait(request_id, num_computed_tokens))
        arrived = self.arrived.get(request_id) if self.waits[-1] is not None else None
        return self.side.loadable(request_id, num_computed_tokens, arrived)


def test_kv_that_has_arrived_is_loaded_before_the_step(side: SchedulerSide) -> None:
    """It is claimed when the request comes; the step that loads it computes the request's last token."""
    local = Local(side, {"a": Arrived(49, 0)})
    local.comes("a")
    assert local.claimed == ["a"]
    assert local.loadable("a") == Loadable(49, now=True)
    side.on_allocated("a", [1, 2, 3, 4], 49)
    commands = step(side, ("a", [1, 2, 3, 4], 49, 1))
    assert commands.claims == ()
    assert [(load.block_ids, load.num_tokens, load.now) for load in commands.loads] == [((1, 2, 3, 4), 49, True)]
    assert side.on_finished("a") == (False, DecodeOutcome(TransferId("t"), "received"))
    local.tell()
    assert local.dropped == []


def test_a_preempted_request_is_not_loaded_twice(side: SchedulerSide) -> None:
    """KV is released when it has been loaded, so a request that comes back is computed."""
    local = Local(side, {"a": Arrived(49, 0)})
    local.comes("a")
    local.loadable("a")
    side.on_allocated("a", [1, 2, 3, 4], 49)
    step(side, ("a", [1, 2, 3, 4], 49, 1))
    assert local.loadable("a") == Loadable(0)


@pytest.mark.parametrize(
    "arrived",
    [{}, {"a": Arrived(20, 0)}, {"a": Arrived(49, 2)}],
    ids=["not here yet", "of another prompt", "without blocks that were evicted"],
)
def test_kv_that_may_fail_is_loaded_beside_the_batch(side: SchedulerSide, arrived: dict[str, Arrived]) -> None:
    """Only KV that is sure to be there is loaded before the step; a loader finds out about the rest."""
    local = Local(side, arrived)
    local.comes("a")
    assert local.loadable("a", 16) == Loadable(33)
    side.on_allocated("a", [1, 2, 3, 4], 33)
    assert [load.now for load in step(side).loads] == [False]


def test_one_prompt_a_step_is_loaded_before_it(side: SchedulerSide) -> None:
    """The running batch waits for one copy, not for those of all requests that come at the same time."""
    local = Local(side, {"a": Arrived(49, 0), "b": Arrived(49, 0)})
    for name in ("a", "b"):
        local.comes(name, transfer_id=name)
        local.loadable(name)
        side.on_allocated(name, [1, 2, 3, 4], 49)
    assert [(load.request_id, load.now) for load in step(side).loads] == [("a", True), ("b", False)]


def test_the_belt_is_waited_for_once_a_request(side: SchedulerSide) -> None:
    """A scheduler that asks again, because blocks were lacking, waits no second time."""
    local = Local(side, {})
    local.comes("a")
    for _ in range(3):
        local.loadable("a")
    assert local.waits == [ARRIVAL_WAIT_SECONDS, 0.0, 0.0]


def test_the_belt_is_not_waited_for_in_vain(side: SchedulerSide, clock: Clock) -> None:
    """Where everything is cached, or the deadline has passed, an arrival makes no difference."""
    local = Local(side, {"a": Arrived(49, 0)})
    local.comes("a")
    assert local.loadable("a", 49) == Loadable(0)
    clock.now += 31.0
    assert local.loadable("a") == Loadable(0)
    assert local.waits == [None, None]


def test_a_request_aborted_before_its_first_step_is_dropped_at_once(side: SchedulerSide) -> None:
    """A server without work takes no step with which the worker could be told."""
    local = Local(side, {"a": Arrived(49, 0)})
    local.comes("a")
    side.on_finished("a")
    local.tell()
    assert local.dropped == ["a"]
    assert step(side).drops == ()


def test_a_request_aborted_before_its_claim_was_told_is_not_claimed(side: SchedulerSide) -> None:
    """A worker that never heard of a request need not drop it."""
    side.on_new_request("a", TO_LOAD, 50)
    side.on_finished("a")
    assert step(side) == StepCommands()


@pytest.mark.parametrize(
    ("table", "states", "events", "first"),
    [
        (SENDING, SendState, SendEvent, {SendState.WAITING}),
        (LOADING, LoadState, LoadEvent, {LoadState.AWAITED, LoadState.FOLLOWING}),
    ],
)
def test_the_tables_answer_every_event_in_every_state(table: Any, states: Any, events: Any, first: set[Any]) -> None:
    """Only a finished request has no next state; every other state can be reached, and can end."""
    assert set(table) == set(product(set(states) - {states.FINISHED}, events))
    reached = set(first)
    for _ in states:
        reached |= {after for (before, _), (after, _) in table.items() if before in reached}
    assert reached == set(states)
    assert all((after is states.FINISHED) == (event is events.FINISHED) for (_, event), (after, _) in table.items())


def test_blocks_are_stopped_and_held_only_while_they_are_read() -> None:
    """The worker reads a prompt's blocks in SENDING alone, so only there they are stopped or held."""
    effects = {cell: effect for cell, (_, effect) in SENDING.items() if effect is not Effect.NOTHING}
    assert effects == {
        (SendState.WAITING, SendEvent.SCHEDULED): Effect.SEND,
        (SendState.SENDING, SendEvent.PREEMPTED): Effect.STOP,
        (SendState.SENDING, SendEvent.FINISHED): Effect.HOLD,
    }


def test_kv_is_dropped_once() -> None:
    """The belt is told to give KV up only while something is expected of it, and never twice."""
    drops = [(before, after) for (before, _), (after, effect) in LOADING.items() if effect is Effect.DROP]
    assert drops == [
        (LoadState.AWAITED, LoadState.OVER),
        (LoadState.AWAITED, LoadState.FINISHED),
        (LoadState.LOADING, LoadState.FINISHED),
    ]
