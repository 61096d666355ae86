"""What is refused before anything is made or started."""

import io
import json
import os
import socket
import sys
import time

import pytest

from kvbelt.cli import main
from kvbelt.errors import StartError
from kvbelt.ops import model_cache, start_checks, up
from kvbelt.ops.losses import meaning
from kvbelt.ops.ports import free_ports
from kvbelt.ops.running import RunningDeployment, announced
from kvbelt.ops.start_checks import (
    crowded,
    own_weight_bytes,
    require_device,
    require_memory,
    require_model,
    weight_bytes,
)
from kvbelt.ops.terminal import Terminal
from kvbelt.ops.tiny_model import tiny_model_dir


@pytest.fixture
def folder(tmp_path):
    """A model's folder: 1,000 bytes of bfloat16 weights."""
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    return tmp_path


def test_cuda_is_refused_without_a_gpu(monkeypatch):
    """--device cuda names what is missing: the GPU, or torch's CUDA."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(StartError, match="no GPU is visible"):
        require_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(StartError, match=r"torch 2\.13\.0\+cpu is a build without CUDA"):
        require_device("cuda", "2.13.0+cpu")
    require_device("cuda", "2.13.0")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "llamma"}, "knows no model type 'llamma'"),
        ({"model_type": "gemma3", "text_config": {"kv_lora_rank": 8}}, "latent attention"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_by_its_config(folder, config, problem):
    """The type is refused before any weight is read, for the embedded engine only."""
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartError, match=problem):
        require_model(folder, "embedded")
    require_model(folder, "vllm")


def test_weights_count_in_the_type_they_are_served_in(folder):
    """bfloat16 weights take twice their file's size in float32."""
    assert weight_bytes(folder, "float32") == 2000
    assert weight_bytes(folder, "bfloat16") == 1000


def test_too_little_memory_is_refused_and_little_is_a_warning(spec):
    """Weights that do not fit are refused; KV that might not fit is a warning."""
    with pytest.raises(StartError, match=r"2 workers need 0\.7 GB .* 0\.1 GB"):
        require_memory(spec, 2000, available=100_000_000)
    assert "with full KV memory" in (require_memory(spec, 2000, available=1_000_000_000) or "")
    assert require_memory(spec, 2000, available=10_000_000_000) is None


def test_memory_is_checked_before_a_model_is_made(spec, tmp_path, monkeypatch):
    """The sizes of kvbelt's own models are known without them."""
    monkeypatch.setenv("KVBELT_CACHE", str(tmp_path))
    monkeypatch.setattr(start_checks, "_available", lambda: 1_000_000_000)
    with pytest.raises(StartError, match=r"2 workers need 1\.8 GB"):
        up.with_model(spec, "demo", Terminal(io.StringIO()))
    assert list(tmp_path.iterdir()) == []


def test_ports_are_checked_before_a_model_is_made(tmp_path, monkeypatch, capsys):
    """The one that is taken is named with its option; and what runs already, with how it is stopped."""
    monkeypatch.setenv("KVBELT_CACHE", str(tmp_path))
    (tmp_path / "control").touch()
    runs = RunningDeployment(
        pid=os.getpid(), url="http://127.0.0.1:9100", topology="1p1d", model="demo", started=time.time() + 3600,
        admin_key_file="", control=str(tmp_path / "control"), processes=(),
    )  # fmt: skip
    monkeypatch.setattr(up, "seed_ports", lambda topology, proxy: free_ports(topology, proxy=proxy))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = ["up", "--model", "tiny", "--port", str(port)]
        assert main(command) == 2
        assert f"port {port} for the proxy on 127.0.0.1: already in use" in capsys.readouterr().err
        with announced(runs):
            assert main(command) == 2
            said = capsys.readouterr().err
    assert "choose another with --port N or --auto-ports. A deployment runs already since 0 s: 1p1d at" in said
    assert f"stop it with: kill {os.getpid()}" in said
    assert not list(tmp_path.glob("tiny*"))


def test_the_known_sizes_are_those_of_the_models(tmp_path):
    """As tiny is made; demo's is that of its description."""
    assert weight_bytes(tiny_model_dir(print), "float32") == pytest.approx(
        own_weight_bytes("tiny", "float32"), rel=0.01
    )
    assert own_weight_bytes("demo", "bfloat16") == 269_030_016
    assert own_weight_bytes(str(tmp_path), "bfloat16") is None


def test_workers_that_share_a_core_are_told(spec, monkeypatch):
    """More workers than cores is a warning."""
    monkeypatch.setattr(start_checks, "cpu_cores", lambda: 1)
    assert crowded(spec) == "2 workers share 1 CPU core; all will be slow"


def test_a_full_disk_is_refused_before_a_model_is_made(tmp_path):
    """The message has both sizes."""
    with pytest.raises(StartError, match="needs 1000000000000 MB"):
        model_cache.make_once(tmp_path / "m", ["false"], "the model", print, needed_bytes=10**18)


def test_a_model_that_takes_long_to_make_says_what_is_done(tmp_path, monkeypatch):
    """Without a terminal the child's last step comes again as a line."""
    monkeypatch.setattr(model_cache, "_LINE_SECONDS", 0.01)
    seen, said = tmp_path / "seen", []
    child = "import os, sys; print('melting', flush=True)\nwhile not os.path.exists(sys.argv[1]): pass"

    def progress(line):
        said.append(line)
        if line.startswith("melting, "):
            seen.touch()

    command = [sys.executable, "-c", child, str(seen)]
    model_cache.make_once(tmp_path / "m", command, "the model", progress, needed_bytes=0)
    assert [said[0].partition(" in ")[0], said[-1]] == ["making the model", "the model: ready"]
    assert seen.exists()


@pytest.mark.parametrize(
    ("role", "left", "said"),
    [
        ("decode", [], "decode-0 was the only decode worker: until it is back prefill workers answer alone"),
        ("prefill", [], "prefill-0 was the only prefill worker: decode workers compute"),
        ("decode", ["decode-1"], "1 decode worker serves on: decode-1"),
        ("proxy", [], "no client can connect"),
    ],
)
def test_the_end_of_a_process_is_explained(role, left, said):
    """What its end means depends on who is left of its role."""
    assert said in meaning(f"{role}-0", role, left)
