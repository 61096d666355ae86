"""Clients of what only vLLM has, through the proxy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.conftest import Deployment

HERE = Path(__file__).parent

#: Made by ``scripts/test-clients --install``: openai-agents needs a newer ``openai`` than vLLM pins.
CLIENTS = HERE.parents[1] / ".venv-clients/bin/python"


def test_the_anthropic_client(deployment: Deployment) -> None:
    """Messages, whole and streamed, as its own types."""
    import anthropic  # noqa: PLC0415 -- it comes with vLLM

    asked = {"model": "demo", "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}
    with anthropic.Anthropic(base_url=deployment.proxy.url, api_key="none", max_retries=0, timeout=120) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert [part.type for part in message.content] == ["text"]
        assert message.role == "assistant"
        assert message.stop_reason in ("max_tokens", "end_turn")
        assert 1 <= message.usage.output_tokens <= 8


def test_the_responses_model_of_openai_agents(deployment: Deployment) -> None:
    """An agent says the same as over a plain server, whole and streamed."""
    if not CLIENTS.exists():
        pytest.skip("openai-agents is not installed (scripts/test-clients --install)")
    answers = []
    for server in (deployment.proxy, deployment.plain):
        command = [CLIENTS, HERE / "responses_agent.py", server.url, "demo"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        answers.append(json.loads(ended.stdout))
    over_proxy, over_plain = answers
    assert over_proxy == over_plain
    assert all(over_proxy)


def test_vllm_bench_serve(deployment: Deployment, tmp_path: Path) -> None:
    """Every request of its load is answered, with all of its tokens."""
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"]
    command += ["--base-url", deployment.proxy.url, "--model", "demo"]
    command += ["--tokenizer", os.environ["KVBELT_VLLM_MODEL"]]
    command += ["--dataset-name", "random", "--random-input-len", "48", "--random-output-len", "8", "--ignore-eos"]
    command += ["--num-prompts", "6", "--num-warmups", "0", "--disable-tqdm"]
    command += ["--save-result", "--result-filename", str(found)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads(found.read_text())
    assert (results["completed"], results["total_output_tokens"]) == (6, 6 * 8)
