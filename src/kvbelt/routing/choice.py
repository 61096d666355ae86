"""Which plan is best for one request. Pure.

The choice counts the service levels that each plan would break: the request's own, and those of running decodes. The
plan that breaks the fewest wins; among equal plans the one that costs the fewest seconds: the request's wait and
prefill, and the delay of each decode beside it. ``docs/placement.md`` explains the rule.
"""

from collections.abc import Callable
from math import inf

from kvbelt.routing.booking import Action, Demand, Plan, WorkerBook
from kvbelt.routing.ranking import Ranking, decode_load, freedom
from kvbelt.routing.rate import ArrivalRate
from kvbelt.routing.rules import Mode, Rules
from kvbelt.routing.work import RecentWork, piles_up
from kvbelt.wire.health import Role

#: Workers of each role that a decision considers: those that are free first.
CANDIDATES = 8

# Fast to read.
_PREFILL, _DECODE = Role.PREFILL, Role.DECODE
_SPLIT, _WHOLE = Action.SPLIT, Action.WHOLE
_ELASTIC, _BY_ROLE = Mode.ELASTIC, Mode.SPLIT

#: An answer of at most so many tokens misses its ITL level by one long gap: that gap is more than 1 of 100.
SHORT = 100

#: The square of the number of decodes beside which one more answer costs a prefill worker half of the whole cost.
FEW = 3

#: Added to the violations of a plan that is taken only if there is no other: more than any number of requests.
LAST_RESORT = 1_000_000

#: Of idle workers, one that had more work than others must be faster by more than what its costs leave unexplained,
#: times its work over the mean. At most so many times: a worker that is faster by more than that gets more work.
MOST_UNEVEN = 2.0


class Choice:
    """The workers that may be chosen, in the orders in which a decision looks at them.

    Attributes:
        mode: which actions may be chosen.
        rate: of arrivals.
        plans_made: since the caller set it to 0.
    """

    def __init__(self, mode: Mode, rules: Rules, can_send: Callable[[WorkerBook, WorkerBook], bool]) -> None:
        self.mode = mode
        self.rules = rules
        self.rate = ArrivalRate()
        self._work = RecentWork()
        self.plans_made = 0
        self._probe_credit = 0.0  # at 1, one request may measure a worker again
        self._can_send = can_send
        self._prefills, self._decodes = Ranking(freedom), Ranking(freedom)
        self._free = {Role.PREFILL: self._prefills, Role.DECODE: self._decodes}
        self._decoders = Ranking(decode_load)

    def join(self, book: WorkerBook) -> None:
        """The worker may be chosen. Called again after ``settled`` has changed."""
        self._free[book.lean].put(book)
        self._work.join(book)
        if book.lean is _DECODE:
            self._decoders.put(book)

    def leave(self, book: WorkerBook) -> None:
        self._free[book.lean].drop(book)
        self._decoders.drop(book)
        self._work.leave(book)

    def moved(self, prefill: WorkerBook, decode: WorkerBook) -> None:
        """The bookings of these workers have changed."""
        self._free[decode.lean].changed.add(decode)
        if decode.lean is _DECODE:
            self._decoders.changed.add(decode)
        if prefill is not decode:
            self._prefills.changed.add(prefill)

    def _used(self, prefill: WorkerBook, decode: WorkerBook) -> None:
        """The bookings of these workers have changed, and others with an equal key are the next."""
        self._free[decode.lean].used(decode)
        if decode.lean is _DECODE:
            self._decoders.used(decode)
        if prefill is not decode:
            self._prefills.used(prefill)

    def booked(self, demand: Demand, plan: Plan, now: float) -> None:
        """The request has got these workers."""
        decode = plan.decode
        if self.mode is not _BY_ROLE:  # which asks for nobody's work
            self._work.add(plan.prefill, plan.own, now)
            self._work.add(decode, demand.output * decode.step / (1 + len(decode.decodes)), now)
        self._probe_credit = min(1.0, self._probe_credit + self.rules.probes)
        if demand.exclude:
            # A second try takes no turn. Otherwise, if one of two workers fails, each would get one kind of try only.
            self.moved(plan.prefill, decode)
        else:
            self._used(plan.prefill, decode)

    @property
    def first_free(self) -> WorkerBook | None:
        """A prefill worker if there is one."""
        return self._prefills.head or self._decodes.head

    def any_ready(self, demand: Demand) -> bool:
        """Whether some worker may answer the request."""
        roles = self._free if self.mode is not Mode.SPLIT else (demand.whole_on, Role.DECODE)
        return any(self._first(role, demand) for role in roles)

    def _first(self, role: Role, demand: Demand) -> list[WorkerBook]:
        """The workers that are free first, and those that hold a prefix, without those that failed the request."""
        exclude = demand.exclude
        books = self._free[role].first(CANDIDATES + len(exclude), demand.held)
        return [book for book in books if book.incarnation not in exclude] if exclude else books

    def best(self, demand: Demand, now: float, planned: dict[WorkerBook, float]) -> Plan | None:
        if self.mode is _BY_ROLE:
            return self._split(demand, now)
        best = self._probe(demand, now)
        if best is not None:
            return best
        if demand.held:
            return self._spread(demand, now, planned)
        return self._cheapest(demand, now, planned, demand.held)

    def _spread(self, demand: Demand, now: float, planned: dict[WorkerBook, float]) -> Plan | None:
        """The cheapest plan, or one that makes a copy of a hot prefix because its holder has too much work.

        A copy must not break a level more, nor make the request late.
        """
        held = demand.held
        cheapest = plan = self._cheapest(demand, now, planned, held)
        most_work = self.rules.hot * self._work.mean
        while plan is not None and piles_up(demand, plan.prefill, held.get(plan.prefill.incarnation, 0), most_work):
            held = {name: tokens for name, tokens in held.items() if name != plan.prefill.incarnation}
            plan = self._cheapest(demand, now, planned, held)
        if plan is None or cheapest is None or plan.broken > cheapest.broken or plan.ends > demand.due - now:
            return cheapest
        return plan

    def _probe(self, demand: Demand, now: float) -> Plan | None:
        """A worker whose speed is to be learnt again answers the request."""
        if 2 * max(demand.held.values(), default=0) > demand.tokens:
            return None
        book = self._to_probe(self._prefills, demand, now) or self._to_probe(self._decodes, demand, now)
        if book is None:
            return None
        tokens = self._to_compute(demand, book)
        own, _ = book.prefill_seconds(tokens, demand.levels.itl)
        return Plan(_WHOLE, "probe", book, book, tokens, 0.0, own)

    def _to_probe(self, ranking: Ranking, demand: Demand, now: float) -> WorkerBook | None:
        """An idle worker without a recent request, if the request may go to it to learn its speed again.

        Otherwise a worker that was slow for a while, or has not told its costs, would be avoided for ever.
        """
        if self._probe_credit < 1.0 or demand.exclude:
            return None
        book = ranking.head
        if book is None:
            return None
        if now - book.used_at <= self.rules.old or book.requests or not book.settled:
            return None
        self._probe_credit = 0.0
        return book

    def _split(self, demand: Demand, now: float) -> Plan | None:
        """The pair that is free first, or the worker if the request cannot be split."""
        found = (self._pair(demand, now) if demand.splittable else None) or self._one(demand)
        if found is None:
            return None
        prefill, decode = found
        tokens, wait = self._to_compute(demand, prefill), prefill.wait(now)
        own, _ = prefill.prefill_seconds(tokens, demand.levels.itl)
        return Plan(_WHOLE if prefill is decode else _SPLIT, "", prefill, decode, tokens, wait, own)

    def _pair(self, demand: Demand, now: float) -> tuple[WorkerBook, WorkerBook] | None:
        prefills, decoders = self._first(_PREFILL, demand), self._decoders.first(CANDIDATES)
        if self._probe_credit >= 1.0 and prefills and decoders:
            probed = self._to_probe(self._decodes, demand, now)
            if probed is not None:
                decoders.insert(0, probed)
        room, exclude = demand.tokens + demand.output, demand.exclude
        for prefill in prefills:
            for decode in decoders:
                if decode.has_room(room) and decode.incarnation not in exclude and self._can_send(prefill, decode):
                    return prefill, decode
        return None

    def _one(self, demand: Demand) -> tuple[WorkerBook, WorkerBook] | None:
        room = demand.tokens + demand.output
        for role in (demand.whole_on, _DECODE):
            for book in self._first(role, demand):
                if book.has_room(room):
                    return book, book
        return None

    @staticmethod
    def _to_compute(demand: Demand, book: WorkerBook) -> int:
        return max(1, demand.tokens - demand.held.get(book.incarnation, 0))

    def _cheapest(  # noqa: C901, PLR0912, PLR0915 -- one pass, for speed
        self, demand: Demand, now: float, planned: dict[WorkerBook, float], held: dict[str, int]
    ) -> Plan | None:
        """The plan that breaks the fewest levels; among equals, the one that costs the fewest seconds.

        It runs for every request that arrives and, while requests wait, at every change. So it drops plans that cannot
        win as early as possible.
        """
        rules, itl, left = self.rules, demand.levels.itl, demand.due - now
        elastic, room = self.mode is _ELASTIC, demand.tokens + demand.output
        short = itl is not None and demand.output <= SHORT
        calm, mean_work = self._calm_seconds(now), self._work.mean
        mean_itl, crowd = demand.levels.mean_itl or inf, rules.crowd * demand.levels.ttft
        decoders: list[WorkerBook] | None = None
        can_send = self._can_send
        best: tuple[WorkerBook, WorkerBook, int, float, float] | None = None
        fewest, least = inf, inf  # violations and cost of the best
        tokens, wait = demand.tokens, 0.0
        books = self._candidates(demand)
        self.plans_made += len(books)
        for book in books:
            if held:
                tokens = max(1, demand.tokens - held.get(book.incarnation, 0))
            if book.prompts:
                wait = book.wait(now)
            elif wait:
                wait = 0.0
            if planned:
                wait = planned.get(book, wait)
            own, delay = book.prefill_seconds(tokens, itl)
            seconds = ends = wait + own
            broken: float = ends > left
            if not book.settled:
                broken += LAST_RESORT
            if broken >= fewest and (broken > fewest or ends >= least):
                continue
            if not wait and book.work and own + demand.output * book.step <= calm:
                seconds += book.costs.sigma * own * min(MOST_UNEVEN, book.work / mean_work)
            if book.decodes:
                broken += book.broken(delay, now)
                if ends <= left:
                    seconds += rules.delay * delay * len(book.decodes)
            if elastic and book.lean is _PREFILL:
                if decoders is None:
                    decoders = self._decoders_for(demand) if demand.splittable else []
                for decode in decoders:
                    if not can_send(book, decode):
                        continue
                    violations, cost = broken + decode.too_slow_for(demand), seconds + rules.handover
                    cost += crowd * decode.crowding(demand, mean_itl)
                    # The second token waits for the decode worker's step, which is long if it carries a prompt.
                    if short and ends <= left and (decode.prompts or now - decode.begun < demand.levels.ttft):
                        violations += 1
                    if book.settled and not decode.settled:
                        violations += LAST_RESORT
                    if violations < fewest or (violations == fewest and cost < least):
                        fewest, least, best = violations, cost, (book, decode, tokens, wait, own)
                    break
                # Of two idle workers the decode worker wins. Otherwise the answer costs the prefill worker steps that
                # read all weights, and later prompts wait for them. Beside several decodes, which others follow, it
                # hardly adds a step; one or two will end soon.
                decodes, output = len(book.decodes), demand.output
                is_calm = (
                    not decodes and not book.arriving and own + output * book.decode_step(1, demand.tokens) <= calm
                )
                seconds += rules.handover / 2 if is_calm else output * book.costs.base / (1 + decodes * decodes / FEW)
            seconds += crowd * book.crowding(demand, mean_itl)
            if broken >= fewest and (broken > fewest or seconds >= least):
                continue
            violations = broken + book.too_slow_for(demand)
            if (violations < fewest or (violations == fewest and seconds < least)) and book.has_room(room):
                fewest, least, best = violations, seconds, (book, book, tokens, wait, own)
        if best is None:
            return None
        prefill, decode, tokens, wait, own = best
        if prefill is not decode:
            return Plan(_SPLIT, "", prefill, decode, tokens, wait, own, fewest)
        reason = "prefill_busy" if prefill.decodes else "calm"
        return Plan(_WHOLE, reason, prefill, prefill, tokens, wait, own, fewest)

    def _candidates(self, demand: Demand) -> list[WorkerBook]:
        if demand.held or demand.exclude:
            return self._first(_PREFILL, demand) + self._first(_DECODE, demand)
        return self._prefills.first(CANDIDATES) + self._decodes.first(CANDIDATES)

    def _calm_seconds(self, now: float) -> float:
        """How long a request may run on an idle prefill worker that will probably get no other request meanwhile."""
        workers = len(self._prefills) + len(self._decodes)
        return self.rules.calm * workers * self.rate.gap(now)

    def _decoders_for(self, demand: Demand) -> list[WorkerBook]:
        """The decode workers that have room for its answer and did not fail it, those with the shortest steps first."""
        room, exclude = demand.tokens + demand.output, demand.exclude
        books = self._decoders.first(CANDIDATES)
        return [book for book in books if book.has_room(room) and book.incarnation not in exclude]
