"""The engine: one thread that turns requests into tokens.

Only the engine's thread changes state. Other threads *post* commands: a request, an abort, the end of a hold or of a
load. The thread runs the posted commands, plans a step (scheduler), starts loads of incoming KV beside it (loading),
runs the step (model), draws tokens (sampling), and calls the clients (answer). With nothing to compute, it sleeps until
the next post.

Invariants, checked by ``validate`` in tests:

1. A request is in ``_live`` from its submission to its last output, and gets exactly one output with a finish reason.
2. Its ``incoming`` is released exactly once, and its ``outgoing`` gets ``finished`` exactly once, however it ends.
3. Every block has as many users as there are tables, unreleased holds and loads under way that name it.
4. An exception inside a step ends the requests of that step with ERROR, and no others.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial

import torch

from kvbelt.engine.answer import Answer
from kvbelt.engine.api import (
    EngineLoad,
    EngineSteps,
    FinishReason,
    GenerationRequest,
    InvalidRequestError,
    ModelError,
    Output,
)
from kvbelt.engine.batch import Batch
from kvbelt.engine.grammar import Grammars
from kvbelt.engine.live import Live
from kvbelt.engine.loading import Loaders
from kvbelt.engine.model import PagedModel
from kvbelt.engine.outgoing import Holds
from kvbelt.engine.pace import Pace
from kvbelt.engine.pool import KVPool
from kvbelt.engine.sampling import Sampled
from kvbelt.engine.scheduler import Chunk, Load, Scheduler, StepPlan, place_of
from kvbelt.engine.sequence import Sequence
from kvbelt.engine.settings import EngineSettings
from kvbelt.engine.sizing import bound_length, choose_device, choose_dtype, count_blocks
from kvbelt.engine.text import Decoder
from kvbelt.engine.validate import check_request
from kvbelt.fingerprint import fingerprint

_log = logging.getLogger("kvbelt.engine")


class Engine:
    """Continuous batching over one model. All methods may be called from any thread.

    The constructor loads the model and allocates the KV memory.

    Raises:
        ModelError: the folder cannot be served, or the KV memory cannot hold what was asked for.
    """

    def __init__(self, settings: EngineSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self._clock = clock
        device = choose_device(settings)
        self._model = PagedModel(settings.model_dir, device, choose_dtype(settings, device), settings.max_model_len)
        self.tokenizer = self._model.tokenizer
        self.layout = self._model.layout(settings.block_size)
        self.pool = KVPool(
            self.layout, count_blocks(settings, self.layout.num_layers * self.layout.block_bytes, device), device
        )
        self.model_name = settings.model_dir.resolve().name
        try:
            #: Of the folder's contents, and of what has been chosen beside them.
            self.fingerprint = fingerprint(settings.model_dir) + self._model.variant
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"the model in {settings.model_dir} cannot be fingerprinted: {error}") from error
        self.max_model_len = bound_length(settings, self._model.context, self.pool.num_blocks * settings.block_size)
        self.vocab_size = self._model.vocab_size
        self.eos_token_ids = self._model.eos_token_ids
        self._decoder = Decoder(self.tokenizer)
        self.grammars = Grammars(self.tokenizer, self.vocab_size, self.eos_token_ids)
        self._scheduler = Scheduler(
            self.pool.allocator,
            block_size=settings.block_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_running=settings.max_running,
        )
        self._pace = Pace(settings, self.pool.allocator)
        self._loaders = Loaders(self.pool.allocator, clock, self._post, self._on_loaded)
        self._live: dict[str, Live] = {}
        self._holds = Holds(self.pool.allocator, self._post)
        self._arrivals = 0
        self._prompt_tokens_total = 0
        self._generated_tokens_total = 0
        self._busy_seconds_total = 0.0
        self._steps_total = 0
        self._posted: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvbelt-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Its outputs come through ``request.on_output`` on the engine's thread.

        Raises:
            InvalidRequestError: it can never be served. None of its callbacks is called.
            ValueError: its block hashes do not match this engine's block size.
            RuntimeError: the engine is closed.
        """
        check_request(request, self.vocab_size, self.max_model_len)
        full_blocks = len(request.prompt_token_ids) // self.layout.block_size
        if request.prefix is not None and len(request.prefix.hashes) != full_blocks:
            raise ValueError(f"{len(request.prefix.hashes)} block hashes of a prompt with {full_blocks} full blocks")
        # The logits of cached tokens are not known.
        shares = self.settings.prefix_caching and request.sampling.prompt_logprobs is None
        request = replace(
            request,
            prefix=request.prefix if shares else None,
            itl_seconds=request.itl_seconds or self.settings.itl_seconds,
        )
        room = self.max_model_len - len(request.prompt_token_ids)
        max_tokens = min(request.sampling.max_tokens or room, room)  # it is at least 1
        answer = Answer(request, self._decoder, self.eos_token_ids, max_tokens)
        seed = request.sampling.seed
        with self._wake:
            if self._closing:
                raise RuntimeError("the engine is closed")
            if request.request_id in self._live:
                raise InvalidRequestError(
                    f"a request {request.request_id!r} is under way; request ids must be unique", param="request_id"
                )
            self._arrivals += 1
            live = Live(
                Sequence(request, place_of(self._arrivals, request.turn), max_tokens),
                answer,
                secrets.randbits(63) if seed is None else seed,
                self._clock(),
            )
            self._live[request.request_id] = live
            self._posted.append(partial(self._scheduler.add, live.sequence))
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """End a request with ABORT. Unknown and finished requests are ignored."""
        self._post(partial(self._abort, request_id))

    def held(self, hashes: SequenceOf[bytes]) -> int:
        """How many of these blocks, from the first on, are cached. They count as used now, but are not pinned."""
        return self.pool.allocator.cache.held(hashes)

    def load(self) -> EngineLoad:
        running = len(self._scheduler.running)
        return EngineLoad(
            running=running,
            waiting=max(0, len(self._live) - running),
            loading=len(self._scheduler.loading),
            blocks_total=self.pool.num_blocks,
            blocks_free=self.pool.allocator.num_free,
            blocks_cached=len(self.pool.allocator.cache),
            preemptions_total=self._scheduler.preemptions_total,
            prompt_tokens_total=self._prompt_tokens_total,
            generated_tokens_total=self._generated_tokens_total,
            cache_query_tokens_total=self._scheduler.cache_queries_total,
            cache_hit_tokens_total=self._scheduler.cache_hits_total,
            busy_seconds_total=self._busy_seconds_total,
            steps_total=self._steps_total,
        )

    def steps(self) -> EngineSteps:
        """What its steps cost, and what they have to do now."""
        with self._wake:
            sequences = [live.sequence for live in self._live.values()]
        return self._pace.now(sequences)

    def close(self) -> None:
        """End every request with ABORT and stop the thread. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is None:
            self._run()  # it never started, so only queued requests have to end
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def validate(self) -> None:
        """Assert the invariants. Only while no step runs."""
        self._scheduler.validate()
        self.pool.allocator.validate(
            [
                *(sequence.block_ids for sequence in self._scheduler.running + self._scheduler.loading),
                *self._holds.block_ids(),
                *self._loaders.block_ids(),
            ]
        )

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._posted.append(command)
            self._wake.notify()

    # The engine's thread.

    def _run(self) -> None:
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)  # OpenMP keeps the number for each thread
        idle = True
        with torch.inference_mode():
            while True:
                with self._wake:
                    # Idle means that no step is possible before the next post.
                    while idle and not self._posted and not self._closing:
                        self._wake.wait()
                    posted, self._posted = self._posted, []
                    closing = self._closing
                for command in posted:
                    command()
                if closing:
                    break
                began = self._clock()
                computed = self._step()
                idle = computed is None
                if computed is not None:
                    ended = self._clock()
                    self._busy_seconds_total += ended - began
                    self._steps_total += 1
                    self._pace.observe(computed, ended - began, ended)
            for live in list(self._live.values()):
                self._end(live, FinishReason.ABORT)
            self._loaders.close()
            with self._wake:
                posted, self._posted = self._posted, []
            for command in posted:  # the ends of loads, and posts that came too late to matter
                command()

    def _step(self) -> SequenceOf[Chunk] | None:
        """Plan and run one step. Returns what it computed; None: there was nothing to do."""
        try:
            plan = self._scheduler.schedule(self._pace.costs)
            self._admit(plan)
        except Exception as error:  # noqa: BLE001 - a bug here must not leave every request hanging
            _log.exception("planning a step failed")
            self._fail(list(self._live.values()), error)
            return ()
        if not plan.chunks:
            return () if plan.preempted else None
        lives = [self._live[chunk.sequence.request.request_id] for chunk in plan.chunks]
        try:
            sampled = self._compute(plan, lives)
        except Exception as error:  # noqa: BLE001 - rule 4
            _log.exception("a step of %d requests failed", len(lives))
            self._fail(lives, error)
            return ()
        for live, result in sampled:
            try:
                self._deliver(live, result)
            except Exception as error:  # noqa: BLE001 - rule 4
                _log.exception("request %s: its token could not be delivered", live.request.request_id)
                self._fail([live], error)
        return plan.chunks

    def _fail(self, lives: list[Live], error: Exception) -> None:
        for live in lives:
            self._end(live, FinishReason.ERROR, error=f"the engine failed: {error}")

    def _admit(self, plan: StepPlan) -> None:
        """New requests have their blocks: start the loads of incoming KV."""
        for sequence in plan.admitted:
            live = self._live[sequence.request.request_id]
            if live.started is None:
                live.started = self._clock()
            if sequence.lost is not None and not sequence.preemptions:
                _log.warning(
                    "request %s: incoming KV is lost (%s); computing it", live.request.request_id, sequence.lost
                )
            if sequence.incoming is None:
                self._release_incoming(live)
        for load in plan.loads:
            self._live[load.sequence.request.request_id].incoming_released = True  # the load does it
            ready = None
            if self._model.device.type == "cuda":
                # An earlier step may still be writing blocks that have been given back since.
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record()
            self._loaders.start(load, ready)

    def _on_loaded(self, load: Load, seconds: float, lost: str | None) -> None:
        self._scheduler.loaded(load, lost)
        live = self._live.get(load.sequence.request.request_id)
        if live is not None and live.sequence is load.sequence:
            live.load_seconds = seconds

    def _compute(self, plan: StepPlan, lives: list[Live]) -> list[tuple[Live, Sampled]]:
        batch = Batch(plan.chunks, lives, self.pool)
        logits = batch.forward(self._model)
        for chunk in plan.chunks:
            end = chunk.start + chunk.length
            self._prompt_tokens_total += max(0, min(end, chunk.sequence.prompt_len) - chunk.start)
            self._scheduler.computed(chunk)
        return batch.sample(logits)

    def _deliver(self, live: Live, sampled: Sampled) -> None:
        if sampled.token_id is None:
            self._end(live, FinishReason.ERROR, error="the model's logits are NaN, or no token may come next")
            return
        if live.request.grammar is not None:
            live.request.grammar.accept(sampled.token_id)
        first = live.first_token is None
        if first:
            live.first_token = self._clock()
        live.sequence.token_ids.append(sampled.token_id)
        self._generated_tokens_total += 1
        output = live.answer.push(sampled)
        if first and live.request.sampling.prompt_logprobs is not None:
            output = replace(output, prompt_logprobs=live.answer.of_prompt(live.prompt_reports))
        if first or output.finish_reason is not None:
            output = replace(output, timing=live.timing())
        if output.finish_reason is not None:
            self._retire(live)
            self._output(live, output)
        elif not self._output(live, output):
            self._retire(live)

    def _abort(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None:
            self._end(live, FinishReason.ABORT)

    def _end(self, live: Live, reason: FinishReason, error: str | None = None) -> None:
        """End a request without another token."""
        self._retire(live)
        output = Output(live.request.request_id, (), "", finish_reason=reason, error=error, timing=live.timing())
        self._output(live, output)

    def _retire(self, live: Live) -> None:
        """Free everything that the request has: its place, its blocks, its incoming and outgoing KV."""
        sequence = live.sequence
        self._scheduler.remove(sequence)
        with self._wake:
            del self._live[sequence.request.request_id]
        self._release_incoming(live)
        self._loaders.cancel(sequence.arrival)
        block_ids, sequence.block_ids = sequence.block_ids, []
        outgoing = sequence.request.outgoing
        if outgoing is None:
            self.pool.allocator.release(block_ids)
            return
        prompt_blocks = self.layout.blocks(sequence.prompt_len)
        self.pool.allocator.release(block_ids[prompt_blocks:])
        hold = self._holds.take_over(block_ids[:prompt_blocks])
        complete = live.announced == prompt_blocks and not live.outgoing_broken
        try:
            outgoing.finished(hold, complete=complete)
        except Exception:  # noqa: BLE001 - the consumer is not the engine's code
            _log.exception("request %s: outgoing KV failed at the end", sequence.request.request_id)
            hold.release()

    def _release_incoming(self, live: Live) -> None:
        incoming = live.request.incoming
        if incoming is None or live.incoming_released:
            return
        live.incoming_released = True
        with contextlib.suppress(Exception):
            incoming.release()

    def _output(self, live: Live, output: Output) -> bool:
        try:
            live.request.on_output(output)
        except Exception:  # noqa: BLE001 - the callback is not the engine's code
            _log.exception("request %s: the client's callback failed; the request is dropped", output.request_id)
            return False
        return True
