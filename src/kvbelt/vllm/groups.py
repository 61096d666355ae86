"""Models with several groups of layers, each with blocks of its own: which of them cross, and in which order.

vLLM gives each group a block table, and all groups share the blocks: a block of one group's table has a row in every
tensor. So a prompt's blocks in the belt are those of one group of full attention, as with one group, and after them
those of the others (``wire.layout.KVLayout.windows``). A group with a sliding window sends only the blocks that vLLM
keeps when the prompt has been computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvbelt.vllm.step_messages import Load
from kvbelt.wire.layout import KVLayout, first_kept

BlocksT = TypeVar("BlocksT")

#: vLLM's block that stands where a request has none.
NULL_BLOCK = 0

_FULL = frozenset({"FullAttentionSpec", "MLAAttentionSpec"})
_WINDOW = "SlidingWindowSpec"
_STATE = "MambaSpec"


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a model: ``order`` has vLLM's numbers of them, as their blocks follow each other."""

    order: tuple[int, ...] = (0,)
    windows: tuple[int, ...] = ()  #: tokens of each but the first, which sees all; 0: so does it
    problem: str = ""  #: why the KV of this model cannot be moved

    @property
    def several(self) -> bool:
        return len(self.order) > 1

    def lead(self, each: Sequence[BlocksT]) -> BlocksT:
        """Of something for each of vLLM's groups, that of the first group."""
        return each[self.order[0]]

    def others(self, each: Sequence[BlocksT]) -> tuple[BlocksT, ...]:
        return tuple(each[number] for number in self.order[1:])


ONE_GROUP = Groups()


def groups_of(kv_cache_config: Any) -> Groups:
    """The groups of vLLM's ``KVCacheConfig``. One group of attention is taken as it is, and looked at later."""
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    kinds = [type(spec).__name__ for spec in specs]
    if len(specs) == 1:
        return Groups(problem="its layers keep a state and no KV") if kinds == [_STATE] else ONE_GROUP
    if problem := _problem(specs, kinds, getattr(kv_cache_config, "kv_cache_layout", None)):
        return Groups(problem=problem)
    first = next(number for number, kind in enumerate(kinds) if kind in _FULL)
    rest = [number for number in range(len(specs)) if number != first]
    # A draft model's layers may need more than the window; drafts with KV are refused (``refusals``).
    return Groups((first, *rest), tuple(_window(specs[number]) if kinds[number] == _WINDOW else 0 for number in rest))


def _window(sliding: Any) -> int:
    return int(sliding.sliding_window)


def _problem(specs: Sequence[Any], kinds: Sequence[str], layout: str | None) -> str:
    """Why blocks of several groups cannot be moved; empty if they can."""
    if other := next((kind for kind in kinds if kind not in _FULL and kind != _WINDOW), None):
        return f"of {len(specs)} kinds of KV cache one is {other}"
    if not _FULL.intersection(kinds):
        return f"each of its {len(specs)} kinds of KV cache has a window"
    if len({(spec.block_size, spec.page_size_bytes) for spec in specs}) > 1:
        sizes = ", ".join(f"{spec.block_size} tokens in {spec.page_size_bytes} bytes" for spec in specs)
        return f"blocks of its {len(specs)} kinds of KV cache differ: {sizes}"
    if layout is not None and not layout.startswith("LB"):
        return f"vLLM's KV cache layout is {layout}"
    return ""


def kept(num_tokens: int, block_size: int, windows: Sequence[int], others: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The blocks that the other groups send of a computed prompt."""
    end = -(-num_tokens // block_size)
    blocks: list[int] = []
    for window, block_ids in zip(windows, others, strict=True):
        blocks += block_ids[first_kept(num_tokens, window, block_size) : end]
    return tuple(blocks)


def to_fill(load: Load, layout: KVLayout, num_tokens: int) -> tuple[int, ...] | None:
    """Where everything goes that is sent of ``num_tokens`` tokens from block ``load.first`` on, group after group.

    What is not wanted goes into the block that no request reads. None: something is wanted that was not sent.
    """
    end = layout.end(num_tokens)
    blocks = [*load.block_ids, *[NULL_BLOCK] * (end - load.first - len(load.block_ids))]
    for window, block_ids in zip(layout.windows, load.others, strict=True):
        first = first_kept(num_tokens, window, layout.block_size)
        if any(block_ids[: max(first - load.first, 0)]):
            return None
        wanted = dict(enumerate(block_ids, load.first))
        blocks += [wanted.get(number, NULL_BLOCK) for number in range(first, end)]
    return tuple(blocks)
