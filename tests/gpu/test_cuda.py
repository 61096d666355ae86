"""The embedded engine and the belt on GPUs, with random models: two paths must give the same answers."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaConfig

from kvbelt.engine.engine import Engine
from kvbelt.engine.settings import EngineSettings
from kvbelt.ops.deployment import SyncDeployment, running
from kvbelt.ops.processes import SPLIT_ALL, DeploymentSpec
from kvbelt.ops.topology import Topology
from tests.e2e.asking import ask_all, until
from tests.engine.support import GREEDY, Client, save_model, small

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

GPUS = torch.cuda.device_count()
needs_one = pytest.mark.skipif(GPUS < 1, reason="no CUDA device")

#: A prompt a line, a byte a token, so many at a time.
PROMPTS = ["x" * n + " and then" for n in (3, 40, 400, 1500)] + ["the quick brown fox " * n for n in (1, 7, 60)]
BODIES = [{"prompt": text, "temperature": 0, "max_tokens": 16, "ignore_eos": True} for text in PROMPTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that the KV of its prompts is megabytes: 12 layers, 128 KiB of KV for 16 tokens of a layer."""
    size = {"num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096}  # fmt: skip
    return save_model(tmp_path_factory.mktemp("gpu") / "random-llama", LlamaConfig(**small(**size)), spread=0.05)


def spec(model: Path, topology: str, **changes) -> DeploymentSpec:
    """Everything on GPUs, staging included. Each worker has its GPU; with a single GPU they share it."""
    given = {"topology": Topology.parse(topology), "model": model, "auto_ports": True, "device": "cuda",
             "kv_gb": 2.0, "max_model_len": 2048, "start_timeout": 300.0,
             "proxy_args": SPLIT_ALL}  # fmt: skip
    return DeploymentSpec(**(given | changes))


def sent(deployment: SyncDeployment) -> dict[str, int]:
    """The ended transfers of the first prefill worker, by reason."""
    belt = httpx.get(deployment.process("prefill-0").url + "/health").json()["belt"]
    totals: dict[str, int] = belt["sent_total"]
    return totals


@needs_one
def test_cuda_gives_the_cpu_s_tokens(tmp_path: Path) -> None:
    """fp32 greedy answers on CUDA and on the CPU are the same, alone and together."""
    folder = save_model(tmp_path / "tiny", LlamaConfig(**small()))
    answers = {}
    for device in ("cpu", "cuda"):
        engine = Engine(EngineSettings(folder, device=device, dtype="float32", kv_bytes=1 << 22, block_size=4))
        engine.start()
        try:
            clients = [Client(engine, list(text.encode())[:200]) for text in PROMPTS]
            answers[device] = [client.wait()._ids() for client in clients]
        finally:
            engine.close()
            engine.validate()
    assert GREEDY.max_tokens == len(answers["cpu"][0])
    assert answers["cuda"] == answers["cpu"]


@pytest.fixture(scope="module")
def expected(model: Path) -> list:
    """The aggregated server's answers."""
    with running(spec(model, "0p1d", dtype="float32")) as aggregated:
        return ask_all(aggregated.url, BODIES, at_once=1)


@needs_one
@pytest.mark.parametrize("buffer", ["cuda", "cpu"])
def test_kv_crosses_between_gpus(buffer: str, model: Path, expected: list) -> None:
    """1p1d gives the aggregated answers, alone and eight at a time, and every transfer is done."""
    with running(spec(model, "1p1d", dtype="float32", buffer_device=buffer)) as deployment:
        for at_once in (1, 8):
            answers = ask_all(deployment.url, BODIES, at_once=at_once)
            assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
            assert {a.path.partition(";")[0] for a in answers} <= {"first-token", "re-derive"}
        until(lambda: sent(deployment).get("done", 0) >= 2 * len(BODIES), what="every transfer done")
        assert set(sent(deployment)) == {"done"}


@needs_one
def test_bf16_crosses_too(model: Path) -> None:
    """1p1d in bf16: every request is answered through the belt."""
    with running(spec(model, "1p1d", dtype="bfloat16")) as deployment:
        answers = ask_all(deployment.url, BODIES, at_once=4)
        assert {a.path.partition(";")[0] for a in answers} <= {"first-token", "re-derive"}
        assert set(sent(deployment)) == {"done"}


@pytest.fixture(autouse=True)
def _free_gpu_memory() -> Iterator[None]:
    """Free the GPU memory of this process before the next test starts others."""
    yield
    if GPUS:
        torch.cuda.empty_cache()
