"""Digests that a GPU computes and blocks that it fills, with kernels and without, against the host's."""

import pytest
import torch

from kvbelt.paged_copy import TorchPagedCopy
from kvbelt.transfer.ports import Digest
from kvbelt.wire.digest import Choice
from kvbelt.wire.ids import TransferId
from kvbelt.wire.reservation import Verify
from tests.transfer.belts import eventually

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYERS, BLOCKS, BLOCK_BYTES = 2, 350, 64 << 10

#: Blocks of a pool.
LARGE = 500


def value(digest: Digest) -> int:
    """The digest, once it is done."""
    eventually(digest.done, "the device has come so far")
    return digest.value()


@pytest.mark.parametrize("verify", ["sample", "always"])
@pytest.mark.parametrize("place", ["cuda", "cpu"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_a_device_finds_the_digest_that_the_host_finds(verify: Verify, place: str, kernels: bool) -> None:
    """The GPU's digest equals the host's, of few cells and of many, with staging on either side."""
    staging = torch.randint(0, 256, (LAYERS * BLOCKS * BLOCK_BYTES,), dtype=torch.uint8)
    there = staging.to(place) if place == "cuda" else staging.pin_memory()
    kept = there.clone()
    cells = Choice(TransferId("t"), BLOCKS, verify).of_layers(LAYERS, 0, BLOCKS)
    layer = torch.zeros((1, BLOCK_BYTES), dtype=torch.uint8)
    host = TorchPagedCopy([layer], staging, staging)
    device = TorchPagedCopy([layer.cuda()], there, there)
    if not kernels:
        device._kernels = None
    assert (device._kernels is not None) == kernels  # Triton is at hand wherever torch has CUDA
    expected = host.digest_received(0, cells).value()
    assert value(device.digest_received(0, cells)) == expected
    assert value(device.digest_sent(0, cells)) == expected
    assert torch.equal(there, kept)


@pytest.mark.parametrize(("place", "kernels"), [("cuda", True), ("cuda", False), ("cpu", False)])
def test_a_device_fills_the_blocks_that_the_host_fills(place: str, kernels: bool) -> None:
    """Every layer's blocks are filled from staging as on the host, and no others."""
    blocks, stride = tuple(range(LARGE - 2, 0, -3)), LARGE * BLOCK_BYTES
    staging = torch.randint(0, 256, (LAYERS * stride + 64,), dtype=torch.uint8)
    there = staging.to(place) if place == "cuda" else staging.pin_memory()
    plain = [torch.zeros((LARGE, BLOCK_BYTES), dtype=torch.uint8) for _ in range(LAYERS)]
    layers = [layer.cuda() for layer in plain]
    device = TorchPagedCopy(layers, None, there)
    if not kernels:
        device._kernels = None
    for copy in (TorchPagedCopy(plain, None, staging), device):
        for fence in copy.scatter(blocks, 64, stride):
            eventually(fence.done, "every block is in place")
    assert all(torch.equal(one.cpu(), other) for one, other in zip(layers, plain, strict=True))
