"""What each worker holds of a prompt, learnt from the prompts that were sent to it. Pure.

A prompt is cut into blocks of bytes, at the same places in every prompt. A block's hash covers everything before it, so
equal hashes mean equal beginnings. A prompt of 30 KB has 9 blocks, one of 1 MB has 20: later blocks are longer.

What comes after a prompt's last whole block is its rest, a block as well. The answer's tokens count with it: the next
turn of a conversation begins with the former prompt and the answer that a worker has generated to it. A rest is found
where a message ends, or at the lengths that the latest prompts had there.

A worker is believed to hold what was sent to it last, up to its bound, which is its KV capacity at most. When a worker
had to compute what it was believed to hold, its bound becomes half of that; when it was believed rightly, the bound
grows. So a worker without a prefix cache is soon believed to hold nothing.
"""

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from itertools import pairwise

from xxhash import xxh3_64_intdigest as hash_of

#: Bytes of the first blocks. A later one has at most half of the bytes before it.
BLOCK = 1024

#: Workers that a look-up names: those that hold most.
MOST_NAMED = 8

#: Prompts that are remembered of all workers together; each has an equal share.
MOST_PROMPTS = 1 << 15

#: Tokens that fit a worker that does not say how many do.
DEFAULT_CAPACITY = 1 << 20

#: A worker whose bound has fallen below so many tokens has no prefix cache, as far as can be seen.
LEAST_BOUND = 256

_GROWTH = 1.25

_BLANKS = b" \t\r\n"  # in JSON

#: Rests after one block that can be found: those of the latest prompts.
_RESTS = 4

#: The end of a message that another one follows. Inside a text the quotes would be escaped.
_MESSAGE_END = re.compile(rb'\}(?=\s*,\s*\{\s*"(?:role|content)")')

#: Ends of messages, the last ones, at which a rest is looked for.
_MESSAGES = 4

#: Bytes after a message's end that tell it.
_TELLING = 32


def _ends() -> Iterator[int]:
    end = 0
    while end < 1 << 28:
        end += max(BLOCK, 1 << (end // 2).bit_length() >> 1)
        yield end


_ENDS = (0, *_ends())  # of the first block, of the second ...
_CUTS = tuple(slice(start, end) for start, end in pairwise(_ENDS))


class Prefix:
    """A prompt, as it is compared with others.

    Args:
        prompt: a prompt or an array of messages, as JSON.
        tokens: its length.
        beside: everything else that must be equal before two prompts share KV.
    """

    __slots__ = ("blocks", "per_byte", "prompt", "root", "size")

    def __init__(self, prompt: bytes | memoryview, tokens: int, beside: bytes = b"") -> None:
        # A view: copies of long prompts would be kept for as long as their requests.
        self.prompt = view = memoryview(prompt)
        self.per_byte = tokens / len(view)
        size = len(view) - 1  # a longer prompt goes on where the quote or bracket at the end is
        while size > 1 and view[size - 1] in _BLANKS:
            size -= 1
        whole = bisect_right(_ENDS, size) - 1
        self.root = chained = hash_of(beside)
        blocks = []
        for cut in _CUTS[:whole]:
            chained = hash_of(view[cut], chained)
            blocks.append(chained)
        blocks.append(hash_of(view[_ENDS[whole] : size], chained))
        self.blocks = blocks  #: their hashes; the last one's is the rest's
        self.size = size  #: bytes of all of them

    @property
    def is_chat(self) -> bool:
        return self.prompt[:2].tobytes() == b"[{"

    def ends_after(self, whole: int) -> Iterator[int]:
        """Bytes from the first ``whole`` blocks to the ends of messages in the next block."""
        start = _ENDS[whole]
        most = min(_ENDS[whole + 1], self.size) - start
        window = self.prompt[start : start + most + _TELLING]
        ends = [found.end() for found in _MESSAGE_END.finditer(window)]
        return (end for end in ends[-_MESSAGES:] if end <= most)

    def tokens_like(self, other: "Prefix") -> int:
        """Tokens with which both begin, as far as blocks tell."""
        alike = 0
        for mine, theirs in zip(self.blocks, other.blocks, strict=False):
            if mine != theirs:
                break
            alike += 1
        return int((self.size if alike == len(self.blocks) else _ENDS[alike]) * self.per_byte)


class _Worker:
    __slots__ = (
        "answer_tokens", "answers", "bit", "blocks", "bound", "capacity", "counts", "incarnation", "num_bytes",
        "per_byte", "promised", "prompts",
    )  # fmt: skip

    def __init__(self, incarnation: str, number: int) -> None:
        self.incarnation = incarnation
        self.bit = 1 << number
        self.capacity = self.bound = 0
        self.counts = False  # whether it has ever said what it had cached
        self.prompts: deque[tuple[int, list[int], int]] = deque()  # as they were sent: when, blocks, bytes
        self.blocks: dict[int, int] = {}  # of all of them: when each was used last
        self.promised: set[int] = set()  # those of prompts that have not been answered
        self.num_bytes = 0  # of all blocks
        self.answers: dict[int, int] = {}  # tokens, by the rest of the prompt
        self.answer_tokens = 0
        self.per_byte = 0.0  # tokens; of the latest prompts

    @property
    def tokens(self) -> int:
        return int(self.num_bytes * self.per_byte) + self.answer_tokens


class Prefixes:
    """The prompts of every worker.

    A worker that holds a block holds everything before it: each use of a block is a use of those as well.

    Attributes:
        useful: whether there are workers to choose among.
    """

    def __init__(self) -> None:
        self.useful = False
        self._workers: dict[str, _Worker] = {}
        self._numbered: list[_Worker | None] = []
        self._caching = 0  # workers with a prefix cache
        self._holders: dict[int, int] = {}  # bits of workers, by block
        self._rests: dict[int, tuple[int, ...]] = {}  # their lengths in bytes, by the block before
        self._clock = 0
        self._turn = 0

    # Workers

    def join(self, incarnation: str, capacity: int | None = None) -> None:
        """The worker is there, and has room for so many tokens. May be called again."""
        tokens = DEFAULT_CAPACITY if capacity is None else capacity
        worker = self._workers.get(incarnation)
        if worker is None:
            if None not in self._numbered:
                self._numbered.append(None)
            number = self._numbered.index(None)
            worker = self._workers[incarnation] = self._numbered[number] = _Worker(incarnation, number)
        if worker.capacity != tokens:
            worker.capacity = tokens
            self._set_bound(worker, tokens)

    def leave(self, incarnation: str) -> None:
        """This incarnation has ended, with everything it held."""
        worker = self._workers.pop(incarnation, None)
        if worker is not None:
            self._set_bound(worker, 0)
            self._numbered[worker.bit.bit_length() - 1] = None

    def _set_bound(self, worker: _Worker, tokens: int) -> None:
        self._caching += (tokens >= LEAST_BOUND) - (worker.bound >= LEAST_BOUND)
        self.useful = self._caching > 0 and len(self._workers) > 1
        worker.bound = tokens
        self._fit(worker)

    # Prompts

    def held(self, prefix: Prefix) -> dict[str, int]:
        """Tokens of the prompt that workers hold, by incarnation."""
        masks: list[int] = []
        for block in prefix.blocks[:-1]:
            mask = self._holders.get(block, 0)
            if not mask:
                break
            masks.append(mask)
        if not masks and not prefix.is_chat:
            return {}
        named, seen = self._held_with_rest(prefix, len(masks))
        for whole in range(len(masks), 0, -1):
            fresh = masks[whole - 1] & ~seen
            if fresh:
                seen |= fresh
                tokens = int(_ENDS[whole] * prefix.per_byte)
                for worker in self._some(fresh, MOST_NAMED - len(named)):
                    named[worker.incarnation] = tokens
                if len(named) >= MOST_NAMED:
                    break
        return named

    def _held_with_rest(self, prefix: Prefix, whole: int) -> tuple[dict[str, int], int]:
        """The same for workers that hold more than the ``whole`` first blocks; and the workers' bits."""
        named: dict[str, int] = {}
        seen = 0
        last, end = prefix.blocks[whole - 1] if whole else prefix.root, _ENDS[whole]
        for length in sorted({*self._rests.get(last, ()), *prefix.ends_after(whole)}, reverse=True):
            rest = hash_of(prefix.prompt[end : end + length], last)
            fresh = self._holders.get(rest, 0) & ~seen
            seen |= fresh
            tokens = int((end + length) * prefix.per_byte)
            for worker in self._some(fresh, MOST_NAMED - len(named)):
                named[worker.incarnation] = tokens + worker.answers.get(rest, 0)
        return named, seen

    def _some(self, mask: int, most: int) -> Iterator[_Worker]:
        """At most so many of these workers; if there are more, each time others."""
        turn = 0
        if mask.bit_count() > most:
            self._turn = turn = (self._turn + most) % len(self._numbered)
        for part in (mask >> turn << turn, mask & (1 << turn) - 1):
            left = part
            while left and most > 0:
                lowest = left & -left
                left ^= lowest
                most -= 1
                worker = self._numbered[lowest.bit_length() - 1]
                assert worker is not None
                yield worker

    def sent(self, prefix: Prefix, incarnation: str) -> int:
        """The worker will hold this prompt.

        Returns:
            The tokens that it should have held already, those of prompts that it has not answered left out.
        """
        worker, blocks = self._workers.get(incarnation), prefix.blocks
        short = len(blocks) == 1
        if worker is None or worker.bound < LEAST_BOUND or (short and not prefix.is_chat):
            return 0
        self._clock = now = self._clock + 1
        before = len(worker.blocks)
        worker.blocks.update(dict.fromkeys(blocks, now))
        known = len(blocks) - (len(worker.blocks) - before)
        settled = known
        if not worker.promised.isdisjoint(blocks):
            settled = next(i for i, block in enumerate(blocks) if block in worker.promised)
        new = blocks[known:]
        if new:
            worker.num_bytes += prefix.size - _ENDS[known]
            worker.promised.update(new)
            self._add_holder(worker, new)
            if not short:
                self._remember_rest(blocks[-2], prefix.size - _ENDS[len(blocks) - 1])
        worker.per_byte += (prefix.per_byte - worker.per_byte) / (16 if worker.prompts else 1)
        worker.prompts.append((now, blocks, prefix.size))
        self._fit(worker)
        if short:
            return 0  # it may be shorter than a worker's blocks
        return int((prefix.size if settled == len(blocks) else _ENDS[settled]) * prefix.per_byte)

    def _remember_rest(self, before: int, length: int) -> None:
        lengths = self._rests.get(before, ())
        if length not in lengths:
            self._rests[before] = (length, *lengths[: _RESTS - 1])

    def _add_holder(self, worker: _Worker, blocks: list[int]) -> None:
        """``blocks`` are those of one prompt from one on: if the first has no holder, none of them has."""
        holders, bit = self._holders, worker.bit
        if blocks[0] not in holders:
            holders.update(dict.fromkeys(blocks, bit))
        else:
            for block in blocks:
                holders[block] = holders.get(block, 0) | bit

    def answered(self, prefix: Prefix, incarnation: str) -> None:
        """The worker has computed the prompt."""
        worker = self._workers.get(incarnation)
        if worker is not None:
            worker.promised.difference_update(prefix.blocks)

    def counted(self, prefix: Prefix, incarnation: str, believed: int, cached: int | None) -> None:
        """The worker has told the counts of an answer.

        Args:
            prefix: the prompt.
            incarnation: the worker's.
            believed: what ``sent`` returned.
            cached: the prompt's tokens that it did not have to compute; None: it does not say. Some vLLM servers do
                not if there were none.
        """
        worker = self._workers.get(incarnation)
        if worker is None:
            return
        if cached is None:
            if not worker.counts:
                return
            cached = 0
        worker.counts = True
        prompt = int(prefix.size * prefix.per_byte)
        if 2 * cached < believed:
            half = worker.tokens // 2
            self._set_bound(worker, half if half > prompt else 0)
        elif cached > 0 and worker.bound < worker.capacity:
            self._set_bound(worker, min(worker.capacity, max(int(_GROWTH * worker.bound), 2 * prompt)))

    def generated(self, prefix: Prefix, incarnation: str, tokens: int) -> None:
        """The worker holds so many tokens of the answer, too."""
        worker, rest = self._workers.get(incarnation), prefix.blocks[-1]
        if worker is not None and rest in worker.blocks:
            worker.answer_tokens += tokens - worker.answers.get(rest, 0)
            worker.answers[rest] = tokens
            self._fit(worker)

    def _fit(self, worker: _Worker) -> None:
        """Forget the prompts that do not fit the worker's bounds, the oldest first."""
        most = MOST_PROMPTS // max(1, len(self._workers))
        while worker.prompts and (worker.tokens > worker.bound or len(worker.prompts) > most):
            when, blocks, size = worker.prompts.popleft()
            for kept, block in enumerate(blocks):
                if worker.blocks[block] == when:  # neither this one nor one after it was used later
                    worker.num_bytes -= size - _ENDS[kept]
                    self._forget(worker, blocks[kept:])
                    break

    def _forget(self, worker: _Worker, blocks: list[int]) -> None:
        """The last blocks of a prompt."""
        worker.promised.difference_update(blocks)
        worker.answer_tokens -= worker.answers.pop(blocks[-1], 0)
        for block in blocks:
            del worker.blocks[block]
            left = self._holders[block] ^ worker.bit
            if left:
                self._holders[block] = left
            else:
                del self._holders[block]
                self._rests.pop(block, None)
