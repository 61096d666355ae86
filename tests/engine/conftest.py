"""Random models for the engine's tests, created once a session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaConfig

from kvbelt.engine.engine import Engine
from tests.engine.support import engine_of, save_model, small


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped queries."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", LlamaConfig(**small()))


@pytest.fixture(scope="session")
def shared_engine(tiny_llama: Path) -> Iterator[Engine]:
    """One engine, max_model_len 32, for tests that leave nothing behind."""
    with engine_of(tiny_llama, max_model_len=32) as engine:
        yield engine
