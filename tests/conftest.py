"""What every room's tests share."""

from pathlib import Path

import pytest

from kvbelt.ops.demo_model import demo_model_dir


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the demo model, converted on first use and kept in the user's cache."""
    return demo_model_dir(print)
