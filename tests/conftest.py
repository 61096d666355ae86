"""What every room's tests share."""

import ctypes
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kvbelt.ops.demo_model import demo_model_dir

# How long an example takes, or making it, says something about the machine only. Examples are the same in each run, so
# a suite that passed passes again; scripts/test-long examples draws new ones.
settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("random" if os.environ.get("KVBELT_RANDOM_EXAMPLES") else "fixed")

# UCX, which NIXL loads, brings libnl. Its destructor crashes (see _exit_now in kvbelt/ops/worker_command.py), which
# would turn pytest's status into 139. So glibc ends the process before any library's destructor runs. By then Python
# has ended, and its reports are written.
_libc = ctypes.CDLL(None)
_libc.on_exit(_libc["_exit"], None)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the demo model, converted on first use and kept in the user's cache."""
    return demo_model_dir(print)
