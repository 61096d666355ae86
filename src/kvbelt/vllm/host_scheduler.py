"""Mixed storage, the scheduler's half: which blocks go to host memory with a step, and which come back from it.

Pure, as ``scheduler_side``, which asks this of every request whose prompt is computed here. A prompt's whole blocks are
kept as soon as a step completes them. A prompt that comes looks for its blocks in vLLM's prefix cache, then here; what
is found here is loaded beside the running batch, as KV from the belt is, and is sent over the belt like any other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvbelt.vllm.host_store import HostCounts, HostIndex
from kvbelt.vllm.orders import Keep, Restore, ScheduledPrompt


@dataclass(slots=True, eq=False)
class _Prompt:
    """One request's, from its coming to its end."""

    num_tokens: int
    hashes: tuple[bytes, ...]  #: of its whole blocks
    block_ids: list[int] = field(default_factory=list)
    looked_at: int = 0  #: whole blocks that were kept, or found kept
    loaded_tokens: int = 0
    read: bool = False  #: the worker was told to copy from its blocks, and has not yet said that it is done


class HostScheduler:
    """Every request of one server that may use host memory."""

    def __init__(self, block_size: int, capacity: int) -> None:
        self._block_size = block_size
        self.index = HostIndex(capacity)
        self.counts = HostCounts()
        self._prompts: dict[str, _Prompt] = {}
        self._restores: list[Restore] = []

    @property
    def num_requests(self) -> int:
        """Requests that have not finished."""
        return len(self._prompts)

    def on_new_request(self, request_id: str, num_tokens: int, hashes: tuple[bytes, ...]) -> None:
        """A request has come, with a prompt of so many tokens, whose whole blocks have these hashes."""
        self._prompts[request_id] = _Prompt(num_tokens, hashes)
        self.counts.tokens_asked += len(hashes) * self._block_size

    def loadable_tokens(self, request_id: str, num_computed_tokens: int) -> int:
        """How many tokens after the computed ones lie here; the prompt's last token is always left to compute."""
        prompt = self._prompts.get(request_id)
        if prompt is None or num_computed_tokens % self._block_size:
            return 0
        return max(len(self._found(prompt)) * self._block_size - num_computed_tokens, 0)

    def _found(self, prompt: _Prompt) -> tuple[int, ...]:
        return self.index.find(prompt.hashes[: (prompt.num_tokens - 1) // self._block_size])

    def on_allocated(self, request_id: str, block_ids: Sequence[int], num_loaded_tokens: int) -> None:
        """The request has its blocks; so many tokens are to be loaded into them."""
        prompt = self._prompts.get(request_id)
        if prompt is None or num_loaded_tokens == 0:
            return
        places = self._found(prompt)
        first = len(places) - num_loaded_tokens // self._block_size
        self._restores.append(Restore(request_id, tuple(block_ids[first : len(places)]), places[first:]))
        prompt.loaded_tokens += num_loaded_tokens
        self.counts.tokens_loaded += num_loaded_tokens

    def orders(
        self, scheduled: Iterable[ScheduledPrompt], preempted: Iterable[str]
    ) -> tuple[tuple[str, ...], tuple[Restore, ...], tuple[Keep, ...]]:
        """For the step that has just been scheduled: (requests whose blocks are taken away, loads, copies)."""
        stopped = tuple(request_id for request_id in preempted if self._stop(request_id))
        # Loads first: they were decided before the copies of this step, which may take their places.
        restores = tuple(self._restores)
        self._restores.clear()
        keeps: list[Keep] = []
        for step in scheduled:
            prompt = self._prompts.get(step.request_id)
            if prompt is not None and (keep := self._keep(step, prompt)) is not None:
                keeps.append(keep)
        return stopped, restores, tuple(keeps)

    def _keep(self, step: ScheduledPrompt, prompt: _Prompt) -> Keep | None:
        if prompt.looked_at == len(prompt.hashes):
            return None
        prompt.block_ids.extend(step.new_block_ids)
        whole = min((step.num_computed_tokens + step.num_scheduled_tokens) // self._block_size, len(prompt.hashes))
        if whole <= prompt.looked_at:
            return None
        prompt.looked_at = whole
        evicted = self.index.evicted
        placed = self.index.keep(prompt.hashes[:whole])
        self.counts.blocks_evicted += self.index.evicted - evicted
        self.counts.blocks_kept += len(placed)
        if not placed:
            return None
        prompt.read = True
        blocks = tuple(prompt.block_ids[number] for number, _ in placed)
        return Keep(step.request_id, blocks, tuple(place for _, place in placed))

    def _stop(self, request_id: str) -> bool:
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return False
        # When it comes back, it says again which blocks it has, all of them.
        prompt.block_ids.clear()
        prompt.looked_at = 0
        read, prompt.read = prompt.read, False
        return read

    def on_spoiled(self, places: Iterable[int]) -> None:
        """A worker could not copy into these."""
        self.index.forget(places)

    def on_finished(self, request_id: str) -> tuple[bool, int]:
        """The request is over: (its blocks may still be read, tokens that were loaded for it)."""
        prompt = self._prompts.pop(request_id, None)
        return (prompt.read, prompt.loaded_tokens) if prompt is not None else (False, 0)
