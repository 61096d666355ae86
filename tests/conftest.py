"""What every room's tests share."""

import ctypes
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kvbelt.ops.demo_model import demo_model_dir

# How long an example takes, or making it, says something about the machine only.
settings.register_profile("kvbelt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvbelt")

# UCX, which NIXL loads, brings libnl. Its destructor crashes (see _exit_now in kvbelt/cli.py), which would turn
# pytest's status into 139. So glibc ends the process before any library's destructor runs. By then Python has ended,
# and its reports are written.
_libc = ctypes.CDLL(None)
_libc.on_exit(_libc["_exit"], None)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the demo model, converted on first use and kept in the user's cache."""
    return demo_model_dir(print)
