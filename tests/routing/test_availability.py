"""Which workers a request may get at all, and what is known of answers in one piece."""

from dataclasses import replace

import pytest

from kvbelt.pacing.costs import DEFAULT_COSTS
from kvbelt.routing.booking import Action, Demand, WorkerBook
from kvbelt.routing.choice import CANDIDATES
from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.placement import Mode, Placement
from kvbelt.wire.health import Role
from kvbelt.wire.steps import StepsNow

LEVELS = ServiceLevels()


def fleet(mode, prefill=1, decode=1):
    placement = Placement(mode)
    books = [WorkerBook(f"p{i}", Role.PREFILL) for i in range(prefill)]
    books += [WorkerBook(f"d{i}", Role.DECODE) for i in range(decode)]
    for book in books:
        placement.join(book)
    return placement, *books


def demand(now=0.0, **fields):
    return Demand(**({"tokens": 1000, "output": 100, "arrived": now, "levels": LEVELS} | fields))


def place(placement, wanted, now=0.0):
    """Its booking; None: no worker may answer it."""
    placement.submit(wanted)
    ((placed, booking),) = placement.dispatch(now)
    assert placed is wanted
    return booking


def whole_at(booking):
    return booking.decode.incarnation if booking.action is Action.WHOLE else None


@pytest.mark.parametrize("mode", Mode)
def test_a_prefill_worker_answers_alone_unless_everything_is_split(mode):
    placement, _ = fleet(mode, decode=0)
    booking = place(placement, demand())
    assert booking is None if mode is Mode.SPLIT else whole_at(booking) == "p0"


@pytest.mark.parametrize("mode", Mode)
def test_a_decode_worker_answers_alone(mode):
    placement, _ = fleet(mode, prefill=0)
    assert whole_at(place(placement, demand())) == "d0"


def test_with_placement_split_a_request_that_cannot_be_split_goes_to_the_role_it_is_for():
    placement, *_ = fleet(Mode.SPLIT)
    assert whole_at(place(placement, demand(splittable=False))) == "d0"
    assert whole_at(place(placement, demand(splittable=False, whole_on=Role.PREFILL))) == "p0"
    tried = demand(splittable=False, whole_on=Role.PREFILL, exclude=frozenset({"p0"}))
    assert whole_at(place(placement, tried)) == "d0"


def test_with_placement_split_workers_take_turns():
    placement, *_ = fleet(Mode.SPLIT, prefill=3, decode=2)
    names = []
    for number in range(6):
        booking = place(placement, demand(), number)
        placement.first_token(booking, number + 0.1)
        placement.end(booking, number + 0.2)
        names.append((booking.prefill.incarnation, booking.decode.incarnation))
    assert names == [("p0", "d0"), ("p1", "d1"), ("p2", "d0"), ("p0", "d1"), ("p1", "d0"), ("p2", "d1")]


def test_a_second_try_takes_no_turn():
    placement, *_ = fleet(Mode.SPLIT, prefill=0, decode=2)
    for number in range(4):
        failed = place(placement, demand(), number)
        placement.end(failed, number)
        again = place(placement, demand(exclude=frozenset({failed.decode.incarnation})), number)
        placement.end(again, number)
        assert failed.decode.incarnation == f"d{number % 2}"


@pytest.mark.parametrize("mode", Mode)
def test_a_worker_that_is_not_settled_is_the_last_resort(mode):
    placement, late, settled = fleet(mode, prefill=0, decode=2)
    late.settled = False
    placement.join(late)
    assert whole_at(place(placement, demand())) == settled.incarnation
    assert whole_at(place(placement, demand(exclude=frozenset({settled.incarnation})))) == late.incarnation


def test_a_request_that_fits_no_worker_is_left_to_one_that_has_nothing_else():
    placement, book = fleet(Mode.ELASTIC, prefill=0)
    book.kv_capacity = 500
    assert place(placement, demand()) is not None
    placement.submit(demand())
    assert placement.dispatch(1.0) == []


def test_the_first_token_of_a_silent_answer_is_assumed_when_it_is_expected():
    """Else its worker would seem to compute its prompt until its answer ends."""
    placement, book = fleet(Mode.ELASTIC, prefill=0)
    booking = place(placement, demand(tokens=8000, silent=True))
    placement.submit(demand(now=0.001, tokens=8000))
    assert placement.dispatch(0.001) == []
    assert placement.wake_at is not None
    assert placement.wake_at < booking.predicted
    placement.dispatch(booking.predicted)
    assert booking in book.decodes
    placement.end(booking, 9.0)
    assert booking not in book.decodes


def test_workers_that_tell_no_costs_share_what_is_learnt_of_their_prompts():
    placement, first, second = fleet(Mode.ELASTIC, prefill=0, decode=2)
    before = second.prefill_seconds(1000, None)[0]
    for number in range(100):
        booking = place(placement, demand(now=number), number)
        took = 3 * before
        placement.first_token(booking, number + took)
        placement.end(booking, number + took)
    assert first.scale == second.scale == pytest.approx(3.0, rel=0.1)


def test_a_worker_that_holds_the_prompt_is_looked_at_however_many_others_are_free():
    placement, *books = fleet(Mode.ELASTIC, prefill=0, decode=3 * CANDIDATES)
    holder = books[-1]
    assert whole_at(place(placement, demand())) != holder.incarnation
    assert whole_at(place(placement, demand(held={holder.incarnation: 900, "gone": 950}))) == holder.incarnation


def test_a_prompt_that_a_worker_holds_is_not_late_because_of_its_length():
    """What is left to compute there is in time, so it is not put behind those that can be."""
    placement, *_ = fleet(Mode.ELASTIC, prefill=0, decode=2)
    busy = [place(placement, demand(tokens=tokens)) for tokens in (16_000, 12_000)]
    holder = busy[0].decode
    long, short = demand(tokens=60_000, held={holder.incarnation: 59_000}), demand(now=0.01)
    for one in (long, short):
        placement.submit(one)
    assert placement.dispatch(0.01) == []
    for booking in busy:
        placement.end(booking, 0.1)
    assert [one for one, _ in placement.dispatch(0.1)] == [long, short]


def serve(placement, number, took=0.1):
    """One request a second, alone."""
    booking = place(placement, demand(now=number), number)
    placement.first_token(booking, number + took)
    placement.end(booking, number + took)
    return booking.prefill.incarnation


def told(factor, samples=1000, sigma=0.0):
    """Costs that are so many times the default ones, as a worker tells them."""
    costs = replace(
        DEFAULT_COSTS, base=DEFAULT_COSTS.base * factor, token=DEFAULT_COSTS.token * factor, sigma=sigma,
        samples=samples,
    )  # fmt: skip
    return StepsNow(costs=costs, prompt_tokens=0, decodes=0, kv_tokens=0, most_prompt_tokens=8192, most_requests=256)


def test_costs_of_a_few_steps_are_not_believed():
    """The first steps are slow. A worker that seems slow would get no others."""
    _, book, _ = fleet(Mode.ELASTIC, prefill=0, decode=2)
    before = book.costs
    book.learn(told(10, samples=7))
    assert book.costs is before
    book.learn(told(10, samples=8))
    assert book.costs.base == 10 * before.base


def test_idle_workers_that_seem_about_equally_fast_share_the_requests():
    """Their costs are known to 20 % only."""
    placement, first, second = fleet(Mode.ELASTIC, prefill=0, decode=2)
    first.learn(told(1, sigma=0.2))
    second.learn(told(1.1, sigma=0.2))
    used = [serve(placement, number) for number in range(100)]
    assert 30 <= used.count(second.incarnation) <= 50


def test_a_worker_whose_costs_are_too_high_does_not_get_all_requests():
    """Each prompt ends earlier than its costs say. Those of the others would, too."""
    placement, first, second = fleet(Mode.ELASTIC, prefill=0, decode=2)
    for book in (first, second):
        book.learn(told(1))
    used = [serve(placement, number) for number in range(20)]
    assert used.count(first.incarnation) == used.count(second.incarnation)


def test_a_worker_that_was_slow_is_learnt_anew():
    """Few requests are enough for that."""
    placement, slow, fast = fleet(Mode.ELASTIC, prefill=0, decode=2)
    fast.learn(told(1))
    slow.learn(told(5))
    used = [serve(placement, number) for number in range(200)]
    assert 5 <= used.count(slow.incarnation) <= 12


def test_those_that_wait_are_not_looked_at_at_every_turn():
    """They are a moment later."""
    placement, *_ = fleet(Mode.ELASTIC, prefill=0, decode=2)
    for _ in range(2):
        place(placement, demand(tokens=8000))
    placement.submit(demand(tokens=8000))
    assert placement.dispatch(0.0) == []
    for one in list(placement._running):
        placement.first_token(one, 0.0001)
    assert placement.dispatch(0.0001) == []
    assert placement.wake_at is not None
    assert placement.wake_at < 0.02
    assert len(placement.dispatch(placement.wake_at)) == 1


def test_those_that_wait_are_told_at_once_that_no_worker_is_left():
    placement, book = fleet(Mode.ELASTIC, prefill=0)
    place(placement, demand(tokens=8000))
    placement.submit(demand(tokens=8000))
    assert placement.dispatch(0.0) == []
    placement.submit(demand(tokens=8000, exclude=frozenset({book.incarnation})))
    assert [booking for _, booking in placement.dispatch(0.0)] == [None]
    placement.leave(book)
    assert [booking for _, booking in placement.dispatch(0.0)] == [None]


def test_the_pace_of_workers_is_not_learnt_from_prompts_that_they_hold():
    placement, book = fleet(Mode.ELASTIC, prefill=0)
    for number in range(100):
        booking = place(placement, demand(now=number, held={"d0": 990}), number)
        placement.first_token(booking, number + 0.1)
        placement.end(booking, number + 0.1)
    assert book.scale == 1.0
