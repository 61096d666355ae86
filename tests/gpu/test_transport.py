"""What UCX takes between two processes with memory of a GPU, as the doctor measures it."""

import os
import subprocess
import sys

import msgspec
import pytest
import torch

from kvbelt.ops.doctor.measured import Measured

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def measured(ucx_tls: str) -> Measured:
    """Of the first GPU with itself, or with the second where there is one."""
    ends = ["cuda:0", "cuda:1"][: torch.cuda.device_count()]
    command = [sys.executable, "-m", "kvbelt.ops.doctor.pair", *ends]
    done = subprocess.run(command, env=os.environ | {"UCX_TLS": ucx_tls}, capture_output=True, timeout=240, check=True)
    return msgspec.json.decode(done.stdout.strip().rpartition(b"\n")[2], type=Measured)


def test_a_gpu_s_memory_goes_by_cuda_ipc() -> None:
    """And nothing is told of the host's memory, which goes by TCP here."""
    found = measured("cuda_ipc,cuda_copy,tcp")
    assert not found.error
    writes = [road for road in found.roads if road.operation == "write"]
    assert writes
    assert all(road.memory == "cuda" and "cuda_ipc" in road.transport for road in writes), found.roads


def test_without_cuda_ipc_it_is_told_that_it_does_not() -> None:
    """As with UCX_TLS=tcp,cuda_copy."""
    found = measured("cuda_copy,tcp")
    assert found.error or found.roads
    assert not any("cuda_ipc" in road.transport for road in found.roads)
