"""The plan of a request, searched: every outcome in every state that can be reached, until nothing new is found."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest

from kvbelt.proxy.request import plan as planned
from kvbelt.proxy.request.plan import TABLE, Plan, transfer_outcome
from kvbelt.proxy.request.steps import Do, Move, Outcome, Result, State, Step, UnplannedError
from kvbelt.wire.reasons import REASONS, Where

S, O = State, Outcome  # noqa: E741
WAITING = (O.DEADLINE, O.RECEIVER_FULL, O.CLIENT_GONE, O.FAULT)
OF_PREFILL = (O.PREFILL_FAILED, O.KV_FAILED, O.TOKEN_KV_FAILED)
OF_DECODE = (O.DECODE_FAILED, O.DECODE_5XX)
WITH_REASON = (*OF_PREFILL, *OF_DECODE, O.STALE, O.KV_HOPELESS, O.TOKEN_KV_HOPELESS, O.KV_LOST, O.UNFIT)
PLACED = (O.SPLIT, O.ONE_TOKEN, O.UNSPLIT)
FIRST_TOKENS = (O.FIRST_TOKEN, O.LAST_TOKEN, O.TOKEN_KV_FAILED, O.TOKEN_KV_HOPELESS)
ERRORS = {reason.name for reason in REASONS if reason.where & Where.ERROR}


@dataclass(frozen=True)
class World:
    """What the plan cannot see: the client, and the workers that were called."""

    stream: bool  # the client asked for a stream
    told: str = ""  # what the client has: "", "first", "all"
    token: bool = False  # a first token is in hand
    decode: str = ""  # the decode worker picked
    prefill: str = ""
    kv_at: str = ""  # the decode worker that may yet get the KV of the latest prefill call
    called: frozenset[str] = frozenset()  # workers that may not be called again: an attempt on them has begun
    failed: frozenset[str] = frozenset()  # workers that failed the request
    prefills: int = 0
    decodes: int = 0
    repeats: int = 0  # of the attempt under way
    after: tuple[str, ...] = ()
    pending: str = ""  # the failure for which another worker is looked for
    gone: bool = False  # the client has left, or the answer is left to the HTTP server

    def performs(self, step: Step, most: int) -> "World":
        """Check that a step may be taken now, and take it."""
        do = step.do
        if do is Do.PLACE:
            assert step.continues == (self.told == "first"), "a place for another call than the client needs"
        if do is Do.CALL_PREFILL:
            assert self.told == "", "prefill after the client was told something"
            return self._calls(step, self.prefill, most)
        if do is Do.CALL_DECODE:
            assert step.continues or not self.told, "the first token would be said twice"
            assert not step.continues or self.token, "there is nothing to continue"
            assert self.told == "first" or not step.continues or not self.stream, "the first token was not sent"
            assert not step.kv or self.kv_at == self.decode, "it waits for KV that does not come"
            return self._calls(step, self.decode, most)
        if do in (Do.SEND_FIRST_TOKEN, Do.FINISH, Do.REPLY_MERGED, Do.PASS_ON, Do.REPLY_ERROR):
            assert self.told == "", f"{do} after the client was told something"
        if do in (Do.SEND_FIRST_TOKEN, Do.FINISH, Do.REPLY_MERGED):
            assert self.token, f"{do} without a token"
        if do is Do.BREAK_STREAM:
            assert self.told == "first", "no stream to break"
        if step.reason:
            assert step.reason in ERRORS
            assert step.status == 429 or step.status >= 500
        if do is Do.RELAY_STREAM:
            return replace(self, told="first")
        return replace(self, told="all") if do in ENDS else self

    def _calls(self, step: Step, worker: str, most: int) -> "World":
        assert worker not in self.failed, "a worker that failed is called again"
        if step.again:
            assert worker in self.called
            assert self.repeats < 2, "one attempt is repeated too often"
            return replace(self, repeats=self.repeats + 1)
        assert worker not in self.called, "the same worker in a new attempt, without being picked again"
        assert not self.after or self.after[-1], "a retry without a reason"
        prefill = step.do is Do.CALL_PREFILL
        world = replace(
            self,
            called=self.called | {worker},
            repeats=0,
            prefills=self.prefills + prefill,
            decodes=self.decodes + (not prefill),
            kv_at=self.decode if prefill and step.kv else "" if prefill else self.kv_at,
        )
        assert max(world.prefills, world.decodes) <= most, "more attempts than allowed"
        return world

    def outcomes(self, step: Step, plan: Plan) -> Iterator[tuple[Outcome, str]]:  # noqa: C901, PLR0912 - by step
        """The possible outcomes of a step, with the workers of a place: the same ones again, or the next ones."""
        do = step.do
        if do not in ENDS:
            yield from ((outcome, "") for outcome in WAITING)
        else:
            yield O.FAULT, ""
        if do is Do.PLACE:
            yield from ((outcome, "") for outcome in (O.NO_WORKER, O.QUEUE_FULL, O.OVERLOADED))
            decodes = self._choices(self.decode, "d", plan.tried)
            yield from ((O.UNSPLIT, name) for name in decodes)
            if plan.may_prefill and not step.continues:
                prefills = self._choices(self.prefill, "p", plan.tried)
                yield from ((O.SPLIT, f"{prefill} {decode}") for prefill, decode in product(prefills, decodes))
                if plan.state is S.CHOOSING:
                    yield from ((O.ONE_TOKEN, name) for name in prefills)
        elif do is Do.CALL_PREFILL:
            sent = (*FIRST_TOKENS, O.UNFIT, O.KV_FAILED, O.KV_HOPELESS, O.REFUSED)
            yield from ((outcome, "") for outcome in (sent if step.kv else (O.STREAM, O.WHOLE, O.REFUSED)))
            yield O.PREFILL_FAILED, ""
        elif do is Do.CALL_DECODE:
            if self.stream or not step.continues:
                yield O.STREAM, ""
            if not self.stream or not step.continues:
                yield O.WHOLE, ""
            if step.kv:
                yield O.KV_LOST, ""
            yield from ((outcome, "") for outcome in (O.REFUSED, *OF_DECODE))
        elif do is Do.SEND_FIRST_TOKEN:
            yield (O.SENT if self.stream else O.KEPT), ""
        else:
            yield O.DONE, ""
        if do is Do.RELAY_STREAM:
            yield O.STREAM_LOST, ""
        if do in (Do.RELAY_STREAM, Do.REPLY_MERGED):
            yield O.BAD_ANSWER, ""
        if do in (Do.CALL_PREFILL, Do.CALL_DECODE) and plan.may_repeat:
            yield O.STALE, ""

    @staticmethod
    def _choices(held: str, kind: str, tried: frozenset[str]) -> list[str]:
        following = next(name for number in range(9) if (name := f"{kind}{number}") not in tried | {held})
        return [held, following] if held and held not in tried else [following]

    def meets(self, step: Step, outcome: Outcome, worker: str) -> "World":
        """What an outcome changes."""
        world = self
        if outcome in PLACED:
            # What a prefill call failed of is the reason why no one else is called.
            told = world.pending and not (outcome is O.UNSPLIT and world.pending in map(reason_of, OF_PREFILL))
            world = replace(world, after=(*world.after, world.pending) if told else world.after, pending="")
            for one in worker.split():
                name = "decode" if one.startswith("d") else "prefill"
                world = replace(world, called=world.called - {one}, **{name: one})
        if outcome in OF_PREFILL or outcome in OF_DECODE:
            worker = world.prefill if outcome in OF_PREFILL else world.decode
            world = replace(world, failed=world.failed | {worker}, pending=reason_of(outcome), kv_at="")
        if outcome in (O.KV_HOPELESS, O.TOKEN_KV_HOPELESS, O.KV_LOST) or outcome in PLACED:
            world = replace(world, kv_at="")
        if outcome in FIRST_TOKENS:
            world = replace(world, token=True)
        if outcome is O.SENT:
            world = replace(world, told="first")
        if outcome is O.BAD_ANSWER and step.do is Do.REPLY_MERGED:
            world = replace(world, told="")  # it was found before anything was said
        if outcome is O.CLIENT_GONE or (outcome is O.FAULT and step.do in ENDS):
            world = replace(world, gone=True)
        return world


ENDS = (Do.FINISH, Do.REPLY_MERGED, Do.PASS_ON, Do.REPLY_ERROR, Do.BREAK_STREAM)


def reason_of(outcome: Outcome) -> str:
    """A word for each outcome that has one."""
    return outcome.name.lower()


def reported(outcome: Outcome, world: World) -> Outcome | Result:
    """The outcome as the handler reports it."""
    if outcome is O.UNSPLIT and not world.told:
        return Result(outcome, "no_prefill_worker")
    if outcome not in WITH_REASON:
        return outcome
    worker = world.prefill if outcome in OF_PREFILL else world.decode
    return Result(outcome, reason_of(outcome), f"{worker}: {outcome}", worker)


def search(most: int) -> set[tuple[State, Outcome]]:
    """Walk through everything that can happen. Returns the rows that were used."""
    used: set[tuple[State, Outcome]] = set()
    done: set[object] = set()
    under_way: set[object] = set()

    def key(plan: Plan, world: World, step: Step) -> object:
        words = (plan._cause is None, plan.path in ("local", "re-derive"), plan._failed is None, plan._quotable)
        at_hand = world.called & {world.decode, world.prefill}
        facts = plan.state, plan.may_repeat, plan.tried, words
        return facts, replace(world, after=(), called=at_hand, pending=""), step

    def walk(plan: Plan, world: World, step: Step) -> None:
        world = world.performs(step, most)
        if step.do is Do.STOP:
            assert world.told == "all" or world.gone, "the request ends without an answer"
            return
        here = key(plan, world, step)
        assert here not in under_way, "a walk that does not end"
        if here in done:
            return
        under_way.add(here)
        for outcome, worker in world.outcomes(step, plan):
            after, following = copy.copy(plan), world.meets(step, outcome, worker)
            if step.do is Do.RELAY_STREAM and outcome is O.DONE:
                following = replace(following, told="all")
            used.add((plan.state, outcome))
            next_step = after.handle(reported(outcome, world))
            assert following.after == after.after, "after= says something else than what was tried again"
            if next_step.do in (Do.RELAY_STREAM, Do.REPLY_MERGED, Do.FINISH):
                assert after.path, "the path is not told"
            assert (after.path in ("local", "re-derive")) == (after.reason is not None), "the path needs a reason"
            walk(after, following, next_step)
        under_way.discard(here)
        done.add(here)

    for stream in (False, True):
        plan = Plan(most)
        walk(plan, World(stream), plan.begin())
    return used


@pytest.mark.parametrize("most", [1, 2])
def test_every_walk_ends_in_one_answer(most: int) -> None:
    """No walk exceeds the attempts, asks a worker twice, sends anything twice, or waits for KV that does not come."""
    search(most)


def test_every_row_of_the_table_can_happen() -> None:
    """The only exceptions are the rows that the plan enters by itself."""
    rows = {(state, outcome) for state in S for outcome in TABLE[state]}
    ending = {(S.ENDING, outcome) for outcome in (O.DEADLINE, O.RECEIVER_FULL, O.CLIENT_GONE)}
    assert rows - search(2) == OWN | ending


OWN = {(state, outcome) for state in S for outcome in (O.ATTEMPTS_USED, O.LAST_WORDS) if outcome in TABLE[state]}


@pytest.mark.parametrize(("state", "outcome"), sorted(OWN))
def test_every_row_that_the_plan_enters_is_needed(
    state: State, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without such a row there is no next step when attempts or workers run out."""
    monkeypatch.delitem(TABLE[state], outcome)
    with pytest.raises(UnplannedError, match=outcome.name):
        search(2)


def test_an_outcome_is_planned_or_refused() -> None:
    """There is one answer to each outcome in each state: a step, or an error that names both."""
    for state, outcome in product(S, O):
        plan = Plan(2)
        plan.state = state
        if outcome in TABLE[state]:
            assert isinstance(plan.handle(outcome), Step)
        else:
            with pytest.raises(UnplannedError, match=outcome.name):
                plan.handle(outcome)


def test_the_remedy_of_a_transfer_decides_which_worker_is_asked_next() -> None:
    """A fault of the decode worker remains with another prefill worker."""
    assert transfer_outcome("write_failed", token=False) is O.KV_FAILED
    assert transfer_outcome("write_failed", token=True) is O.TOKEN_KV_FAILED
    assert transfer_outcome("too_large", token=False) is O.KV_HOPELESS
    assert transfer_outcome("too_large", token=True) is O.TOKEN_KV_HOPELESS
    assert transfer_outcome("a word of a newer worker", token=True) is O.TOKEN_KV_FAILED


MUTATIONS = {
    "a new choice behind the first token": (
        S.CONTINUING, O.DECODE_FAILED, TABLE[S.MERGING][O.DECODE_FAILED], "another call than|after the client",
    ),
    "the client's own request behind the first token": (
        S.CONTINUING, O.KV_LOST, TABLE[S.REDERIVING][O.KV_LOST], "said twice",
    ),
    "a wait for KV that is lost": (
        S.REDERIVING, O.KV_LOST, TABLE[S.REDERIVING][O.STALE], "KV that does not come",
    ),
    "a transfer that failed taken for one that did not": (
        S.PREFILL, O.KV_HOPELESS, TABLE[S.PREFILL][O.UNFIT], "KV that does not come",
    ),
    "KV of the earlier decode worker": (
        S.MERGING, O.DECODE_5XX, Move(S.MERGING, planned.CONTINUE_KV), "KV that does not come",
    ),
    "a failed prefill worker again": (
        S.PREFILL, O.PREFILL_FAILED, TABLE[S.CHOOSING][O.SPLIT], "a worker that failed is called again",
    ),
    "a repetition that counts as a new attempt": (
        S.PREFILL, O.STALE, TABLE[S.CHOOSING][O.SPLIT], "without being picked again",
    ),
    "a status behind the head": (S.RELAYING, O.DEADLINE, TABLE[S.LOCAL][O.DEADLINE], "after the client was told"),
    "an event before the head": (S.LOCAL, O.DEADLINE, TABLE[S.RELAYING][O.DEADLINE], "no stream to break"),
    "the last worker's words behind the head": (
        S.CONTINUING_WITHOUT_KV, O.LAST_WORDS, TABLE[S.CHOOSING][O.LAST_WORDS], "after the client was told",
    ),
    "an end without an answer": (S.PREFILL, O.REFUSED, Move(S.OVER, planned.STOP), "ends without an answer"),
    "a path that is not told": (S.CHOOSING, O.UNSPLIT, Move(S.LOCAL, planned.DECODE), "path is not told"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_the_search_finds_a_wrong_row(
    mutation: tuple[State, Outcome, Move, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test changes one row of the table at a time."""
    state, outcome, move, found = mutation
    monkeypatch.setitem(TABLE[state], outcome, move)
    with pytest.raises(AssertionError, match=found):
        search(2)


@pytest.mark.parametrize("attribute", ["_OF_PREFILL", "_OF_DECODE"])
def test_the_search_finds_failures_that_are_not_remembered(attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that failed would be picked again."""
    monkeypatch.setattr(planned, attribute, frozenset())
    with pytest.raises(AssertionError):
        search(2)


def test_the_search_finds_attempts_that_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that breaks its workers would break them all."""
    monkeypatch.setattr(Plan, "may_prefill", property(lambda _: True))
    with pytest.raises(AssertionError, match="more attempts than allowed"):
        search(2)
