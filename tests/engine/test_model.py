"""Which model folders are served, and which are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GptOssConfig,
    GraniteConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    XGLMConfig,
)

from kvbelt.engine.api import ModelError
from kvbelt.engine.engine import Engine
from kvbelt.engine.model import PagedModel
from kvbelt.engine.settings import EngineSettings
from kvbelt.fingerprint import fingerprint
from tests.engine.support import GREEDY, Client, engine_of, reference_greedy, save_model, small

SERVED = {
    "qwen2": Qwen2Config(**small()),
    "qwen3": Qwen3Config(**small()),
    "mistral-with-window": MistralConfig(**small(sliding_window=10)),
    "phi3": Phi3Config(**small(pad_token_id=0)),
    # Scores are small with random weights; a small cap bends them all the same.
    "gemma2": Gemma2Config(**small(head_dim=8, attn_logit_softcapping=0.05, sliding_window=10)),
    "granite": GraniteConfig(**small(logits_scaling=3.0, attention_multiplier=0.3)),
    "gpt2": GPT2Config(vocab_size=260, n_embd=48, n_layer=3, n_head=6, n_positions=512),
}


@pytest.mark.parametrize("name", SERVED)
def test_architectures_answer_as_transformers_does(tmp_path: Path, name: str) -> None:
    """Models of other architectures, in chunks and in a batch, produce transformers' own tokens."""
    folder = save_model(tmp_path / name, SERVED[name])
    prompts = [list(b"several makes of models"), list(b"one"), list(b"more than one window of tokens")]
    with engine_of(folder, num_blocks=400, max_batch_tokens=8, max_running=4) as engine:
        clients = [Client(engine, prompt) for prompt in prompts]
        assert [client.token_ids for client in clients] == [reference_greedy(folder, prompt, 24) for prompt in prompts]


#: Its original context has 16 tokens.
LONGROPE = Phi3Config(
    **small(pad_token_id=0),
    original_max_position_embeddings=16,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 3.0, 5.0, 7.0],
        "original_max_position_embeddings": 16,
    },
)


def test_longrope_follows_no_neighbour(tmp_path: Path) -> None:
    """A short request answers the same alone and beside a long one, computed at once and token by token."""
    folder = save_model(tmp_path / "longrope", LONGROPE)
    with engine_of(folder, num_blocks=200) as engine:
        alone = Client(engine, b"short").token_ids
        beside = Client(engine, b"a long one, beyond the original length", replace(GREEDY, max_tokens=60))
        beside.wait_tokens(1)
        assert Client(engine, b"short").token_ids == alone
        beside.wait()
        at_once = Client(engine, [*b"short", *alone[:18]], replace(GREEDY, max_tokens=6))
        assert at_once.token_ids == alone[18:]


def test_longrope_is_chosen_by_the_longest_request(tmp_path: Path) -> None:
    """And KV of one choice is refused where the other was made."""
    folder = save_model(tmp_path / "longrope", LONGROPE)
    answers, fingerprints = [], set()
    for longest in (16, 64):
        with engine_of(folder, max_model_len=longest) as engine:
            answers.append(Client(engine, b"short", replace(GREEDY, max_tokens=8)).token_ids)
            fingerprints.add(engine.fingerprint)
    assert answers[0] == reference_greedy(folder, b"short", 8)  # never beyond the original length
    assert answers[1] != answers[0]
    assert len(fingerprints) == 2


def test_a_model_that_follows_the_longest_request_of_a_step_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers' LongRoPE does by itself."""
    folder = save_model(tmp_path / "longrope", LONGROPE)
    monkeypatch.setattr("kvbelt.engine.model.settle_longrope", lambda _model, _most: "")
    with pytest.raises(ModelError, match="follows the longest request of a step"):
        PagedModel(folder, torch.device("cpu"), torch.float32)


REFUSED = {
    "gpt-oss": (GptOssConfig(**small(num_local_experts=2, num_experts_per_tok=1)), "s_aux"),
    "bloom": (BloomConfig(vocab_size=260, hidden_size=48, n_layer=2, n_head=6), "in its own code"),
    "falcon": (FalconConfig(vocab_size=260, hidden_size=48, num_hidden_layers=2, num_attention_heads=6), "own code"),
    "gpt-neo": (
        GPTNeoConfig(vocab_size=260, hidden_size=48, num_layers=2, num_heads=6, attention_types=[[["global"], 2]]),
        "own code",
    ),
    "mpt": (MptConfig(vocab_size=260, d_model=48, n_layers=2, n_heads=6), "own code"),
    "xglm": (XGLMConfig(vocab_size=260, d_model=48, num_layers=2, attention_heads=6, ffn_dim=64), "own code"),
    "deepseek": (DeepseekV3Config(), "latent attention"),
    "mamba": (MambaConfig(vocab_size=260, hidden_size=48, num_hidden_layers=2, state_size=4), "linear_attention"),
    "t5": (T5Config(), "encoder-decoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_of_attention_are_refused(tmp_path: Path, name: str) -> None:
    """A model that would compute wrong tokens is refused at start, with the reason."""
    config, reason = REFUSED[name]
    if name in {"deepseek", "t5"}:  # refused by their configuration alone
        config.save_pretrained(tmp_path)
    else:
        save_model(tmp_path, config)
    with pytest.raises(ModelError, match=reason):
        PagedModel(tmp_path, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ('{"model_type": "?"}', "cannot be loaded"),
    ],
)
def test_folders_that_hold_no_model(tmp_path: Path, content: str | None, message: str) -> None:
    """The message names the folder and what is missing."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message) as refused:
        PagedModel(tmp_path, torch.device("cpu"), None)
    assert str(tmp_path) in str(refused.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """A wrong path is named."""
    with pytest.raises(ModelError, match="there is no folder"):
        Engine(EngineSettings(tmp_path / "nowhere"))


def test_missing_weights(tiny_llama: Path, tmp_path: Path) -> None:
    """A folder with a configuration but no weights is refused."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    with pytest.raises(ModelError, match="cannot be loaded"):
        PagedModel(tmp_path, torch.device("cpu"), None)


def test_bfloat16_runs(tiny_llama: Path) -> None:
    """In bf16 the KV takes half the memory and answers come."""
    with engine_of(tiny_llama, dtype="bfloat16") as engine:
        assert engine.layout.dtype == "bfloat16"
        assert engine.pool.storage.dtype is torch.bfloat16
        assert len(Client(engine, b"half as wide").token_ids) == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 4096}, "at most 512"),
        ({"max_model_len": 300, "num_blocks": 10}, "holds 40 tokens"),
        ({"num_blocks": 1}, "at least"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_llama: Path, changes: dict[str, int], message: str) -> None:
    """Lengths beyond the model or the memory are refused at start, with both numbers."""
    with pytest.raises(ModelError, match=message), engine_of(tiny_llama, **changes):
        pass


@pytest.mark.parametrize(
    "changes", [{"block_size": 0}, {"device": "tpu"}, {"dtype": "int4"}, {"max_batch_tokens": 2}, {"threads": 0}]
)
def test_settings_are_checked(changes: dict[str, object]) -> None:
    """A setting out of range is named."""
    with pytest.raises(ValueError, match=next(iter(changes))):
        EngineSettings(Path(), **changes)


def test_fingerprints(tiny_llama: Path, tmp_path: Path) -> None:
    """Copies agree; other weights, another configuration or another tokenizer do not."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_llama.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    original = fingerprint(tiny_llama)
    assert fingerprint(copy) == original
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert fingerprint(copy) != original
    (copy / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    for name in ("config.json", "tokenizer.json"):
        text = (copy / name).read_text()
        (copy / name).write_text(json.dumps(json.loads(text) | {"added": 1}))
        assert fingerprint(copy) != original
        (copy / name).write_text(text)
    assert fingerprint(copy) == original


def test_the_pool_is_the_layout(tiny_llama: Path) -> None:
    """Engine, layout and pool agree."""
    with engine_of(tiny_llama) as engine:
        assert engine.pool.storage.shape == (3, 64, 4, 2, 2, 8)
        assert engine.layout.block_bytes * 3 * 64 == engine.pool.storage.nbytes
        assert engine.max_model_len == 64 * 4
        assert engine.vocab_size == 260
        assert isinstance(engine.layout.order, str)
