"""vLLM's KV tensors as rows of bytes: one row is one whole block of one layer.

The order of keys and values inside a row depends on the attention backend (on CPU, K is transposed). The handshake
compares it as ``order``; it is never interpreted.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kvbelt.errors import StartError

log = logging.getLogger("kvbelt.vllm")

_NAMES = ("blocks", "heads", "tokens", "content")

#: Backends that keep each token's keys and values together. On a CPU a block has its keys transposed.
_TOKENS_APART = frozenset({"FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"})

_LAYER_NUMBER = re.compile(r"\.(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class Pages:
    """A model's KV memory.

    Attributes:
        rows: one tensor a layer, ``uint8 [num_blocks, block_bytes]``, over vLLM's own memory.
        layer_of: vLLM's name of a layer to its place in ``rows``; layers that share memory share the place.
        order: backend, type and dimensions of a block, for the handshake; all of them where layers differ.
        head_runs, tokens_outside, draft_layers: of ``wire.layout.KVLayout``.
        draft_order: of the drafter's layers, as ``order``.
    """

    rows: list[torch.Tensor]
    layer_of: dict[str, int]
    order: str
    head_runs: int = 0
    tokens_outside: bool = False
    draft_layers: int = 0
    draft_order: str = ""

    def sharing(self, group_of: Mapping[str, int]) -> list[int]:
        """How many groups have a layer at each place; ``group_of`` a layer is the first where it is not named."""
        groups: list[set[int]] = [set() for _ in self.rows]
        for name, place in self.layer_of.items():
            groups[place].add(group_of.get(name, 0))
        return [len(each) for each in groups]


def pages_of(
    kv_caches: Mapping[str, torch.Tensor], num_blocks: int, block_bytes: int, backend: str, num_kv_heads: int = 0
) -> Pages:
    """View the tensors that vLLM registers. ``num_kv_heads``: in each; 0: it does not matter.

    Raises:
        StartError: a layer's blocks are not each one run of ``block_bytes`` bytes.
    """
    rows: list[torch.Tensor] = []
    layer_of: dict[str, int] = {}
    place_of_address: dict[int, int] = {}
    orders: dict[str, None] = {}
    cuts: set[tuple[int, bool]] = set()
    for name in sorted(kv_caches, key=_in_model_order):
        tensor = kv_caches[name]
        if not isinstance(tensor, torch.Tensor):
            raise StartError(
                f"layer {name} keeps its state in a {type(tensor).__name__}; only attention KV can be moved"
            )
        row, address = _rows(name, tensor, num_blocks, block_bytes), tensor.data_ptr()
        dimensions, head_runs, tokens_outside = _inside(tensor, num_blocks, num_kv_heads)
        orders[f"{backend} {tensor.dtype} {dimensions}".replace("torch.", "")] = None
        cuts.add((head_runs, tokens_outside and backend in _TOKENS_APART))
        if address not in place_of_address:
            place_of_address[address] = len(rows)
            rows.append(row)
        layer_of[name] = place_of_address[address]
    if not rows:
        raise StartError("vLLM has registered no KV cache; a model without attention cannot be disaggregated")
    return Pages(rows, layer_of, "; ".join(orders), *(cuts.pop() if len(cuts) == 1 else (0, False)))


def with_drafter(
    pages: Pages, kv_caches: Mapping[str, torch.Tensor], num_blocks: int, backend: str, num_kv_heads: int
) -> Pages:
    """The same, followed by the layers of a drafter as far as their blocks are like the others'."""
    place_of_address = {row.data_ptr(): place for place, row in enumerate(pages.rows)}
    shared = {name: place_of_address.get(tensor.data_ptr()) for name, tensor in kv_caches.items()}
    layer_of = pages.layer_of | {name: place for name, place in shared.items() if place is not None}
    own = {name: tensor for name, tensor in kv_caches.items() if shared[name] is None}
    pages = replace(pages, layer_of=layer_of)
    if not own:
        return pages
    first, block_bytes = len(pages.rows), pages.rows[0].shape[1]
    try:
        more = pages_of(own, num_blocks, block_bytes, backend, num_kv_heads)
    except StartError as error:
        log.warning("the drafter's KV does not travel, so fewer drafts are accepted: %s", error)
        return pages
    if (more.head_runs, more.tokens_outside) != (pages.head_runs, pages.tokens_outside):
        log.warning("the drafter's KV does not travel, so fewer drafts are accepted: its blocks are %s", more.order)
        return pages
    return replace(
        pages,
        rows=[*pages.rows, *more.rows],
        layer_of=layer_of | {name: first + place for name, place in more.layer_of.items()},
        draft_layers=len(more.rows),
        draft_order=more.order,
    )


def _inside(tensor: torch.Tensor, num_blocks: int, num_kv_heads: int) -> tuple[str, int, bool]:
    """The dimensions of a block in words, and how it can be cut: ``head_runs`` and ``tokens_outside``.

    Named ``[blocks, heads, tokens, content]`` vLLM's dimensions are told without the heads, from the outermost in.
    """
    shape, strides = tensor.shape, tensor.stride()
    if len(shape) != 4 or shape[1] != num_kv_heads:
        return f"{tuple(shape[1:])} {strides[1:]}", 0, False
    # A dimension of one element may have any stride, and lies nowhere.
    others = sorted((place for place in (2, 3) if shape[place] > 1), key=lambda place: -strides[place])
    outside = [place for place in others if num_kv_heads > 1 and strides[place] > strides[1]]
    parts = shape[0] // num_blocks  # blocks of the kernel's in one of vLLM's
    tokens_outside = parts == 1 and others[:1] == [2] and (num_kv_heads == 1 or outside[:1] == [2])
    counted = (2, 3) if parts > 1 else (3,)
    told = " ".join(f"{shape[place]} {_NAMES[place]}" if place in counted else _NAMES[place] for place in others)
    return told, parts * math.prod(shape[place] for place in outside), tokens_outside


def _in_model_order(name: str) -> tuple[int, str]:
    number = _LAYER_NUMBER.search(name)
    return (int(number.group(1)) if number else -1, name)


def _rows(name: str, tensor: torch.Tensor, num_blocks: int, block_bytes: int) -> torch.Tensor:
    described = f"layer {name}: KV of shape {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}"
    if tensor.numel() * tensor.element_size() != num_blocks * block_bytes:
        raise StartError(f"{described} is not {num_blocks} blocks of {block_bytes} bytes")
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=False):
        if size != 1 and stride != expected:
            raise StartError(f"{described} has gaps; its blocks cannot be moved as they are")
        expected *= size
    # The outermost dimension in memory must be blocks (vLLM may split a block into several of the kernel's).
    if tensor.shape[0] % num_blocks or (tensor.shape[0] > 1 and tensor.stride(0) * tensor.shape[0] != tensor.numel()):
        raise StartError(
            f"{described} does not lie block by block; choose an attention backend whose blocks are contiguous"
        )
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).view(num_blocks, block_bytes)
