"""Mixed storage, the scheduler's half: which blocks a step copies to host memory, and which it copies back.

Pure. ``scheduler_side`` asks it about every request. A prompt that is computed here looks for its blocks in vLLM's
prefix cache first, and then here; what is found here is loaded beside the running batch, like KV from the belt, and is
sent over the belt like any other. Its whole blocks are kept as soon as a step completes them. Those of an answer, and
of a prompt that came over the belt, are kept when the request ends: by then it is certain that they were computed.

A *place* has room for one block of every layer. The index of places is here; the bytes are in each worker's process
(``host_memory``), at the same places on every tensor-parallel rank.

Rules:

1. A worker copies in the order of the decisions made here. So a block can be found as soon as it has a place: the copy
   out of the place comes after the copy into it, and before the next one into it.
2. A prompt's last block is evicted before its first: without its head, a chain of hashes finds nothing.
3. Every place is in ``_places`` or in ``_free``, once.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvbelt.vllm.step_messages import HostCopy, ScheduledPrompt


class HostIndex:
    """Block hashes and the places of their blocks. The least recently used block is evicted first."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"room for {capacity} blocks")
        self.capacity = capacity
        self.num_evicted = 0  # since the start
        self._places: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first
        self._free: deque[int] = deque(range(capacity))

    def __len__(self) -> int:
        return len(self._places)

    def find(self, hashes: Sequence[bytes]) -> tuple[int, ...]:
        """The places of a prompt's blocks, from the first on, up to the first that has none."""
        places: list[int] = []
        for block_hash in hashes:
            place = self._places.get(block_hash)
            if place is None:
                break
            places.append(place)
        self._touch(hashes[: len(places)])
        return tuple(places)

    def keep(self, hashes: Sequence[bytes]) -> list[tuple[int, int]]:
        """Give each of a prompt's blocks, from the first on, a place; if all places are too few, the head alone.

        Returns:
            (number of the block in the prompt, place) of the blocks that had none.
        """
        hashes = hashes[: self.capacity]
        # First, so that no block of this prompt is evicted for another.
        self._touch(hashes)
        placed: list[tuple[int, int]] = []
        for number, block_hash in enumerate(hashes):
            if block_hash not in self._places:
                place = self._free.popleft() if self._free else self._evict()
                self._places[block_hash] = place
                placed.append((number, place))
        if placed:
            self._touch(hashes)
        return placed

    def forget(self, places: Iterable[int]) -> None:
        """Free places that were not written as commanded."""
        spoiled = set(places)
        for block_hash, place in list(self._places.items()):
            if place in spoiled:
                del self._places[block_hash]
                self._free.append(place)

    def clear(self) -> None:
        self._places.clear()
        self._free = deque(range(self.capacity))

    def check(self) -> None:
        """Assert rule 3."""
        assert sorted([*self._places.values(), *self._free]) == list(range(self.capacity))

    def _touch(self, hashes: Sequence[bytes]) -> None:
        for block_hash in reversed(hashes):
            if block_hash in self._places:
                self._places.move_to_end(block_hash)

    def _evict(self) -> int:
        _, place = self._places.popitem(last=False)
        self.num_evicted += 1
        return place


@dataclass(slots=True, eq=False)
class _Prompt:
    num_tokens: int
    hashes: tuple[bytes, ...]  #: of its whole blocks; none of a prompt that comes over the belt
    block_ids: list[int] = field(default_factory=list)
    computed: bool = False  #: a step has had it since its blocks were allocated, so they are loaded
    num_kept: int = 0  #: whole blocks that have a place
    loaded_tokens: int = 0
    read: bool = False  #: the worker was told to copy from its blocks, and may not have done so yet


@dataclass(frozen=True, slots=True)
class HostCommands:
    stopped: tuple[str, ...] = ()  #: preempted requests whose blocks were being copied
    copies: tuple[HostCopy, ...] = ()  #: that begin with the step, in this order
    keeps: tuple[HostCopy, ...] = ()  #: that begin after it


class HostScheduler:
    """Every request of one server that may use host memory."""

    def __init__(self, block_size: int, capacity: int) -> None:
        self._block_size = block_size
        self.index = HostIndex(capacity)
        # Totals since the start.
        self.tokens_asked = 0  # in whole blocks of all prompts
        self.tokens_loaded = 0  # from host memory, instead of being computed
        self.blocks_kept = 0
        self._prompts: dict[str, _Prompt] = {}
        self._copies: list[HostCopy] = []
        self.computing: set[str] = set()  #: requests whose prompt is not kept as a whole

    def __len__(self) -> int:
        return len(self._prompts)

    def on_new_request(self, request_id: str, num_tokens: int, hashes: tuple[bytes, ...] = ()) -> None:
        """A request has come, with the hashes of its prompt's whole blocks; without any, it looks for nothing here."""
        self._prompts[request_id] = _Prompt(num_tokens, hashes)
        self.tokens_asked += len(hashes) * self._block_size
        if hashes:
            self.computing.add(request_id)

    def loadable_tokens(self, request_id: str, num_computed_tokens: int) -> int:
        """How many tokens after the computed ones are here. The prompt's last token is always computed."""
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
        prompt.computed = False
        self._copies.append(HostCopy(request_id, tuple(block_ids[first : len(places)]), places[first:]))
        prompt.loaded_tokens += num_loaded_tokens
        self.tokens_loaded += num_loaded_tokens

    def take_step(self, scheduled: Iterable[ScheduledPrompt], preempted: Iterable[str]) -> HostCommands:
        """The commands for the step that has just been scheduled."""
        stopped = tuple(request_id for request_id in preempted if self._stop(request_id))
        # First: they were decided before the keeps, which may take their places.
        copies = tuple(self._copies)
        self._copies.clear()
        keeps: list[HostCopy] = []
        for step in scheduled:
            prompt = self._prompts.get(step.request_id)
            if prompt is None:
                continue
            prompt.computed = True
            if prompt.num_kept < len(prompt.hashes):
                keeps += self._keep(step, prompt)
        return HostCommands(stopped, copies, tuple(keeps))

    def _keep(self, step: ScheduledPrompt, prompt: _Prompt) -> list[HostCopy]:
        prompt.block_ids.extend(step.new_block_ids)
        whole = min((step.num_computed_tokens + step.num_scheduled_tokens) // self._block_size, len(prompt.hashes))
        if whole <= prompt.num_kept:
            return []
        prompt.num_kept = whole
        if whole == len(prompt.hashes):
            self.computing.discard(step.request_id)
        return self._place(step.request_id, prompt, prompt.hashes[:whole], prompt.block_ids)

    def _place(
        self, request_id: str, prompt: _Prompt, hashes: Sequence[bytes], block_ids: Sequence[int]
    ) -> list[HostCopy]:
        placed = self.index.keep(hashes)
        if not placed:
            return []
        self.blocks_kept += len(placed)
        prompt.read = True
        numbers, places = zip(*placed, strict=True)
        return [HostCopy(request_id, tuple(block_ids[number] for number in numbers), places, to_host=True)]

    def _stop(self, request_id: str) -> bool:
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return False
        # When the request is scheduled again, all its blocks are new.
        prompt.block_ids.clear()
        prompt.num_kept = 0
        prompt.computed = False
        if prompt.hashes:
            self.computing.add(request_id)
        read, prompt.read = prompt.read, False
        return read

    def on_finished(
        self, request_id: str, hashes: Sequence[bytes] = (), num_tokens: int = 0, block_ids: Sequence[int] = ()
    ) -> tuple[bool, int]:
        """The request is over: (its blocks may still be read, tokens that were loaded for it).

        Args:
            request_id: of the request.
            hashes: of its whole blocks, those of the answer among them.
            num_tokens: whose KV lies in its blocks. Those of the prompt at least, if something was generated.
            block_ids: of the request.
        """
        prompt = self._prompts.pop(request_id, None)
        self.computing.discard(request_id)
        if prompt is None:
            return False, 0
        if prompt.computed and num_tokens >= prompt.num_tokens:
            self._copies += self._place(request_id, prompt, hashes, block_ids)
        return prompt.read, prompt.loaded_tokens
