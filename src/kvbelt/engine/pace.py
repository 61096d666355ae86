"""What the engine's steps cost, learnt from each, and what it has to do now."""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from kvbelt.engine.api import EngineSteps
from kvbelt.engine.blocks import BlockAllocator
from kvbelt.engine.scheduler import Chunk
from kvbelt.engine.sequence import Sequence, SequenceState
from kvbelt.engine.settings import EngineSettings
from kvbelt.pacing.costs import as_one_prompt
from kvbelt.pacing.learner import StepLearner

#: Between two solutions of the learner's equations: one takes some 0.7 ms of the engine's thread.
SOLVE_SECONDS = 0.25


class Pace:
    def __init__(self, settings: EngineSettings, allocator: BlockAllocator) -> None:
        self._settings = settings
        self._allocator = allocator
        self._learner = StepLearner()
        self._solve_at = float("-inf")
        self.costs = self._learner.costs  #: as of the last solution

    def observe(self, chunks: SequenceOf[Chunk], seconds: float, now: float) -> None:
        """Engine's thread: a step that computed ``chunks`` took ``seconds`` and has just ended."""
        if not chunks or seconds <= 0:
            return
        self._learner.observe(seconds, *work_of(chunks))
        if now >= self._solve_at:
            self._solve_at = now + SOLVE_SECONDS
            self.costs = self._learner.costs

    def now(self, sequences: Iterable[Sequence]) -> EngineSteps:
        """Any thread: the costs, and the work of these requests, which the engine's thread may be changing."""
        prompt_tokens = decodes = kv_tokens = 0
        for sequence in sequences:
            missing = self._missing(sequence)
            if missing > 1:
                prompt_tokens += missing
            elif sequence.state is SequenceState.RUNNING:
                decodes += 1
                kv_tokens += len(sequence.token_ids)
        return EngineSteps(
            costs=self.costs,
            prompt_tokens=prompt_tokens,
            decodes=decodes,
            kv_tokens=kv_tokens,
            most_prompt_tokens=self._settings.max_batch_tokens,
            most_requests=self._settings.max_running,
            most_kv_tokens=self._allocator.num_blocks * self._settings.block_size,
        )

    def _missing(self, sequence: Sequence) -> int:
        """Tokens that this engine has to compute: neither cached nor loaded from elsewhere."""
        known = sequence.computed
        if (incoming := sequence.incoming) is not None:
            known = max(known, incoming.num_tokens)
        if sequence.state is SequenceState.WAITING:
            known = max(known, len(self._allocator.cache.match(sequence.block_hashes)) * self._settings.block_size)
        return max(1, len(sequence.token_ids) - known)


def work_of(chunks: Iterable[Chunk]) -> tuple[int, int, int, int]:
    """A step's prompt tokens, their context, decodes, and tokens of KV that those read (``StepCosts.step_seconds``)."""
    prompts: list[tuple[int, int]] = []
    decodes = kv_tokens = 0
    for chunk in chunks:
        if chunk.length == 1:
            decodes += 1
            kv_tokens += chunk.start + 1
        else:
            prompts.append((chunk.length, chunk.start))
    return *as_one_prompt(prompts), decodes, kv_tokens
