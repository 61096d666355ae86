"""The workers of one request: its place, held while the request needs it, and another one after a failure."""

from kvbelt.proxy.observe.records import Record
from kvbelt.proxy.workers.dispatcher import Dispatcher, Place
from kvbelt.proxy.workers.watch import Held
from kvbelt.routing.booking import Booking, Demand


class WorkerSelection:
    """``plan.py`` says when to place the request, and which incarnations to leave out."""

    decode: Held  #: generates; held to the end of the request
    prefill: Held  #: computes the prompt; held until its KV has arrived or is given up. May be the same

    def __init__(self, dispatcher: Dispatcher, record: Record) -> None:
        self._dispatcher = dispatcher
        self._record = record
        self._place: Place | None = None

    async def place(self, demand: Demand) -> Booking:
        """Give the present place back, and await another one. Raises NotPlacedError."""
        if self._place is not None:
            self.release()
        place = self._place = await self._dispatcher.place(demand)
        self.decode = place.decode
        self.prefill = place.decode if place.prefill is None else place.prefill
        record, booking = self._record, place.booking
        record.decode_worker = place.decode.worker.name
        record.action, record.placed_because, record.predicted = booking.action, booking.reason, booking.predicted
        record.waited += place.waited
        levels = booking.demand.levels
        record.ttft_level = levels.ttft
        record.itl_level, record.tpot_level = levels.itl, levels.tpot
        return booking

    def first_token(self) -> None:
        """Its prompt is computed."""
        place = self._place
        if place is not None and place.booking.first_token is None:
            self._dispatcher.first_token(place.booking)

    def counted(self, cached: int | None) -> None:
        """The worker that has computed the prompt has told its counts; None: not the tokens that it had cached."""
        if self._place is not None:
            self._dispatcher.counted(self._place, cached)

    @property
    def booking(self) -> Booking | None:
        return None if self._place is None else self._place.booking

    def release_prefill(self) -> None:
        if self._place is not None and self._place.prefill is not None:
            self._place.prefill.release()

    def release(self) -> None:
        """Give everything back. May be called again."""
        place, self._place = self._place, None
        if place is not None:
            record, booking = self._record, place.booking
            demand = booking.demand
            record.prompt_tokens, record.held_tokens = demand.tokens, demand.tokens - booking.tokens
            record.output_tokens = booking.generated if booking.generated > 1 else demand.output
            record.splittable = demand.splittable
            self._dispatcher.give_back(place)
