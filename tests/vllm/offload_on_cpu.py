"""What vLLM's ``OffloadingConnector`` lacks on a CPU: memory to offload to, and the copies.

Its only store refuses to run without a GPU. ``spec_module_path`` of its settings names this module instead.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


@dataclass(slots=True)
class CopyingWorker(OffloadingWorker):
    """Copies at once, and reports with the end of the step, as a device that is fast enough."""

    blocks: list[torch.Tensor]  #: of each layer (num_blocks, bytes)
    store: list[torch.Tensor]  #: likewise, of the places to offload to
    ended: list[TransferResult] = field(default_factory=list)

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._copy(job_id, (self.blocks, src_spec), (self.store, dst_spec))

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, (self.store, src_spec), (self.blocks, dst_spec))

    def _copy(
        self, job_id: int, source: tuple[list[torch.Tensor], Any], target: tuple[list[torch.Tensor], Any]
    ) -> bool:
        (there, read), (here, written) = source, target
        for one, other in zip(there, here, strict=True):
            other[torch.from_numpy(written.block_ids).long()] = one[torch.from_numpy(read.block_ids).long()]
        self.ended.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        ended, self.ended = self.ended, []
        return ended

    def wait(self, job_ids: set[int]) -> None:
        """Nothing: every copy has been made."""


class HostStore(CPUOffloadingSpec):
    """One group of layers, a block a chunk."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1
        assert len(kv_caches.group_data_refs) == 1
        blocks = [each.tensor.view(torch.int8).view(-1, each.page_size_bytes) for each in kv_caches.tensors]
        return CopyingWorker(blocks, [torch.zeros(self.num_chunks, each.shape[1], dtype=torch.int8) for each in blocks])
