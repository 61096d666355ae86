"""One request's way through the proxy: the loop that performs the plan (``plan.py``).

Every request ends in exactly one of: a whole answer, a stream that ends with ``[DONE]``, an error with its reason, or a
client that is gone.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

from kvbelt.errors import RequestError
from kvbelt.http import JSON, Exchange, HttpError, Pieces
from kvbelt.proxy.context import Context
from kvbelt.proxy.observe.records import Record
from kvbelt.proxy.request.body import ClientBody
from kvbelt.proxy.request.deadline import Deadline
from kvbelt.proxy.request.limits import deadline_seconds, levels_of
from kvbelt.proxy.request.merge import EVENT_STREAM, FirstTokenMerger
from kvbelt.proxy.request.plan import REDERIVE, STOP, Plan, transfer_outcome
from kvbelt.proxy.request.prefill_answer import PrefillAnswer
from kvbelt.proxy.request.reply import Reply
from kvbelt.proxy.request.selection import WorkerSelection
from kvbelt.proxy.request.steps import Do, Outcome, Result, Step
from kvbelt.proxy.request.upstream import Ended, UpstreamCalls
from kvbelt.proxy.request.usage import Counts, counts_in, counts_of, with_details_of
from kvbelt.proxy.workers.dispatcher import NotPlacedError
from kvbelt.routing.booking import Action, Demand
from kvbelt.routing.decider import why_not_split
from kvbelt.routing.exactness import ResponseMode
from kvbelt.routing.prefixes import Prefix
from kvbelt.routing.token_count import PromptSize
from kvbelt.turns import Work
from kvbelt.wire.handoff import DecodeHandoff
from kvbelt.wire.health import Role

log = logging.getLogger("kvbelt.proxy")

_COMPLETIONS = "/v1/completions"

# The outcomes of most requests: on Python 3.11, reading an enum's member takes longer than a call.
_SPLIT, _FIRST_TOKEN = Outcome.SPLIT, Outcome.FIRST_TOKEN
_SENT, _DONE, _UNSPLIT = Outcome.SENT, Outcome.DONE, Outcome.UNSPLIT
_PREFILL, _DECODE = Role.PREFILL, Role.DECODE
_ONLY_PREFILL = ResponseMode.PREFILL_ONLY
_PLACED_APART = Action.SPLIT

_UNPLACED = {
    "no_decode_worker": Outcome.NO_WORKER, "queue_full": Outcome.QUEUE_FULL, "overloaded": Outcome.OVERLOADED,
}  # fmt: skip


class RequestHandler:
    """One request, from its parsed head to its end."""

    def __init__(self, context: Context, exchange: Exchange, record: Record, *, chat: bool) -> None:
        self._settings = context.settings
        self._context = context
        self._exchange = exchange
        self._record = record
        self._chat = chat
        self._reply = Reply(exchange, record, context.metrics)
        self._plan = Plan(context.settings.max_attempts)
        self._selection = WorkerSelection(context.dispatcher, record)
        self._calls: UpstreamCalls
        self._client: ClientBody
        self._levels = context.levels
        self._size: PromptSize
        self._booked = 1  # prompt tokens that a worker is expected to compute
        self._prefix: Prefix | None = None
        self._unfit: str | None = None  # why the client cannot have the prefill worker's first token
        self._why_whole: str | None = None  # why the request cannot be split
        self._one_token = False  # is asked for: any worker's answer is the answer
        self._retry_after = 1
        self._first: PrefillAnswer  # the latest one whose first token it can have
        self._usage_of_prefill: Mapping[str, Any]  # of the latest prefill worker's answer
        self._limit = 0  # tokens that its whole answer may have
        self._merger: FirstTokenMerger
        self._announced = b""  # x-kvbelt-path in the head of the client's stream

    async def run(self) -> None:
        """Answer the request. Raises only CancelledError, when the client is gone."""
        headers = self._exchange.request.headers
        try:
            seconds = deadline_seconds(headers, self._settings.deadline_seconds)
            levels = self._levels = levels_of(headers, self._context.levels)
        except RequestError as error:
            self._reply.fail(error)
            return
        calls = UpstreamCalls(
            self._context,
            self._record,
            self._selection,
            authorization=headers.get(b"authorization"),
            deadline_seconds=seconds,
            itl=levels.itl,
        )
        self._calls = calls
        try:
            with Deadline(calls.remaining()):
                if self._settings.limits.is_small(self._exchange.request.body):
                    self._parse()
                else:
                    await self._context.turns.take(self._parsing())
                await self._perform(self._plan.begin())
        except TimeoutError:
            await self._perform(self._plan.handle(calls.overdue()))
        except RequestError as error:
            self._reply.fail(error)
        except asyncio.CancelledError:
            self._plan.handle(Outcome.CLIENT_GONE)
            raise
        except Exception:
            log.exception("the request failed in the proxy itself", extra={"request_id": self._record.request_id})
            fault = Result(Outcome.FAULT, detail="internal error; the proxy's log has more")
            await self._perform(self._plan.handle(fault))
        finally:
            calls.close()
            self._selection.release()

    def _parsing(self) -> Work[None]:
        yield from self._settings.limits.looking_through(self._exchange.request.body)
        yield
        self._parse()

    def _parse(self) -> None:
        context, longest = self._context, self._context.fleet.longest_context
        client = self._client = ClientBody(
            self._exchange.request.body, chat=self._chat, limits=self._settings.limits, context=longest
        )
        fields, prompt = client.fields, client.prompt
        self._record.stream = fields.stream
        if self._settings.record_prompts:
            self._record.prompt = client.excerpt(self._settings.record_prompts)
        self._size = context.token_counts.size_of(fields.model, prompt)
        self._booked = _computed(self._size.tokens, longest)
        if client.num_prompts == 1 and context.dispatcher.wants_prefixes():
            self._prefix = Prefix(prompt, self._size.tokens, fields.beside_prompt)
        first = fields.first_of(client.num_prompts)
        self._unfit = first.reason
        fewest = self._settings.min_prompt_tokens
        self._why_whole = client.why_whole(context.fleet.shortest_context) or why_not_split(
            first, self._size.tokens, fewest
        )
        self._one_token = first.mode is _ONLY_PREFILL and self._why_whole is None

    async def _perform(self, step: Step) -> None:
        plan, record, perform = self._plan, self._record, self._PERFORM
        while step is not STOP:
            step = plan.handle(await perform[step.do](self, step))
            record.path, record.reason, record.after = plan.path, plan.reason, plan.after

    # Placing

    async def _place(self, step: Step) -> Ended:
        demand = self._demanded(step)
        try:
            booking = await self._selection.place(demand)
        except NotPlacedError as error:
            self._retry_after = error.retry_after
            return Result(_UNPLACED[error.reason], detail=error.detail or self._none_left())
        if booking.action is _PLACED_APART:
            return _SPLIT
        if self._one_token and self._plan.may_prefill and booking.prefill.lean is Role.PREFILL:
            self._record.decode_worker = None
            return Outcome.ONE_TOKEN
        if step.continues or not self._plan.may_prefill:
            return Outcome.UNSPLIT  # because of what failed
        reason = self._record.placed_because = self._why_whole or self._context.dispatcher.why_whole(booking)
        return Result(_UNSPLIT, reason)

    def _demanded(self, step: Step) -> Demand:
        client, plan, context = self._client, self._plan, self._context
        may_prefill = plan.may_prefill and not step.continues
        one_token = self._one_token and may_prefill
        return Demand(
            tokens=self._booked,
            output=1 if one_token else context.output_lengths.expected(client.fields.model, client.fields.limit),
            arrived=self._record.began,
            levels=self._levels,
            splittable=may_prefill and self._why_whole is None and not one_token,
            whole_on=_PREFILL if one_token or plan.decode_lacks_model else _DECODE,
            silent=not client.fields.stream and not one_token,
            prefix=self._prefix,
            exclude=plan.tried,
        )

    def _none_left(self) -> str:
        states = ", ".join(f"{one.name} {one.endpoint.state}" for one in self._context.fleet)
        return f"no worker is left ({states or 'there is none'}); try again"

    # Calling the workers

    async def _call_prefill(self, step: Step) -> Ended:
        may_repeat = self._plan.may_repeat
        if not step.kv:
            return await self._calls.prefill_only(self._client.plain(), may_repeat=may_repeat)
        answer = await self._calls.prefill(self._client, may_repeat=may_repeat)
        if not isinstance(answer, PrefillAnswer):
            return answer
        self._selection.first_token()
        return self._judge(answer)

    def _judge(self, first: PrefillAnswer) -> Ended:
        """What a prefill worker's answer is good for."""
        self._usage_of_prefill = first.usage
        self._size.learn(first.prompt_tokens)
        if self._prefix is not None:
            self._selection.counted(counts_of(first.usage).cached_tokens)
        if first.routed:
            return Result(Outcome.KV_HOPELESS, "routed_experts")
        unfit = self._unfit
        if unfit is None and first.finish_reason != "stop":
            streams = self._client.fields.stream
            unfit = first.why_not_fast(streams=streams) or self._why_not_continue(first) or self._why_not_same(first)
        if unfit is None:
            self._first = first
            if first.finish_reason == "stop" or self._limit == 1:
                return Outcome.LAST_TOKEN
        failed = self._calls.failed_transfer(first)
        if failed is not None:
            return self._calls.kv_failed(transfer_outcome(failed, token=unfit is None), failed)
        return _FIRST_TOKEN if unfit is None else Result(Outcome.UNFIT, unfit)

    def _why_not_continue(self, first: PrefillAnswer) -> str | None:
        report = self._selection.decode.worker.endpoint.report
        context, defaults = report.max_model_len, report.defaults
        if context is None:
            return "unknown_context"
        if defaults.penalties:
            return "penalty"
        limit = defaults.limit(self._client.fields.limit, context - first.prompt_tokens)
        if limit < 1 or first.prompt_tokens + limit > context:
            return "context_exceeded"  # the decode worker refuses or shortens it, as one server does
        self._limit = limit
        return None

    def _why_not_same(self, first: PrefillAnswer) -> str | None:
        """Whether the first token may be of another adapter than the rest."""
        adapter = first.handoff.adapter if first.handoff is not None else ""
        return "new_adapter" if adapter and self._calls.adapter_on_decode not in self._context.same_adapters else None

    async def _call_decode(self, step: Step) -> Ended:
        client, may_repeat = self._client, self._plan.may_repeat
        if not step.kv:
            self._selection.release_prefill()
        if not step.continues:

            def own(handoff: DecodeHandoff | None) -> Pieces:
                return client.plain() if handoff is None else client.for_decode(handoff)

            return await self._calls.decode(self._record.route, own, kv=step.kv, may_repeat=may_repeat)
        ids, token_id, more = self._first.prompt_token_ids, self._first.token_id, self._limit - 1
        assert ids is not None
        assert token_id is not None

        state = self._first.handoff
        special = self._chat and state is not None and state.special_tokens

        def continuation(handoff: DecodeHandoff | None) -> Pieces:
            return client.for_continuation(ids, token_id, more, handoff, special_tokens=special)

        streams = self._exchange.started
        return await self._calls.decode(_COMPLETIONS, continuation, kv=step.kv, may_repeat=may_repeat, streams=streams)

    # Telling the client

    async def _send_first_token(self, _: Step) -> Ended:
        merger = self._merge()
        if not self._client.fields.stream:
            return Outcome.KEPT
        reply = self._reply
        self._announced = reply.path
        reply.start(EVENT_STREAM, merger.opening(None))
        reply.told_first_token()
        return _SENT

    async def _finish(self, _: Step) -> Ended:
        merger, finish_reason = self._merge(), "stop" if self._first.finish_reason == "stop" else "length"
        if self._client.fields.stream:
            self._reply.start(EVENT_STREAM)
            self._exchange.end(merger.opening(finish_reason) + merger.ending())
            self._reply.told_first_token()
        else:
            self._reply.whole(JSON, merger.whole(None, finish_reason))
        return _DONE

    def _merge(self) -> FirstTokenMerger:
        client = self._client
        self._merger = FirstTokenMerger(
            self._first,
            chat=self._chat,
            include_usage=client.fields.include_usage,
            token_ids=bool(client.fields.view.return_token_ids),
        )
        return self._merger

    async def _relay_stream(self, _: Step) -> Ended:
        reply, calls, transform = self._reply, self._calls, None
        piece, calls.body = calls.body, b""
        if self._exchange.started:
            transform = self._merger.relayed
            if reply.path != self._announced:
                reply.comment_path()
        else:
            reply.start((b"content-type", calls.response.headers[b"content-type"]))
            if self._client.fields.include_usage:
                transform = self._own_events
        try:
            await reply.stream(calls.response, piece, transform, self._selection.booking)
        except HttpError as error:
            return Result(Outcome.STREAM_LOST, detail=f"a worker was lost: {error}")
        except ValueError as error:
            return self._bad_answer("sent an event that is not a completion's", error)
        self._learn_length(self._record.gaps + 1)
        return calls.streamed()

    async def _reply_merged(self, _: Step) -> Ended:
        try:
            whole = self._merger.whole(self._calls.body)
        except ValueError as error:
            return self._bad_answer("answered something else than a completion", error)
        self._reply.whole(JSON, whole)
        self._learn_counts(counts_in(whole))
        return _DONE

    def _bad_answer(self, what: str, error: ValueError) -> Result:
        return Result(Outcome.BAD_ANSWER, detail=f"{self._record.decode_worker} {what}: {error}")

    async def _pass_on(self, _: Step) -> Ended:
        response, body = self._calls.response, self._calls.body
        if response.status != 200:
            self._reply.pass_on(response, body)
            return _DONE
        body = self._with_cached_tokens(body)
        self._reply.pass_on(response, body)
        counts = counts_in(body)
        if self._plan.path != REDERIVE:
            self._learn_prompt(counts)
        self._learn_counts(counts)
        return _DONE

    def _own_events(self, events: bytes) -> bytes:
        """Events of a stream that is not merged, but has a usage."""
        if self._plan.path == REDERIVE:
            return self._with_cached_tokens(events)
        self._learn_prompt(counts_in(events))
        return events

    def _with_cached_tokens(self, answer: bytes) -> bytes:
        """A decode worker's own answer, with the cached tokens of the worker that computed the prompt."""
        return with_details_of(self._usage_of_prefill, answer) if self._plan.path == REDERIVE else answer

    def _learn_prompt(self, counts: Counts | None) -> None:
        """From the worker that has computed it."""
        if counts is not None and counts.prompt_tokens is not None:
            self._size.learn(counts.prompt_tokens)
            self._selection.counted(counts.cached_tokens)

    def _learn_counts(self, counts: Counts | None) -> None:
        """From a whole answer."""
        if counts is not None and counts.completion_tokens is not None:
            self._learn_length(counts.completion_tokens)

    def _learn_length(self, tokens: int) -> None:
        client, booking = self._client, self._selection.booking
        if client.num_prompts == 1 and client.fields.view.n in (None, 1):
            self._context.output_lengths.learn(client.fields.model, tokens, client.fields.limit)
            if booking is not None:
                booking.generated = tokens

    async def _fail(self, step: Step) -> Ended:
        if step.reason:
            error = RequestError(self._plan.detail, status=step.status, kind=step.kind, reason=step.reason)
            self._reply.fail(error, retry_after=self._retry_after)
        else:
            self._reply.break_off(self._calls.body)
        return _DONE

    _PERFORM: ClassVar[dict[Do, Callable[["RequestHandler", Step], Awaitable[Ended]]]] = {
        Do.PLACE: _place,
        Do.CALL_PREFILL: _call_prefill,
        Do.CALL_DECODE: _call_decode,
        Do.SEND_FIRST_TOKEN: _send_first_token,
        Do.FINISH: _finish,
        Do.RELAY_STREAM: _relay_stream,
        Do.REPLY_MERGED: _reply_merged,
        Do.PASS_ON: _pass_on,
        Do.REPLY_ERROR: _fail,
        Do.BREAK_STREAM: _fail,
    }


def _computed(tokens: int, longest: int | None) -> int:
    """Prompt tokens that a worker computes: one that is far beyond the longest context is refused."""
    if longest is None or tokens <= longest:
        return tokens
    return longest if tokens < 2 * longest else 1
