"""How many tokens a prompt is taken to have."""

import json
import random

import pytest

from kvbelt.routing.token_count import BYTES_PER_TOKEN, MOST_RATIOS, TokenCounts, kind_of

ENGLISH = "The quick brown fox jumps over the lazy dog. " * 200
CHINESE = "快速的棕色狐狸跳过了懒狗。" * 200
BASE64 = "aGVsbG8gd29ybGQK" * 600


def as_json(value, **options):
    return json.dumps(value, **options).encode()


def messages(text):
    return as_json([{"role": "user", "content": text}])


def test_short_lists_of_ids_are_counted():
    counts = TokenCounts()
    for ids in ([5], [1, 2, 3], list(range(300))):
        for separators in ((",", ":"), None):
            assert counts.size_of("m", as_json(ids, separators=separators)).tokens == len(ids)


def test_several_lists_of_ids_are_counted_together():
    assert TokenCounts().size_of("m", b"[[1,2],[3,4,5]]").tokens == 5


def test_a_long_list_of_ids_is_counted_within_a_few_per_cent():
    choice = random.Random(1)
    ids = [choice.randrange(128_000) for _ in range(20_000)]
    assert TokenCounts().size_of("m", as_json(ids)).tokens == pytest.approx(len(ids), rel=0.05)


def test_text_begins_with_the_default():
    prompt = as_json(ENGLISH)
    assert TokenCounts().size_of("m", prompt).tokens == int(len(prompt) / BYTES_PER_TOKEN)


@pytest.mark.parametrize("length", [100, 5000])
def test_a_ratio_is_learnt_within_a_few_answers(length):
    counts = TokenCounts()
    prompt = as_json(ENGLISH[:length])
    for _ in range(5):
        counts.size_of("m", prompt).learn(len(prompt) // 2)
    assert counts.size_of("m", prompt).tokens == pytest.approx(len(prompt) / 2, rel=0.2)


def test_a_counted_prompt_has_its_count():
    size = TokenCounts().size_of("m", as_json(ENGLISH))
    size.learn(123)
    assert size.tokens == 123


def test_an_empty_prompt_has_a_token():
    assert TokenCounts().size_of("m", b'""').tokens == 1


def test_an_answer_that_counts_nothing_teaches_nothing():
    counts = TokenCounts()
    prompt = as_json(ENGLISH)
    before = counts.size_of("m", prompt).tokens
    counts.size_of("m", prompt).learn(0)
    assert counts.size_of("m", prompt).tokens == before


def test_models_and_kinds_of_text_are_learnt_apart():
    kinds = [
        as_json(ENGLISH), as_json(CHINESE, ensure_ascii=False), as_json(CHINESE), as_json(BASE64),
        as_json(ENGLISH[:200]), messages(ENGLISH), messages(BASE64),
    ]  # fmt: skip
    assert len({kind_of(prompt) for prompt in kinds}) == len(kinds)
    counts = TokenCounts()
    for model in ("one", "two"):
        for divisor, prompt in enumerate(kinds, start=2 if model == "one" else 9):
            for _ in range(20):
                counts.size_of(model, prompt).learn(len(prompt) // divisor)
    for model in ("one", "two"):
        for divisor, prompt in enumerate(kinds, start=2 if model == "one" else 9):
            assert counts.size_of(model, prompt).tokens == pytest.approx(len(prompt) / divisor, rel=0.1)


def test_a_client_cannot_make_it_grow_without_end():
    counts = TokenCounts()
    for number in range(2 * MOST_RATIOS):
        counts.size_of(f"model {number}", b'"hello"')
    assert len(counts._ratios) == MOST_RATIOS
