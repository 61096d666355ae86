"""What a decode worker holds of a prompt does not travel again, and no answer changes by it."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvbelt.ops.deployment import SyncDeployment, running
from tests.e2e.asking import ask, assert_same, counters, health, metric, until
from tests.e2e.conftest import deployment_spec
from tests.e2e.prompts import long_text

pytestmark = pytest.mark.e2e

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
HEAD = long_text(160, start=17)
#: Sixteen tokens a step: a prompt takes long enough for something to happen meanwhile.
SLOW = ("--max-batch-tokens", "16", "--max-running", "4")
QUESTIONS = (" What opens at nine?", " Which price doubled, and in which spring?", " Who measured the current?")


def test_a_shared_beginning_travels_once(one_p_one_d: SyncDeployment, aggregated: SyncDeployment) -> None:
    """Prompts with one long beginning: the second sends its tail only; answers are the aggregated server's."""
    decode = one_p_one_d.process("decode-0")
    came, reused = [], []
    for question in QUESTIONS:
        body = {"prompt": HEAD + question, **GREEDY}
        before = counters(decode)
        answer = ask(one_p_one_d.url, body, stream=False)
        assert answer.path.startswith("first-token")
        assert_same(answer, ask(aggregated.url, body, stream=False))
        until(lambda before=before: counters(decode) != before, what="the transfer counted")
        after = counters(decode)
        came.append(after[0] - before[0])
        reused.append(after[1] - before[1])
    assert reused[0] == 0
    for tail, spared in zip(came[1:], reused[1:], strict=True):
        assert 0 < tail < came[0] / 3
        assert spared > came[0] / 2
    assert metric(one_p_one_d.process("prefill-0"), "kvbelt_prefix_cache_hit_tokens_total") > 0


def test_a_conversation_sends_its_new_turn(one_p_one_d: SyncDeployment, aggregated: SyncDeployment) -> None:
    """The answer that the decode worker wrote is a part of what it holds of the next turn."""
    decode = one_p_one_d.process("decode-0")
    messages = [{"role": "user", "content": "Tell me about rivers. " + long_text(60, start=31)}]
    for turn in ("And about bridges?", "Thank you. One word more?"):
        body = {"messages": messages, "temperature": 0, "max_tokens": 40}
        answer = ask(one_p_one_d.url, body, stream=True)
        assert_same(answer, ask(aggregated.url, body, stream=False))
        messages += [{"role": "assistant", "content": answer.texts[0]}, {"role": "user", "content": turn}]
    before = counters(decode)
    ask(one_p_one_d.url, {"messages": messages, "temperature": 0, "max_tokens": 4}, stream=False)
    until(lambda: counters(decode) != before, what="the transfer counted")
    came, reused = (now - then for now, then in zip(counters(decode), before, strict=True))
    assert came < reused


def test_a_worker_that_has_answered_computes_what_is_new(aggregated: SyncDeployment) -> None:
    """Of a conversation's next turn, the former prompt and its answer are cached, but for the answer's last token."""
    prompt, kept = list(range(100, 140)), 0
    for turn in range(3):
        body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        answer = ask(aggregated.url, body, stream=False)
        assert answer.cached_tokens == kept
        kept = (len(prompt) + 40 - 1) // 16 * 16
        prompt = [*prompt, *answer.token_ids[0], *range(600 + turn, 620 + turn)]


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 5}], ids=["first-token", "re-derive"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_cached_tokens_are_counted_on_every_road(one_p_one_d: SyncDeployment, fields: Any, stream: bool) -> None:
    """They are those that the prefill worker did not have to compute."""
    prompt = f"{stream} {fields} {long_text(50, start=61)}"
    body = {"prompt": prompt, "max_tokens": 4, "stream": stream, **fields}
    if stream:
        body["stream_options"] = {"include_usage": True}
    seen = []
    for _ in range(2):
        answer = httpx.post(one_p_one_d.url + "/v1/completions", json=body, timeout=120)
        said = answer.text.split("data: ")[-2] if stream else answer.text
        seen.append(json.loads(said)["usage"])
    first, second = (usage["prompt_tokens_details"]["cached_tokens"] for usage in seen)
    assert first < 16
    assert second == (seen[1]["prompt_tokens"] - 1) // 16 * 16


def test_a_salt_shares_nothing(one_p_one_d: SyncDeployment, aggregated: SyncDeployment) -> None:
    """A prompt under another ``cache_salt`` travels whole, whatever is held."""
    decode = one_p_one_d.process("decode-0")
    prompt = long_text(120, start=41)
    reused = []
    for salt in ("one", "one", "two"):
        body = {"prompt": prompt, **GREEDY, "cache_salt": salt}
        before = counters(decode)
        answer = ask(one_p_one_d.url, body, stream=False)
        assert answer.path.startswith("first-token")
        assert_same(answer, ask(aggregated.url, body, stream=False))
        until(lambda before=before: counters(decode) != before, what="the transfer counted")
        reused.append(counters(decode)[1] - before[1])
    assert reused[0] == 0
    assert reused[1] > 0
    assert reused[2] == 0


@pytest.fixture
def cramped(small_model: Path) -> Iterator[SyncDeployment]:
    """A 1p1d with room for 60 blocks of KV in each worker."""
    with running(
        deployment_spec(small_model, "1p1d", kv_gb=0.00394, max_model_len=900, worker_args=SLOW)
    ) as deployment:
        yield deployment


def test_what_was_promised_and_evicted_is_computed(cramped: SyncDeployment, aggregated: SyncDeployment) -> None:
    """Blocks that were not sent, and are gone when the request gets its memory: it computes them, and says so."""
    decode = cramped.process("decode-0")
    prompt = long_text(130, start=7)
    ask(cramped.url, {"prompt": prompt, **GREEDY}, stream=False)
    load = health(decode)["load"]
    assert (load["blocks_total"], load["blocks_cached"] > 8) == (60, True)

    # While its tail is being computed, another request takes nearly all of the decode worker's memory.
    body = {"prompt": prompt + " And then? " + long_text(380, start=211), **GREEDY}
    other = {"prompt": long_text(580, start=1001), **GREEDY}
    with ThreadPoolExecutor() as threads:
        answering = threads.submit(ask, cramped.url, body, stream=False)
        until(lambda: health(decode)["belt"]["bytes_reserved"], what="a promise of what need not be sent")
        taken = httpx.post(decode.url + "/v1/completions", json=other, timeout=120)
        assert taken.json()["usage"]["prompt_tokens"] > 50 * 16
        answer = answering.result()
    assert answer.path == "local; reason=prefix_evicted"
    assert_same(answer, ask(aggregated.url, body, stream=False))
    assert counters(decode)[1] > 0
