"""The worker's half of mixed storage: real copies, every byte compared."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from kvbelt.errors import StartError
from kvbelt.vllm.host_memory import CpuHostMemory, host_memory
from kvbelt.vllm.host_worker import HostWorker
from kvbelt.vllm.step_messages import HostCopy
from tests.vllm.belts import until

LAYERS, BLOCKS, BYTES = 3, 8, 64
PLACES = 5


@pytest.fixture
def rows() -> list[torch.Tensor]:
    """A model's KV."""
    return [torch.randint(0, 256, (BLOCKS, BYTES), dtype=torch.uint8) for _ in range(LAYERS)]


class Gated(CpuHostMemory):
    """Copies into host memory wait for the gate, and fail if the test says so."""

    def __init__(self, rows: Sequence[torch.Tensor], places: torch.Tensor) -> None:
        super().__init__(rows, places)
        self.gate = threading.Event()
        self.fails = False

    def keep(self, block_ids: Sequence[int], places: Sequence[int], ready: Any) -> None:
        """Copy once the gate is open."""
        self.gate.wait(60)
        if self.fails:
            raise RuntimeError("no copy today")
        super().keep(block_ids, places, ready)


@pytest.fixture
def memory(rows: list[torch.Tensor]) -> Gated:
    """Room for five blocks; the gate is open."""
    memory = Gated(rows, torch.zeros((PLACES, LAYERS, BYTES), dtype=torch.uint8))
    memory.gate.set()
    return memory


@pytest.fixture
def host(memory: Gated) -> Iterator[HostWorker]:
    """A worker over this memory."""
    host = HostWorker(memory)
    yield host
    memory.gate.set()
    host.close()


def loaded(host: HostWorker) -> tuple[set[str], set[int]]:
    """Poll as a step does."""
    found: tuple[set[str], set[int]] = (set(), set())

    def look() -> bool:
        nonlocal found
        found = host.take_loaded()
        return bool(found[0])

    until(look)
    return found


def test_blocks_come_back_as_they_were(rows: list[torch.Tensor], host: HostWorker) -> None:
    """All layers of the blocks come back, into other blocks."""
    before = [row.clone() for row in rows]
    host.keep(HostCopy("a", (6, 1), (4, 0)), None)
    until(lambda: not host.reads("a"))
    for row in rows:
        row.zero_()
    host.restore(HostCopy("b", (2, 3), (0, 4)))
    assert loaded(host) == ({"b"}, set())
    for row, old in zip(rows, before, strict=True):
        assert torch.equal(row[[2, 3]], old[[1, 6]])
        assert not row[[0, 1, 4, 5, 6, 7]].any()


def test_a_load_comes_after_the_copy_it_rests_on(rows: list[torch.Tensor], memory: Gated, host: HostWorker) -> None:
    """A restore waits for the copy into its place, though it was commanded before the copy began."""
    memory.gate.clear()
    host.keep(HostCopy("a", (6,), (2,)), None)
    host.restore(HostCopy("b", (3,), (2,)))
    assert host.reads("a")
    assert host.take_loaded() == (set(), set())
    memory.gate.set()
    assert loaded(host) == ({"b"}, set())
    for row in rows:
        assert torch.equal(row[3], row[6])


def test_a_failed_copy_is_never_loaded(memory: Gated, host: HostWorker) -> None:
    """The place is reported as spoiled and its block as not loaded, until another copy succeeds."""
    memory.fails = True
    host.keep(HostCopy("a", (6, 5), (2, 3)), None)
    host.restore(HostCopy("b", (0, 1), (1, 2)))
    assert loaded(host) == ({"b"}, {1})
    assert host.take_spoiled() == {2, 3}
    assert host.take_spoiled() == frozenset()
    memory.fails = False
    host.keep(HostCopy("c", (6,), (2,)), None)
    host.restore(HostCopy("d", (1,), (2,)))
    assert loaded(host) == ({"d"}, set())


def test_blocks_taken_away_under_a_copy_are_never_loaded(memory: Gated, host: HostWorker) -> None:
    """Giving up waits for the copy; if it waits in vain, the place is spoiled."""
    memory.gate.clear()
    host.keep(HostCopy("a", (6,), (2,)), None)
    assert not host.give_up("a", 0.01)
    memory.gate.set()
    assert host.give_up("a", 10)
    assert host.take_spoiled() == {2}
    host.restore(HostCopy("b", (1,), (2,)))
    assert loaded(host) == ({"b"}, {1})


def test_as_many_blocks_as_fit(rows: list[torch.Tensor]) -> None:
    """Room is counted in whole blocks of all layers; no room at all is refused."""
    assert host_memory(rows, LAYERS * BYTES * 4 + 7).num_places == 4
    with pytest.raises(StartError, match="max_local_cpu_size"):
        host_memory(rows, LAYERS * BYTES - 1)
