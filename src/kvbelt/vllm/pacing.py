"""What a vLLM server's steps cost, what it has to do now, and how much of a prompt its next step may carry. Pure.

vLLM schedules a step while the device computes the one before. So a step's work waits here for its output, in line;
the step took the time since the output before it, or since it was scheduled, if that was later: the device had nothing
to do until then.

A request that computes one token in a step costs what a decode costs, also if it is the last token of a prompt.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvbelt.pacing.costs import as_one_prompt
from kvbelt.pacing.learner import StepLearner
from kvbelt.wire.steps import StepsNow

#: Between two solutions of the learner's equations: one takes some 0.3 ms of vLLM's scheduler.
SOLVE_SECONDS = 0.25

#: Between two reports to the proxy, but for the one that says that there is nothing left to do.
REPORT_SECONDS = 0.1

#: vLLM has two steps on their way at most. If it should not tell of outputs, the line must not grow.
_LINE = 8

#: Prompt tokens, context, decodes, tokens of KV, as ``StepLearner.observe`` takes them.
_Work = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class StepLimits:
    block_size: int
    prompt_tokens: int  #: in one step
    requests: int  #: that run at once
    kv_tokens: int  #: that fit the KV memory


@dataclass(slots=True)
class _Prompt:
    length: int
    computed: int  #: tokens, or cached, or expected from another server
    generates: bool  #: its request goes on after its first token

    @property
    def missing(self) -> int:
        return self.length - self.computed


class Pacing:
    """One server's steps. ``clock`` gives seconds, from any origin."""

    def __init__(self, limits: StepLimits, clock: Callable[[], float]) -> None:
        self.level = 0.0  #: seconds between tokens that steps should keep; 0: any
        self.host_kv_tokens = 0  #: that fit host memory
        self._limits = limits
        self._clock = clock
        self._learner = StepLearner()
        self._costs = self._learner.costs
        self._solve_at = clock()
        self._line: deque[tuple[float, _Work | None]] = deque(maxlen=_LINE)  # steps on their way: when, and what
        self._ended = clock()  # when the last output came
        # Prompts that are not computed yet, by request: no step has computed any of it, or one has.
        self._waiting: dict[str, _Prompt] = {}
        self._begun: dict[str, _Prompt] = {}
        # As the step after the last one scheduled will find them.
        self._decodes = 0
        self._kv_tokens = 0
        self._told = self.now()  # the description says this
        self._told_busy = False
        self._tell_at = clock()

    def on_new_request(self, request_id: str, num_tokens: int, *, loads: bool, generates: bool) -> None:
        """A request has come with a prompt of so many tokens.

        Args:
            request_id: of the request.
            num_tokens: of its prompt.
            loads: another server sends the KV of all of them but the last.
            generates: it goes on after its first token.
        """
        self._waiting[request_id] = _Prompt(num_tokens, num_tokens - 1 if loads else 0, generates)

    def on_finished(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        self._begun.pop(request_id, None)

    def on_scheduled(
        self, tokens: Mapping[str, int], began: Mapping[str, int], ids: Sequence[str], computed: Sequence[int]
    ) -> None:
        """A step has been scheduled.

        Args:
            tokens: how many it computes, of each of its requests.
            began: of those that no step had computed before, how many are there already.
            ids: the others.
            computed: how many are there of each of the others.
        """
        if not tokens:
            self._decodes = self._kv_tokens = 0
            self._line.append((self._clock(), None))
            return
        # Sums, which are cheap, and no loop over requests but over those with a part of a prompt.
        num_tokens, kv_before = sum(tokens.values()), sum(computed) + sum(began.values())
        chunks: list[tuple[int, int]] = []
        if num_tokens > len(tokens):
            before = {**dict(zip(ids, computed, strict=True)), **began}
            chunks = [(count, before[request_id]) for request_id, count in tokens.items() if count > 1]
        prompt_tokens, context = as_one_prompt(chunks)
        kv_tokens = kv_before - sum(there for _, there in chunks)
        self._line.append((self._clock(), (prompt_tokens, context, len(tokens) - len(chunks), kv_tokens)))
        self._decodes, self._kv_tokens = len(tokens), kv_before + num_tokens
        for request_id, there in began.items():
            if (prompt := self._waiting.pop(request_id, None)) is not None:
                prompt.computed = there
                self._begun[request_id] = prompt
        for request_id, prompt in list(self._begun.items()):
            if request_id in tokens:
                prompt.computed += tokens[request_id]
                if prompt.missing > 0 or not prompt.generates:
                    self._decodes -= 1
                    self._kv_tokens -= prompt.computed
                if prompt.missing <= 0:
                    del self._begun[request_id]

    def on_output(self) -> None:
        """The output of the first step in line has come."""
        if not self._line:
            return
        scheduled, work = self._line.popleft()
        began, self._ended = max(scheduled, self._ended), self._clock()
        if work is None or self._ended <= began:
            return
        self._learner.observe(self._ended - began, *work)
        if self._ended >= self._solve_at:
            self._solve_at = self._ended + SOLVE_SECONDS
            self._costs = self._learner.costs

    def chunk_tokens(self) -> int:
        """The most that the next step may compute of each prompt, so that all of them keep the level; 0: any."""
        if not self.level or not self._decodes:
            return 0
        prompts = self._uncomputed()
        count = max(1, len(prompts))
        context = sum(prompt.computed for prompt in prompts) // count
        most = self._limits.prompt_tokens
        tokens = self._costs.prompt_tokens_within(self.level, context, self._decodes, self._kv_tokens, most)
        if tokens == most:
            return 0
        each, block = tokens // count, self._limits.block_size
        return each // block * block or max(each, 1)

    def _uncomputed(self) -> list[_Prompt]:
        return [one for prompts in (self._begun, self._waiting) for one in prompts.values() if one.missing > 1]

    def now(self) -> StepsNow:
        return StepsNow(
            costs=self._costs,
            prompt_tokens=sum(prompt.missing for prompt in self._uncomputed()),
            decodes=self._decodes,
            kv_tokens=self._kv_tokens,
            most_prompt_tokens=self._limits.prompt_tokens,
            most_requests=self._limits.requests,
            most_kv_tokens=self._limits.kv_tokens,
            host_kv_tokens=self.host_kv_tokens,
        )

    def take_report(self) -> StepsNow | None:
        """What the proxy is to be told with this step; None: nothing new, or it was told a moment ago."""
        now = self._clock()
        busy = bool(self._decodes or self._begun or self._waiting)
        if now < self._tell_at and (busy or not self._told_busy):
            return None
        steps = self.now()
        if steps == self._told:
            return None
        self._told, self._told_busy, self._tell_at = steps, busy, now + REPORT_SECONDS
        return steps
