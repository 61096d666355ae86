"""Attention over the paged pool, as transformers calls it.

transformers can register an attention function by name; every layer of a model then calls it with this step's queries,
keys and values. Ours takes a *packed* step, ``[1, heads, rows, head_dim]``: the rows of many requests side by side,
single decode tokens first, then prefill chunks. In each layer it

1. writes the step's keys and values into the pool,
2. tells the step's listener, so that a consumer may read finished blocks while the next layer computes,
3. attends request by request, so that no request sees another's tokens, and no result depends on the batch.

Grouped queries: the query heads that share a KV head are treated as rows (decode) or as a batch (prefill), so keys and
values are never repeated in memory. Neighbouring blocks of a request are read in place.

The step in progress is a ``threading.local``, because transformers offers no argument that every model passes through.
So engines on different threads do not see each other.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kvbelt.engine.api import ModelError
from kvbelt.engine.pool import KVPool, is_run

NAME = "kvbelt_paged"

#: Arguments of attention that we do not compute. A model that passes one of them is refused.
_UNSUPPORTED = ("s_aux", "position_bias", "alibi", "relative_position_bias")

#: Called after each layer's keys and values were written, with (layer, event, or None on CPU).
LayerListener = Callable[[int, Any], None]


@dataclass(slots=True, eq=False)
class Segment:
    """One request's rows in a step: its tokens ``start .. start+length``. Earlier tokens are in the pool."""

    block_ids: list[int]
    start: int
    length: int
    #: First slot of its blocks if they are neighbours, else None.
    run: int | None = None
    #: The block ids on the device, for gathering; created when first needed.
    ids: torch.Tensor | None = None
    #: Additive causal masks by sliding window; created when first needed.
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Tokens of the request that are in the pool after this step."""
        return self.start + self.length


class Step:
    """One packed forward pass. ``segments`` are in the order of their rows, those of length 1 first."""

    def __init__(self, pool: KVPool, segments: list[Segment], listener: LayerListener | None) -> None:
        self.pool = pool
        self.segments = segments
        self.listener = listener
        self.layers_seen = 0
        size = pool.layout.block_size
        slots: list[int] = []
        positions: list[int] = []
        for segment in segments:
            blocks = segment.block_ids[: pool.layout.blocks(segment.end)]
            segment.run = blocks[0] * size if is_run(blocks) else None
            span = range(segment.start, segment.end)
            positions.extend(span)
            if segment.run is not None:
                slots.extend(range(segment.run + segment.start, segment.run + segment.end))
            else:
                slots.extend(blocks[i // size] * size + i % size for i in span)
        device = pool.storage.device
        self.num_decodes = sum(1 for segment in segments if segment.length == 1)
        self.slots = torch.tensor(slots, device=device)
        self.positions = torch.tensor([positions], device=device)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put this step's ``[1, kv_heads, rows, head_dim]`` keys and values into the pool."""
        self.layers_seen += 1
        self.pool.key_slots[layer].index_copy_(0, self.slots, key[0].transpose(0, 1))
        self.pool.value_slots[layer].index_copy_(0, self.slots, value[0].transpose(0, 1))
        if self.listener is not None:
            ready = None
            if key.is_cuda:
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record()
            self.listener(layer, ready)

    def attend(
        self, layer: int, query: torch.Tensor, scale: float, window: int | None, softcap: float | None = None
    ) -> torch.Tensor:
        """``[1, heads, rows, head_dim]`` queries to ``[1, rows, heads * head_dim]``."""
        kv_heads = self.pool.layout.num_kv_heads
        _, heads, rows, head_dim = query.shape
        group = heads // kv_heads
        parts: list[torch.Tensor] = []
        if self.num_decodes:
            # Each has one token: the heads of a group become the rows of one query.
            grouped = query[0].transpose(0, 1).reshape(rows, kv_heads, group, head_dim)
            for row, segment in enumerate(self.segments[: self.num_decodes]):
                keys, values = self._read(layer, segment, window)
                out = _attention(
                    grouped[row : row + 1], keys.unsqueeze(0), values.unsqueeze(0), scale=scale, softcap=softcap
                )
                parts.append(out.reshape(1, heads, head_dim))
        row = self.num_decodes
        for segment in self.segments[self.num_decodes :]:
            queries = query[0, :, row : row + segment.length].view(kv_heads, group, segment.length, head_dim)
            row += segment.length
            keys, values = self._read(layer, segment, None)
            causal = softcap is None and segment.start == 0 and (window is None or segment.end <= window)
            out = _attention(
                queries,
                keys.unsqueeze(1).expand(-1, group, -1, -1),
                values.unsqueeze(1).expand(-1, group, -1, -1),
                mask=None if causal else _mask(segment, window, query),
                causal=causal,
                scale=scale,
                softcap=softcap,
            )
            parts.append(out.permute(2, 0, 1, 3).reshape(segment.length, heads, head_dim))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)

    def _read(self, layer: int, segment: Segment, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values ``[kv_heads, tokens, head_dim]`` that a segment's last row may see."""
        end = segment.end
        first = 0 if window is None else max(0, end - window)
        if segment.run is not None:
            first += segment.run
            length = segment.run + end - first
            return self.pool.keys[layer].narrow(1, first, length), self.pool.values[layer].narrow(1, first, length)
        if segment.ids is None:
            blocks = segment.block_ids[: self.pool.layout.blocks(end)]
            segment.ids = torch.tensor(blocks, device=self.pool.storage.device)
        keys, values = self.pool.gather(layer, segment.ids, end)
        return (keys[:, first:], values[:, first:]) if first else (keys, values)


def _attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """torch's, but for soft-capped scores (Gemma 2), which it does not have; those need the mask."""
    if softcap is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal, scale=scale)
    scores = torch.tanh(query @ keys.transpose(-2, -1) * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ values


def _mask(segment: Segment, window: int | None, query: torch.Tensor) -> torch.Tensor:
    """``[rows, tokens]``: 0 where a row sees a token, minus infinity elsewhere."""
    mask = segment.masks.get(window)
    if mask is None:
        rows = torch.arange(segment.start, segment.end, device=query.device).unsqueeze(1)
        tokens = torch.arange(segment.end, device=query.device)
        hidden = tokens > rows
        if window is not None:
            hidden |= tokens <= rows - window
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))
        segment.masks[window] = mask
    return mask


class _Current(threading.local):
    step: Step | None = None


_current = _Current()


@contextmanager
def running(step: Step) -> Iterator[None]:
    """This thread's attention calls belong to ``step``."""
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


def _paged_attention(  # noqa: PLR0917 - transformers decides what comes by position
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    step = _current.step
    if step is None:
        raise RuntimeError(f"{NAME} was called outside an engine's step")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ModelError(f"this model's attention needs {name!r}, which the embedded engine does not compute")
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    step.write(layer, key, value)
    return step.attend(layer, query, scale, sliding_window, softcap), None


# transformers' registry is global by design. No mask function is registered beside it, so no mask is built.
AttentionInterface.register(NAME, _paged_attention)
