"""What holds in every state of placement, whatever comes in whatever order."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbelt.pacing.costs import StepCosts
from kvbelt.routing.booking import MOST_KV, Action, Booking, Demand, WorkerBook
from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.placement import Mode, Placement
from kvbelt.wire.health import Role

COSTS = StepCosts(5e-3, 2e-3, 25e-6, 0.0, 0.05e-3, 30e-9, samples=1000)
LEVELS = (ServiceLevels(), ServiceLevels(0.2, None, 0.02), ServiceLevels(2.0, None, None))
#: Passes until nothing more can be placed without another change: those that wait are looked at some at a time.
PASSES = 50

WORKERS = st.fixed_dictionaries(
    {
        "lean": st.sampled_from([Role.PREFILL, Role.DECODE]),
        "seats": st.integers(1, 6),
        "kv": st.sampled_from([None, None, 3000, 20_000]),
        "speed": st.sampled_from([1, 4]),
        "settled": st.sampled_from([True, True, False]),
    }
)
NAMES = st.sampled_from([f"w{i}" for i in range(8)])


class Life(RuleBasedStateMachine):
    """Requests come, are placed, computed, answered or given up, while workers come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.books: dict[str, WorkerBook] = {}
        self.ready: set[WorkerBook] = set()
        self.waiting: set[Demand] = set()
        self.running: list[Booking] = []

    @initialize(mode=st.sampled_from(Mode), refused=st.booleans(), workers=st.lists(WORKERS, min_size=4, max_size=4))
    def begin(self, mode: Mode, refused: bool, workers: list[dict[str, object]]) -> None:
        self.mode = mode
        self.refusing = {"w1"} if refused else set()  # takes no KV
        self.placement = Placement(mode, can_send=self.can_send)
        for number, fields in enumerate(workers):
            self.join(number, fields | {"lean": (Role.PREFILL, Role.DECODE)[number % 2]})

    def can_send(self, _prefill: WorkerBook, decode: WorkerBook) -> bool:
        return decode.incarnation not in self.refusing

    # What happens

    @rule(number=st.integers(4, 7), fields=WORKERS)
    def join(self, number: int, fields: dict[str, object]) -> None:
        name = f"w{number}"
        if name in self.books:
            return
        book = self.books[name] = WorkerBook(name, fields["lean"])
        book.costs = StepCosts(5e-3, 2e-3, 25e-6 * fields["speed"], 0.0, 0.05e-3, 30e-9, samples=1000)
        book.most_requests, book.kv_capacity, book.settled = fields["seats"], fields["kv"], fields["settled"]
        self.placement.join(book)
        self.ready.add(book)
        self.dispatch()

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        book = data.draw(st.sampled_from(sorted(self.ready, key=lambda one: one.incarnation)))
        self.ready.remove(book)
        self.placement.leave(book)
        self.dispatch()

    @rule(
        tokens=st.integers(1, 9000),
        output=st.integers(2, 400),
        levels=st.sampled_from(LEVELS),
        splittable=st.sampled_from([True, True, False]),
        silent=st.booleans(),
        exclude=st.one_of(st.just(set()), st.sets(NAMES, max_size=2)),
        held=st.one_of(st.just({}), st.dictionaries(NAMES, st.integers(1, 10_000), max_size=2)),
    )
    def submit(self, tokens: int, output: int, levels: ServiceLevels, **fields: object) -> None:
        fields["exclude"] = frozenset(fields["exclude"])
        demand = Demand(tokens, output, self.now, levels, **fields)
        self.placement.submit(demand)
        self.waiting.add(demand)
        self.dispatch()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        demand = data.draw(st.sampled_from(sorted(self.waiting, key=lambda one: (one.arrived, one.tokens, id(one)))))
        self.waiting.remove(demand)
        self.placement.withdraw(demand)

    @rule(seconds=st.sampled_from([0.001, 0.05, 0.2, 2.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.dispatch()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        self.placement.first_token(data.draw(st.sampled_from(self.running)), self.now)
        self.dispatch()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def generate(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.running)).generated += 1

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        booking = data.draw(st.sampled_from(self.running))
        self.running.remove(booking)
        self.placement.end(booking, self.now)
        self.placement.end(booking, self.now)
        self.dispatch()

    # What must hold

    def dispatch(self) -> None:
        for demand, booking in self.placement.dispatch(self.now):
            self.waiting.remove(demand)  # neither placed twice nor withdrawn
            if booking is None:
                assert not any(self.may_answer(book, demand) for book in self.ready)
            else:
                self.check(demand, booking)
                self.running.append(booking)

    def may_answer(self, book: WorkerBook, demand: Demand) -> bool:
        if book.incarnation in demand.exclude:
            return False
        return self.mode is not Mode.SPLIT or book.lean in (demand.whole_on, Role.DECODE)

    def check(self, demand: Demand, booking: Booking) -> None:
        prefill, decode = booking.prefill, booking.decode
        assert {prefill, decode} <= self.ready
        assert not {prefill.incarnation, decode.incarnation} & demand.exclude
        if booking.action is Action.SPLIT:
            assert demand.splittable
            assert self.mode is not Mode.WHOLE
            assert (prefill.lean, decode.lean) == (Role.PREFILL, Role.DECODE)
            assert self.can_send(prefill, decode)
        else:
            assert prefill is decode
        assert decode.requests <= decode.most_requests
        if decode.requests > 1 and decode.kv_capacity is not None:
            assert decode.kv_booked <= MOST_KV * decode.kv_capacity

    @invariant()
    def no_request_is_lost(self) -> None:
        assert self.placement.waiting == len(self.waiting)
        assert self.placement.running == len(self.running)

    @invariant()
    def what_is_booked_is_what_runs(self) -> None:
        for book in self.books.values():
            mine = [one for one in self.running if book in (one.prefill, one.decode)]
            computing = [one for one in mine if one.first_token is None]
            assert set(book.prompts) == {one for one in computing if one.prefill is book}
            assert book.decodes == {one for one in mine if one.first_token is not None and one.decode is book}
            assert book.arriving == len([one for one in computing if one.decode is book is not one.prefill])
            assert book.kv_tokens == sum(one.kv_tokens for one in book.decodes)
            total = sum(one.demand.tokens + one.demand.output for one in mine if one.decode is book)
            assert book.kv_booked == total

    @invariant()
    def nobody_waits_while_no_worker_has_anything_to_do(self) -> None:
        """At the latest some passes later, which placement asks for itself."""
        for _ in range(PASSES):
            if not self.all_idle() or not self.somebody_could_be_answered():
                return
            assert self.placement.wake_at is not None
            self.now = max(self.now, self.placement.wake_at) + 1e-6
            self.dispatch()
        assert not (self.all_idle() and self.somebody_could_be_answered())

    def all_idle(self) -> bool:
        return not any(book.requests for book in self.ready)

    def somebody_could_be_answered(self) -> bool:
        return any(self.may_answer(book, demand) for book in self.ready for demand in self.waiting)

    def teardown(self) -> None:
        """Everything ends, and nothing stays booked."""
        for _ in range(2000):
            for booking in self.running:
                self.placement.end(booking, self.now)
            self.running.clear()
            self.now += 5.0
            if not self.waiting:
                break
            if not self.ready:
                self.books["last"] = WorkerBook("last", Role.DECODE)
                self.ready.add(self.books["last"])
                self.placement.join(self.books["last"])
            self.dispatch()
        assert not self.waiting
        for book in self.books.values():
            assert (book.prompts, book.decodes, book.arriving, book.kv_tokens, book.kv_booked) == ([], set(), 0, 0, 0)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
