"""Where requests go, and when."""

from dataclasses import replace

import pytest

from kvbelt.pacing.costs import DEFAULT_COSTS, StepCosts
from kvbelt.routing.booking import Action, Booking, Demand, WorkerBook
from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.placement import Mode, Placement, Rules
from kvbelt.wire.health import Role

COSTS = StepCosts(5e-3, 2e-3, 25e-6, 0.0, 0.05e-3, 30e-9, samples=1000)
LEVELS = ServiceLevels()


def fleet(prefill: int = 1, decode: int = 1, mode: Mode = Mode.ELASTIC) -> tuple[Placement, list[WorkerBook]]:
    placement = Placement(mode)
    books = [WorkerBook(f"p{i}", Role.PREFILL) for i in range(prefill)]
    books += [WorkerBook(f"d{i}", Role.DECODE) for i in range(decode)]
    for book in books:
        book.costs = COSTS
        placement.join(book)
    return placement, books


def demand(now: float, tokens: int = 7500) -> Demand:
    return Demand(tokens, 200, now, LEVELS)


def test_predictions_that_are_a_little_wrong_do_not_add_up() -> None:
    """A worker that is always 10 % late has at most the prompt that it computes and the next one."""
    placement, (book,) = fleet(0)
    now, most = 0.0, 0
    for number in range(200):
        placement.submit(demand(now))
        placement.dispatch(now)
        if number % 2:
            head = book.prompts[0]
            now = max(now, book.begun + 1.1 * head.own)
            placement.first_token(head, now)
            placement.end(head, now)
            placement.dispatch(now)
        most = max(most, len(book.prompts))
    assert most <= 2


def test_a_prediction_learns_what_workers_add_to_their_steps() -> None:
    placement, _ = fleet(0)
    for now in range(100):
        placement.submit(demand(now))
        ((_, booking),) = placement.dispatch(now)
        assert booking is not None
        took = COSTS.prefill_seconds(7500, 0, 8192, 0, 0) + 0.02
        placement.first_token(booking, now + took)
        placement.end(booking, now + took)
    assert booking.predicted - booking.placed == pytest.approx(took, abs=1e-3)


def test_a_worker_that_is_late_with_its_only_prompt_gets_the_next_one_all_the_same() -> None:
    """It may be free at any moment, and must not be idle then. It gets no third one."""
    placement, (book,) = fleet(0)
    for number in range(3):
        placement.submit(demand(0.001 * number))
    placement.dispatch(0.003)
    assert len(book.prompts) == 1
    placement.dispatch(book.free_at + 0.05)
    assert len(book.prompts) == 2
    placement.dispatch(book.free_at + 0.05)
    assert len(book.prompts) == 2


def test_a_worker_that_is_late_is_expected_to_be_as_late_again() -> None:
    placement, (book,) = fleet(0)
    placement.submit(demand(0.0))
    placement.dispatch(0.0)
    assert book.wait(0.0) == pytest.approx(book.free_at)
    assert book.wait(book.free_at + 0.1) == pytest.approx(0.1)


def place(placement: Placement, wanted: Demand, now: float) -> Booking:
    placement.submit(wanted)
    ((_, booking),) = placement.dispatch(now)
    assert booking is not None
    return booking


def actions(placement: Placement, gap: float, number: int) -> list[tuple[Action, Role]]:
    """What is done with requests that come so often; prompts take 0.2 s and answers 1 s more."""
    made: list[tuple[Action, Role]] = []
    running: list[Booking] = []
    for index in range(number):
        now = index * gap
        for one in [*running]:
            if one.placed + 0.2 <= now:
                placement.first_token(one, one.placed + 0.2)
            if one.placed + 1.2 <= now:
                placement.end(one, one.placed + 1.2)
                running.remove(one)
        booking = place(placement, demand(now), now)
        running.append(booking)
        made.append((booking.action, booking.prefill.lean))
    return made


def test_with_little_to_do_each_worker_answers_whole() -> None:
    """Both roles take their turn, so a deployment that is hardly used is as good as plain servers."""
    placement, _ = fleet()
    assert set(actions(placement, 1.0, 20)) == {(Action.WHOLE, Role.DECODE), (Action.WHOLE, Role.PREFILL)}


def test_prefill_workers_keep_no_answers_where_requests_come_often() -> None:
    """Their next prompts would wait for the steps of those answers."""
    placement, _ = fleet()
    made = actions(placement, 0.4, 40)
    assert (Action.WHOLE, Role.PREFILL) not in made
    assert made.count((Action.SPLIT, Role.PREFILL)) > 30


def test_late_requests_are_not_generated_on_prefill_workers() -> None:
    """That would make every later prompt late as well."""
    placement, (prefill, decode) = fleet()
    bookings = [place(placement, demand(0.0), 0.0)]
    for number in range(1, 40):
        now = 0.1 * number
        placement.submit(demand(now))
        bookings += [booking for _, booking in placement.dispatch(now) if booking is not None]
        for one in list(prefill.prompts[:1] + decode.prompts[:1]):
            if now - one.placed > 0.25:
                placement.first_token(one, now)
    assert {one.prefill.lean for one in bookings if one.action is Action.WHOLE} == {Role.DECODE}
    assert len(bookings) > 15


def test_a_late_request_is_the_next_after_its_patience() -> None:
    """Requests that can be in time pass it until then, and not for ever."""
    placement, (book,) = fleet(0)
    late = demand(0.0)
    running = place(placement, demand(0.0), 0.0)
    placement.submit(late)
    now, passed = 0.0, 0
    while late not in {one.demand for one in book.prompts}:
        now += 0.5
        placement.submit(demand(now))
        placement.first_token(running, now)
        placement.end(running, now)
        ((placed, booking),) = placement.dispatch(now)
        assert booking is not None
        running = booking
        passed += placed is not late
    assert passed
    assert now <= Rules().patience * LEVELS.ttft + 0.5


def test_a_request_that_was_withdrawn_is_not_placed() -> None:
    placement, _ = fleet(0)
    running = place(placement, demand(0.0), 0.0)
    gone, stays = demand(0.0), demand(0.01)
    for one in (gone, stays):
        placement.submit(one)
    placement.withdraw(gone)
    assert placement.waiting == 1
    placement.end(running, 1.0)
    ((placed, _),) = placement.dispatch(1.0)
    assert placed is stays
    assert placement.waiting == 0


def test_short_prompts_are_handed_over_several_at_a_time() -> None:
    """They share what a step costs besides its prompts; the last one can still be computed soon."""
    placement, (book,) = fleet(0)
    for _ in range(60):
        placement.submit(demand(0.0, tokens=300))
    placement.dispatch(0.0)
    soon = Rules().soon * LEVELS.ttft
    assert 0.8 * soon < book.wait(0.0) <= soon
    assert placement.waiting


def busy_decode_worker() -> tuple[Placement, Demand]:
    """It computes a prompt while requests come often, and a request with a short answer comes."""
    placement, (prefill, decode) = fleet()
    for number in range(20):
        now = 0.25 * number
        placement.first_token(place(placement, demand(now), now), now + 0.2)
    computing = Demand(7500, 200, 5.0, LEVELS, splittable=False, exclude=frozenset({prefill.incarnation}))
    assert place(placement, computing, 5.0).prefill is decode
    return placement, Demand(7500, 20, 5.0, LEVELS)


def test_a_short_answer_is_not_split_to_a_worker_that_computes_prompts() -> None:
    """Its gap before the second token would be long, and more than 1 of 100; that of a long answer is not."""
    placement, short = busy_decode_worker()
    assert place(placement, short, 5.0).action is Action.WHOLE
    placement, short = busy_decode_worker()
    assert place(placement, replace(short, output=400), 5.0).action is Action.SPLIT


def test_a_short_answer_that_is_late_anyway_is_split() -> None:
    """It misses its levels in any case, and should not slow down those that can keep them."""
    placement, short = busy_decode_worker()
    assert place(placement, replace(short, levels=ServiceLevels(ttft=0.1)), 5.0).action is Action.SPLIT


@pytest.mark.parametrize("running", [0, 30])
def test_a_prefill_worker_that_generates_takes_more_answers(running: int) -> None:
    """Its steps are computed anyway, so one more answer costs little. An idle one would begin such steps for it."""
    placement, (prefill, decode) = fleet()

    def request(tokens: int, name: str = "") -> Demand:
        return Demand(tokens, 100, 1.0, LEVELS, splittable=False, exclude=frozenset({name}))

    for _ in range(running):
        placement.first_token(place(placement, request(100, decode.incarnation), 1.0), 1.0)
    place(placement, request(7500, prefill.incarnation), 1.0)
    placement.submit(request(1000))
    placed = [booking for _, booking in placement.dispatch(1.0) if booking is not None]
    assert [one.prefill for one in placed] == ([prefill] if running else [])


def test_an_answer_goes_to_the_worker_with_fewer_decodes_where_each_of_them_lengthens_a_step() -> None:
    placement, (prefill, decode) = fleet()
    for book in (prefill, decode):
        book.costs = replace(COSTS, decode=3e-3)
    request = Demand(1000, 50, 1.0, ServiceLevels(itl=None, tpot=0.02))
    for _ in range(3):
        placement.first_token(place(placement, replace(request, exclude=frozenset({"p0"})), 1.0), 1.0)
    assert place(placement, replace(request), 1.0).decode is prefill


@pytest.mark.parametrize("costs", [DEFAULT_COSTS, replace(COSTS, base=2 * COSTS.base)])
@pytest.mark.parametrize("mode", [Mode.SPLIT, Mode.ELASTIC])
def test_a_decode_worker_that_seems_slow_is_tried_again(mode: Mode, costs: StepCosts) -> None:
    """It may have had a bad start, or not have told its costs yet; the others are known to be faster."""
    placement, books = fleet(1, 2, mode)
    for book in books[:2]:
        book.costs = replace(COSTS, base=COSTS.base / 10)
    books[2].costs = costs
    used = 0
    for number in range(240):  # for a minute
        now = number / 4
        booking = place(placement, demand(now, 1000), now)
        used += booking.decode is books[2]
        placement.first_token(booking, now + 0.02)
        placement.end(booking, now + 0.1)
    assert 4 <= used <= 12


@pytest.mark.parametrize("mode", list(Mode))
def test_a_request_that_arrives_is_placed_as_one_that_is_submitted(mode: Mode) -> None:
    """The way past the queue makes the same choice, at the same moment, as the way through it."""
    taken: list[list[tuple[object, ...]]] = []
    for arrives in (True, False):
        placement, books = fleet(2, 2, mode)
        where: list[tuple[object, ...]] = []
        running: list[Booking] = []
        for number in range(300):
            now, one = 0.02 * number, demand(0.02 * number, 500 + 97 * (number % 40))
            placed = placement.arrive(one, now) if arrives else placement.submit(one)
            found = [placed] if placed is not None else [booking for _, booking in placement.dispatch(now)]
            for booking in found:
                assert booking is not None
                where.append((number, booking.action, books.index(booking.prefill), booking.predicted))
                running.append(booking)
            if len(running) > 6:
                done = running.pop(number % 6)
                placement.first_token(done, now)
                placement.end(done, now)
        taken.append(where)
    assert taken[0] == taken[1]


def test_a_request_that_arrives_does_not_overtake_one_that_waits() -> None:
    placement, _ = fleet(0)
    numbers = range(20)
    placed = [placement.arrive(demand(0.001 * number), 0.001 * number) for number in numbers]
    assert [booking is not None for booking in placed] == sorted(
        (booking is not None for booking in placed), reverse=True
    )
    assert placement.waiting > 0
