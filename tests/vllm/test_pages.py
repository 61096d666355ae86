"""vLLM's KV tensors as rows of bytes, in every supported shape; others are refused."""

import pytest
import torch

from kvbelt.errors import StartError
from kvbelt.vllm.pages import pages_of

BLOCKS, HEADS, BLOCK, WIDTH = 6, 2, 16, 8
BYTES = HEADS * BLOCK * WIDTH * 4


def heads_first() -> torch.Tensor:
    """``[block, head, token, K and V]``, contiguous."""
    return torch.randn(BLOCKS, HEADS, BLOCK, WIDTH)


def tokens_first() -> torch.Tensor:
    """The same shape, but tokens lie outside heads."""
    return torch.randn(BLOCKS, BLOCK, HEADS, WIDTH).permute(0, 2, 1, 3)


def split_blocks() -> torch.Tensor:
    """The kernel's blocks are half of vLLM's."""
    return torch.randn(BLOCKS * 2, HEADS, BLOCK // 2, WIDTH)


@pytest.mark.parametrize("make", [heads_first, tokens_first, split_blocks])
def test_a_row_is_a_block(make) -> None:
    """Writing a row writes that block, whole, and no other."""
    tensor = make()
    pages = pages_of({"model.layers.0.attn": tensor}, BLOCKS, BYTES, "test")
    before = tensor.clone()
    pages.rows[0][3] = 0
    part = tensor.shape[0] // BLOCKS
    assert not tensor[3 * part : 4 * part].any()
    assert torch.equal(tensor[: 3 * part], before[: 3 * part])
    assert torch.equal(tensor[4 * part :], before[4 * part :])


def test_layers_are_in_the_model_s_order() -> None:
    """Layers are sorted by number, not by name, so every server has the same order."""
    kv = {f"model.layers.{i}.attn": heads_first() for i in (10, 2, 0)}
    assert pages_of(kv, BLOCKS, BYTES, "test").layer_of == {
        "model.layers.0.attn": 0,
        "model.layers.2.attn": 1,
        "model.layers.10.attn": 2,
    }


def test_shared_memory_is_moved_once() -> None:
    """A layer that uses another layer's KV has no row of its own."""
    tensor = heads_first()
    pages = pages_of({"layers.0": tensor, "layers.1": tensor}, BLOCKS, BYTES, "test")
    assert len(pages.rows) == 1
    assert pages.layer_of == {"layers.0": 0, "layers.1": 0}


def test_groups_share_rows() -> None:
    """A layer of each group lies in a row; the last row has one group only."""
    shared, last = heads_first(), heads_first()
    kv = {"layers.0": shared, "layers.1": shared, "layers.2": last}
    pages = pages_of(kv, BLOCKS, BYTES, "test")
    assert pages.layer_of == {"layers.0": 0, "layers.1": 0, "layers.2": 1}
    assert pages.sharing({"layers.0": 1, "layers.1": 0, "layers.2": 0}) == [2, 1]


def test_layers_of_two_shapes_are_told_apart() -> None:
    """A block is compared with that of the other side in every shape that it has."""
    one, two = heads_first(), tokens_first()
    both = pages_of({"layers.0": one, "layers.1": two}, BLOCKS, BYTES, "test").order
    assert both == "; ".join(pages_of({"layers.0": each}, BLOCKS, BYTES, "test").order for each in (one, two))


def test_the_order_tells_layouts_apart() -> None:
    """Servers with different layouts inside a block have different orders."""
    orders = {
        pages_of({"a": make()}, BLOCKS, BYTES, "test").order for make in (heads_first, tokens_first, split_blocks)
    }
    assert len(orders) == 3


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.randn(2, BLOCKS, HEADS, BLOCK, WIDTH // 2), "block by block"),
        (torch.randn(BLOCKS, HEADS, BLOCK, WIDTH * 2)[..., :WIDTH], "gaps"),
        (torch.randn(BLOCKS + 1, HEADS, BLOCK, WIDTH), "is not 6 blocks"),
    ],
    ids=["keys-then-values", "padded", "other-size"],
)
def test_other_layouts_are_refused(tensor: torch.Tensor, said: str) -> None:
    """The error names the layer, its shape and the remedy."""
    with pytest.raises(StartError, match=said):
        pages_of({"model.layers.0.attn": tensor}, BLOCKS, BYTES, "test")
