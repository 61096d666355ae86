"""The proof at start: what passes, and what it finds."""

from dataclasses import replace

import pytest
import torch

from kvbelt.errors import StartError
from kvbelt.vllm import proof
from kvbelt.vllm.pages import pages_of
from kvbelt.vllm.proof import prove
from tests.vllm.test_pages import BLOCKS, BYTES, heads_first, split_blocks, tokens_first


@pytest.mark.parametrize("make", [heads_first, tokens_first, split_blocks])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("as_on", ["cpu", "cuda"])
def test_sound_memory_passes_and_is_afterwards_as_it_was(
    make, dtype: torch.dtype, as_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layout and type, with layers that share memory, by numpy's operations and by torch's."""
    if as_on == "cuda":
        monkeypatch.setattr(proof, "_plain", lambda tensor: tensor)
    caches = {f"layers.{number}": make().to(dtype) for number in range(3)}
    caches["layers.3"] = caches["layers.1"]
    before = {name: tensor.clone() for name, tensor in caches.items()}
    prove(caches, pages_of(caches, BLOCKS, BYTES * dtype.itemsize // 4, "test"))
    for name, tensor in caches.items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_a_few_blocks_are_enough(num_blocks: int) -> None:
    """One block cannot be moved to another, and passes."""
    caches = {"layers.0": torch.zeros(num_blocks, 2, 16, 8)}
    prove(caches, pages_of(caches, num_blocks, BYTES, "test"))


def test_memory_that_vllm_reads_in_another_way_is_refused() -> None:
    """Rows of another order than vLLM's blocks: the layer and its shape are named."""
    caches = {f"layers.{number}": heads_first() for number in range(2)}
    pages = pages_of(caches, BLOCKS, BYTES, "test")
    wrong = caches["layers.1"].permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)  # heads lie outside blocks
    rows = [pages.rows[0], wrong.permute(1, 0, 2, 3).reshape(-1).view(torch.uint8).view(BLOCKS, BYTES)]
    with pytest.raises(StartError, match=r"layer layers\.1, torch\.float32 of shape \(6, 2, 16, 8\)") as refused:
        prove(caches | {"layers.1": wrong}, replace(pages, rows=rows))
    assert "\n" not in str(refused.value)
