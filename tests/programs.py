"""Programs that tests use and pip cannot bring (``scripts/test`` installs them where it may)."""

import os
import shutil

import pytest


def need_program(name: str) -> str:
    """The path of a program. Where it is missing the test is skipped; in CI, where it must be there, it fails."""
    found = shutil.which(name)
    if found is None:
        message = f"{name} is not installed (Debian's package of that name)"
        if os.environ.get("KVBELT_SKIP_NOTHING"):
            pytest.fail(message)
        pytest.skip(message)
    return found
