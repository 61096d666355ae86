"""A worker's service over a real engine and a real belt."""

import pytest
from starlette.testclient import TestClient
from transformers import LlamaConfig

from kvbelt.wire.health import Role
from kvbelt.wire.ids import EngineId
from kvbelt.worker.app import make_app
from kvbelt.worker.prompts import Prompts
from kvbelt.worker.service import Service
from tests.channels.memory import MemoryChannel, MemoryNetwork
from tests.engine.support import engine_of, save_model, small
from tests.transfer.belts import Side


@pytest.fixture
def ready(tmp_path):
    """A decode worker that takes requests."""
    folder = save_model(tmp_path / "tiny", LlamaConfig(**small()))
    channel = MemoryChannel("d", MemoryNetwork())
    with engine_of(folder, max_model_len=32) as engine, Side("d", "decode", channel) as side:
        service = Service(role=Role.DECODE, engine_id=side.belt.identity.engine_id, model_name="tiny")
        prompts = Prompts(engine.tokenizer, engine.layout.block_size, engine.max_model_len)
        service.become_ready(engine, prompts, side.belt)
        yield service
        prompts.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A worker with a random model, which follows a form only where it is made to."""
    folder = save_model(tmp_path_factory.mktemp("models") / "tiny", LlamaConfig(**small()))
    with engine_of(folder, max_model_len=128) as engine:
        engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        service = Service(role=Role.DECODE, engine_id=EngineId("d"), model_name="tiny")
        prompts = Prompts(engine.tokenizer, engine.layout.block_size, engine.max_model_len)
        service.become_ready(engine, prompts, None)
        yield TestClient(make_app(service))
        prompts.close()
