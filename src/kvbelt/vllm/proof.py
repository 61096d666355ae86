"""The proof at start: the belt moves blocks as vLLM reads and writes them.

It takes milliseconds, before any request. Whatever a new vLLM or an attention backend does with its KV memory, blocks
that come back changed are found here and not in answers.
"""

from collections.abc import Mapping
from typing import Any

import torch

from kvbelt.errors import StartError
from kvbelt.paged_copy import Staging, TorchPagedCopy
from kvbelt.transfer.ports import Digest
from kvbelt.transfer.receive.handles import wait_for
from kvbelt.vllm.pages import Pages
from kvbelt.wire.digest import Choice
from kvbelt.wire.ids import TransferId

#: vLLM's memory is read and written in these, by the size of its type: so nothing is rounded, and all bits compare.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Between the beginnings of two layers' contents in one run of random bytes, so that they differ.
_STEP_BYTES = 64


def prove(kv_caches: Mapping[str, torch.Tensor], pages: Pages) -> None:
    """Write some blocks of every layer as vLLM does, gather, digest and scatter them, and read them as vLLM does.

    Nothing else may use the memory meanwhile. It is afterwards as it was.

    Raises:
        StartError: a block came back changed.
    """
    num_blocks, block_bytes = pages.rows[0].shape
    some = sorted({0, num_blocks // 3, 2 * num_blocks // 3, num_blocks - 1})
    targets = some[1::2]
    sources = some[: 2 * len(targets) : 2]
    if not targets:
        return
    device, num_layers, stride = pages.rows[0].device, len(pages.rows), len(targets) * block_bytes
    names = list({place: name for name, place in pages.layer_of.items()}.items())
    views = [_as_vllm_sees(kv_caches[name], num_blocks) for _, name in sorted(names)]
    # A generator of its own: answers without a seed are drawn from torch's.
    chance = torch.Generator(device).manual_seed(0)
    num_bytes = stride + num_layers * _STEP_BYTES
    content = _plain(torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device, generator=chance))
    before = [view[some] for view in views]
    written = []
    for layer, view in enumerate(views):
        blocks = content[layer * _STEP_BYTES :][:stride].view(view.dtype).reshape(len(sources), *view.shape[1:])
        view[sources] = blocks
        written.append(blocks)

    sent, received = (Staging(num_layers * stride, device, model_on=device) for _ in range(2))
    copy = TorchPagedCopy(pages.rows, send_staging=sent, receive_staging=received)
    _settle(device)
    wait_for([copy.gather(layer, sources, layer * stride, None) for layer in range(num_layers)])
    cells = Choice(TransferId("proof"), len(targets), "always").of_layers(num_layers, 0, len(targets))
    _plain(received.memory)[:] = _plain(sent.memory)
    _settle(device)
    if _value(copy.digest_sent(0, cells)) != _value(copy.digest_received(0, cells)):
        raise StartError(f"two digests of the same blocks differ on {device}; is its memory sound?")
    wait_for(copy.scatter(targets, 0, stride))
    for (_, name), view, blocks in zip(sorted(names), views, written, strict=True):
        if not bool((view[targets] == blocks).all()):
            raise StartError(_changed(name, kv_caches[name], sources, targets))
    for view, blocks in zip(views, before, strict=True):
        view[some] = blocks
    _settle(device)


def _as_vllm_sees(tensor: torch.Tensor, num_blocks: int) -> Any:
    """One layer's blocks through the tensor that vLLM has registered; it may hold several of a kernel's blocks each."""
    words = tensor.view(_WORDS[tensor.element_size()])
    return _plain(words.unflatten(0, (num_blocks, -1)))  # type: ignore[no-untyped-call]


def _plain(tensor: torch.Tensor) -> Any:
    """What is read and written alike, as an array on a CPU: torch's threads wait long for each other on a busy one."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _changed(name: str, tensor: torch.Tensor, sources: list[int], targets: list[int]) -> str:
    return (
        f"layer {name}, {tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}: blocks {sources} "
        f"were moved to {targets}, where vLLM reads something else; this kvbelt does not know how this vLLM or its "
        "attention backend lays KV out: try another backend"
    )


def _value(digest: Digest) -> int:
    wait_for([digest])
    return digest.value()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
