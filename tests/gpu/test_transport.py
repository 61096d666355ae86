"""The transports that UCX uses between two processes with GPU memory, as the doctor measures them."""

import os
import subprocess
import sys

import msgspec
import pytest
import torch

from kvbelt.ops.doctor.nixl_measurement import NixlMeasurement

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def measured(ucx_tls: str) -> NixlMeasurement:
    """The measurement between the first GPU and the second, or the first and itself."""
    ends = ["cuda:0", "cuda:1"][: torch.cuda.device_count()]
    command = [sys.executable, "-m", "kvbelt.ops.doctor.nixl_pair", *ends]
    done = subprocess.run(command, env=os.environ | {"UCX_TLS": ucx_tls}, capture_output=True, timeout=240, check=True)
    return msgspec.json.decode(done.stdout.strip().rpartition(b"\n")[2], type=NixlMeasurement)


def test_a_gpu_s_memory_goes_by_cuda_ipc() -> None:
    """GPU memory is written by cuda_ipc, and the transport of host memory is not reported."""
    found = measured("cuda_ipc,cuda_copy,tcp")
    assert not found.error
    writes = [road for road in found.transports if road.operation == "write"]
    assert writes
    assert all(road.memory == "cuda" and "cuda_ipc" in road.transport for road in writes), found.transports


def test_without_cuda_ipc_no_transport_names_it() -> None:
    """With UCX_TLS=tcp,cuda_copy no choice names cuda_ipc."""
    found = measured("cuda_copy,tcp")
    assert found.error or found.transports
    assert not any("cuda_ipc" in road.transport for road in found.transports)
