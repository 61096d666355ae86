"""Clients of what only vLLM has, through the proxy."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.vllm.conftest import Deployment


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
