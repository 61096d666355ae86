"""Digests that a GPU computes, against the host's."""

import pytest
import torch

from kvbelt.paged_copy import TorchPagedCopy
from kvbelt.transfer.ports import Digest
from kvbelt.wire.digest import Choice, Verify
from kvbelt.wire.ids import TransferId
from tests.transfer.belts import eventually

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYERS, BLOCKS, BLOCK_BYTES = 2, 350, 64 << 10


def value(digest: Digest) -> int:
    """Once it is done."""
    eventually(digest.done, "the device has come so far")
    return digest.value()


@pytest.mark.parametrize("verify", ["sample", "always"])
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_a_device_finds_the_digest_that_the_host_finds(verify: Verify, place: str) -> None:
    """Of some cells and of all, which are more than are looked at in one go; staging on the device, or beside it."""
    staging = torch.randint(0, 256, (LAYERS * BLOCKS * BLOCK_BYTES,), dtype=torch.uint8)
    there = staging.to(place) if place == "cuda" else staging.pin_memory()
    kept = there.clone()
    cells = Choice(TransferId("t"), BLOCKS, verify).of_layers(LAYERS, 0, BLOCKS)
    layer = torch.zeros((1, BLOCK_BYTES), dtype=torch.uint8)
    host = TorchPagedCopy([layer], staging, staging)
    device = TorchPagedCopy([layer.cuda()], there, there)
    expected = host.digest_received(0, cells).value()
    assert value(device.digest_received(0, cells)) == expected
    assert value(device.digest_sent(0, cells)) == expected
    assert torch.equal(there, kept)
