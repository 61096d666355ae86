"""The real model: the engine's tokens are those of transformers' own generate."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvbelt.engine.engine import Engine
from kvbelt.engine.settings import EngineSettings
from tests.engine.support import GREEDY, Client

QUESTIONS = [
    "What is the capital of France?",
    "用中文介绍一下北京。",
    "Write a haiku about the sea.",
    "1, 1, 2, 3, 5, 8,",
    "请把这句话翻译成英文:今天天气很好,我们去公园散步吧。",
    "def fibonacci(n):",
    "Summarise: " + "The quick brown fox jumps over the lazy dog and runs through the old forest. " * 36,
]

#: Tokens of each answer: few, because transformers' own are slow to make.
COUNT = 16
SHORT = replace(GREEDY, max_tokens=COUNT)


@pytest.fixture(scope="module")
def engine(demo_model: Path):
    """The demo model in fp32."""
    engine = Engine(EngineSettings(demo_model, device="cpu", dtype="float32", kv_bytes=256 << 20, threads=1))
    engine.start()
    yield engine
    engine.close()
    engine.validate()


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[list[int]]:
    """Chats, the last of about 600 tokens, and a plain text."""
    chats = [
        engine.tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"]
        for q in QUESTIONS
    ]
    chats[-2] = engine.tokenizer(QUESTIONS[-2])["input_ids"]
    assert 560 < len(chats[-1]) < 680
    return chats


@pytest.fixture(scope="module")
def expected(demo_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Transformers' own greedy answers."""
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=COUNT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def test_alone(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Each prompt is answered by itself."""
    assert [Client(engine, prompt, SHORT).token_ids for prompt in prompts] == expected


def test_eight_at_a_time(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """All and one twice at once, prompts and decodes mixed."""
    clients = [Client(engine, prompt, SHORT) for prompt in [*prompts, prompts[0]]]
    assert [client.token_ids for client in clients] == [*expected, expected[0]]


def test_text_is_the_decoded_answer(engine: Engine, prompts: list[list[int]]) -> None:
    """Streamed pieces, Chinese included, are the decoded answer."""
    for prompt in prompts[:2]:
        client = Client(engine, prompt, SHORT)
        assert client.text == engine.tokenizer.decode(client.token_ids, skip_special_tokens=True)


def test_it_knows_france(engine: Engine, prompts: list[list[int]]) -> None:
    """A sensible answer that ends by itself: template, weights and end token are right."""
    client = Client(engine, prompts[0], replace(GREEDY, ignore_eos=False, max_tokens=40))
    assert client.text == "The capital of France is Paris."
    assert client.finish == "stop"


def test_the_template_has_the_default_system_prompt(engine: Engine) -> None:
    """A chat without a system message gets SmolLM2's own."""
    text = engine.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face")
