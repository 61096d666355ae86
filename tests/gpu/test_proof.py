"""The proof at start, over KV memory on a GPU."""

import pytest
import torch

from kvbelt.vllm.pages import pages_of
from kvbelt.vllm.proof import prove
from tests.vllm.test_pages import BLOCKS, BYTES, heads_first, split_blocks, tokens_first

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no CUDA device")]


@pytest.mark.parametrize("make", [heads_first, tokens_first, split_blocks])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_sound_memory_passes_and_draws_nothing(make, dtype: torch.dtype) -> None:
    """The memory is as before, and torch's own random numbers go on as if nothing had been drawn."""
    caches = {f"layers.{number}": make().to("cuda", dtype) for number in range(3)}
    before = {name: tensor.clone() for name, tensor in caches.items()}
    state = torch.cuda.get_rng_state()
    prove(caches, pages_of(caches, BLOCKS, BYTES * dtype.itemsize // 4, "test"))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for name, tensor in caches.items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
