"""Twenty prompts: 5 to 1,500 tokens, texts and chats, English, Chinese and code."""

from typing import Any

_SENTENCES = (
    "The library opens at nine, and the librarian writes down every book that leaves the house.",
    "A conveyor belt carries the catalogued volumes to the desk where readers wait for them.",
    "Rivers bend where the stone is soft, and towns grow where the rivers bend.",
    "In the spring of that year the price of copper doubled, and the telegraph company stopped building.",
    "She measured the current twice, wrote both numbers down, and trusted neither of them.",
    "When the orchestra tuned, the hall went quiet, as if somebody had closed a window.",
)


def long_text(words: int, start: int = 0) -> str:
    """Plain prose of about so many words, different for each ``start``."""
    parts: list[str] = []
    number = start
    while sum(len(part.split()) for part in parts) < words:
        parts.append(f"{number + 1}. {_SENTENCES[number % len(_SENTENCES)]}")
        number += 1
    return " ".join(parts)


def _chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


TWENTY: list[dict[str, Any]] = [
    {"prompt": "The capital of France is"},
    {"prompt": "Once upon a time there was a small"},
    {"prompt": "def fibonacci(n):\n    if n < 2:\n        return n\n"},
    {"prompt": "1, 1, 2, 3, 5, 8, 13,"},
    {"prompt": "天空是蓝色的，因为"},
    {"prompt": "图书馆里有很多书，读者来这里"},
    {"prompt": "To make bread you need flour, water, salt and"},
    {"prompt": "SELECT name, age FROM users WHERE"},
    _chat("What is the capital of France?"),
    _chat("用中文介绍一下北京。"),
    _chat("Say hello in three languages."),
    _chat("My name is Ada.", "Hello Ada, how can I help you?", "What is my name?"),
    _chat("请把这句话翻译成英文：图书馆九点开门。"),
    _chat("Write a haiku about rivers."),
    {"prompt": long_text(90, start=1)},
    {"prompt": long_text(180, start=3)},
    _chat("Summarise this: " + long_text(250, start=2)),
    {"prompt": "请继续写下去：" + "从前有一座山，山里有一座庙，庙里有一个老和尚。" * 6},
    {"prompt": long_text(420, start=5)},
    {"prompt": long_text(1110, start=4)},
]


COMPLETION: dict[str, Any] = {"prompt": "The three most important things about rivers are", "max_tokens": 14}


CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Name three colours, then three animals."}],
    "max_tokens": 14,
}


OPTIONS: dict[str, dict[str, Any]] = {
    "all-filters": {"temperature": 1.2, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 15},
    "frequency": {"frequency_penalty": 1.5, "temperature": 0},
    "n": {"n": 3, "seed": 17},
    "min-tokens": {"min_tokens": 12, "stop": ["."], "temperature": 0},
}
