"""What the proxy does with memory that requests have freed."""

import ctypes
import subprocess
import sys

import pytest

_AGAIN_AND_AGAIN = """
from resource import RUSAGE_SELF, getrusage
from kvbelt.proxy.app import keep_freed_memory

def use_bodies():
    return [bytes(40_000) for _ in range(40)]

keep_freed_memory()
use_bodies()
before = getrusage(RUSAGE_SELF).ru_minflt
for _ in range(50):
    use_bodies()
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_memory_of_bodies_is_used_again() -> None:
    """A body's memory is not given back to the system and taken again: each page of it would be a page fault."""
    run = subprocess.run([sys.executable, "-c", _AGAIN_AND_AGAIN], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 500
