"""Mixed storage's copies between a GPU's KV blocks and pinned host memory: every byte compared."""

import pytest
import torch

from kvbelt.vllm.compute import CudaCompute
from kvbelt.vllm.host_memory import CudaHostMemory, host_memory
from kvbelt.vllm.host_worker import HostWorker
from kvbelt.vllm.step_messages import HostCopy
from tests.vllm.belts import until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no CUDA device"),
]


@pytest.mark.parametrize(("layers", "block_bytes", "blocks"), [(3, 96, 40), (32, 64 << 10, 48)])
def test_blocks_come_back_as_they_were(layers: int, block_bytes: int, blocks: int) -> None:
    """Blocks come back byte for byte, also in several pieces and while the model's stream writes other blocks."""
    device = torch.device("cuda:0")
    rows = [torch.randint(0, 256, (blocks, block_bytes), dtype=torch.uint8, device=device) for _ in range(layers)]
    before = [row.clone() for row in rows]
    memory = host_memory(rows, layers * block_bytes * 30)
    assert isinstance(memory, CudaHostMemory)
    assert memory.num_places == 30
    host, compute = HostWorker(memory), CudaCompute(device)
    kept, places = tuple(range(1, 21)), tuple(range(29, 9, -1))
    try:
        host.keep(HostCopy("a", kept, places), compute.mark())
        until(lambda: not host.reads("a"))
        for row in rows:
            row.zero_()
        torch.cuda.synchronize()
        into = tuple(range(20, 40))
        host.restore(HostCopy("b", into, places))
        until(lambda: host.take_loaded() == ({"b"}, set()))
        for row, old in zip(rows, before, strict=True):
            assert torch.equal(row[20:40], old[1:21])
            assert not row[:20].any()
            assert not row[40:].any()
    finally:
        host.close()
        compute.close()


def test_a_copy_waits_for_what_it_copies() -> None:
    """A copy starts after the work that was queued before it."""
    device = torch.device("cuda:0")
    rows = [torch.zeros((4, 1 << 20), dtype=torch.uint8, device=device)]
    host, compute = HostWorker(host_memory(rows, 4 << 20)), CudaCompute(device)
    try:
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        rows[0][2] = 7
        host.keep(HostCopy("a", (2,), (0,)), compute.mark())
        host.restore(HostCopy("b", (3,), (0,)))
        until(lambda: host.take_loaded() == ({"b"}, set()))
        assert (rows[0][3] == 7).all()
    finally:
        host.close()
        compute.close()
