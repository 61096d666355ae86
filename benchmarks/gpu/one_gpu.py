"""vLLM's GPU worker, with all ranks of a server on one GPU: for bytes, never for speed.

NCCL refuses two ranks on one GPU. Here ranks exchange tensors through host memory and gloo instead. Give the servers
``--worker-cls benchmarks.gpu.one_gpu.Worker --distributed-executor-backend mp --disable-custom-all-reduce
--enforce-eager``, and ``VLLM_DISABLE_PYNCCL=1``.
"""

from typing import Any

import torch
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker as _Worker


class Worker(_Worker):  # type: ignore[misc] # vllm has no types here
    """A rank that shares the first GPU with the others."""

    def init_device(self) -> None:
        self.local_rank = 0
        type(current_platform).dist_backend = "gloo"
        CudaCommunicator.all_reduce = _all_reduce
        CudaCommunicator.all_gather = _all_gather
        super().init_device()


def _all_reduce(self: Any, mine: torch.Tensor) -> torch.Tensor:
    total = mine.float().cpu()
    torch.distributed.all_reduce(total, group=self.cpu_group)
    return total.to(mine.device, mine.dtype)


def _all_gather(self: Any, mine: torch.Tensor, dim: int = -1) -> torch.Tensor:
    here = mine.float().cpu().contiguous()
    parts = [torch.empty_like(here) for _ in range(self.world_size)]
    torch.distributed.all_gather(parts, here, group=self.cpu_group)
    return torch.cat(parts, dim=dim).to(mine.device, mine.dtype)
