"""Blocks of equal prefixes are shared, and no answer changes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvbelt.engine.api import FinishReason, PrefixHashes, SamplingParams
from kvbelt.engine.engine import Engine
from kvbelt.engine.scheduler import Scheduler
from kvbelt.wire.block_hash import chained, root
from tests.engine.support import GREEDY, Carrier, Client, abort_while_computed, between_steps, engine_of, prefix_of

HEAD = list(b"what everybody's prompt begins with: ")
TAILS = [list(b"and one"), list(b"another, and a longer one"), list(b"a third"), list(b"and one")]
PROMPTS = [HEAD + tail for tail in TAILS]
BLOCK = 4


def asked(engine: Engine, prompt: Sequence[int], params: SamplingParams = GREEDY, *, salt: str = "", **more) -> Client:
    """A request that shares its blocks."""
    return Client(engine, prompt, params, prefix=prefix_of(prompt, BLOCK, salt), **more)


def answers_without(folder: Path, prompts: Sequence[Sequence[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    """The answers without sharing."""
    with engine_of(folder, num_blocks=200) as engine:
        return [Client(engine, prompt, params).token_ids for prompt in prompts]


def test_a_prefix_is_computed_once(tiny_llama: Path) -> None:
    """The second request computes only what follows the common blocks, and its answer is the same."""
    with engine_of(tiny_llama) as engine:
        clients = [asked(engine, prompt).wait() for prompt in PROMPTS]
        load = engine.load()
    assert [client.token_ids for client in clients] == answers_without(tiny_llama, PROMPTS)
    common = len(HEAD) // BLOCK * BLOCK
    timings = [client.last.timing for client in clients]
    # The last prompt was asked before: all but the block of its last token is there.
    whole = (len(PROMPTS[3]) - 1) // BLOCK * BLOCK
    assert [timing.cached_tokens for timing in timings] == [0, common, common, whole]
    assert [timing.computed_tokens for timing in timings] == [
        len(prompt) - timing.cached_tokens for prompt, timing in zip(PROMPTS, timings, strict=True)
    ]
    assert load.cache_query_tokens_total == sum(map(len, PROMPTS))
    assert load.cache_hit_tokens_total == 2 * common + whole
    assert load.prompt_tokens_total == load.cache_query_tokens_total - load.cache_hit_tokens_total
    assert load.blocks_free == load.blocks_total
    assert load.blocks_cached > 0


def test_an_answer_is_part_of_the_next_prompt(tiny_llama: Path) -> None:
    """A conversation also reuses its answer's blocks."""
    with engine_of(tiny_llama) as engine:
        first = asked(engine, PROMPTS[0]).token_ids
        turn = PROMPTS[0] + first + list(b" go on")
        client = asked(engine, turn).wait()
        # The last token of an answer is never computed, so its block may be missing.
        assert client.last.timing.cached_tokens == (len(PROMPTS[0]) + len(first) - 1) // BLOCK * BLOCK
    assert client.token_ids == answers_without(tiny_llama, [turn])[0]


@pytest.mark.parametrize("num_blocks", [200, 24])
@pytest.mark.parametrize("seed", [None, 7])
def test_many_at_once_answer_the_same(tiny_llama: Path, num_blocks: int, seed: int | None) -> None:
    """Sharing changes no token: side by side, in small chunks, preempted or not, greedy or seeded."""
    params = GREEDY if seed is None else replace(GREEDY, temperature=1.0, seed=seed)
    expected = answers_without(tiny_llama, PROMPTS, params)
    with engine_of(tiny_llama, num_blocks=num_blocks, max_batch_tokens=7, max_running=6) as engine:
        for _ in range(3):
            with between_steps(engine):
                clients = [asked(engine, prompt, params) for prompt in PROMPTS]
            assert [client.token_ids for client in clients] == expected
        load = engine.load()
    assert load.cache_hit_tokens_total > 0
    assert (load.preemptions_total > 0) is (num_blocks == 24)


def test_salts_share_nothing(tiny_llama: Path) -> None:
    """A prompt under another salt finds none of the blocks."""
    with engine_of(tiny_llama) as engine:
        asked(engine, PROMPTS[0], salt="one").wait()
        assert asked(engine, PROMPTS[0], salt="two").last.timing.cached_tokens == 0
        assert asked(engine, PROMPTS[0], salt="one").last.timing.cached_tokens > 0


def test_it_can_be_switched_off(tiny_llama: Path) -> None:
    """Without prefix caching every prompt is computed whole."""
    with engine_of(tiny_llama, prefix_caching=False) as engine:
        for _ in range(2):
            assert asked(engine, PROMPTS[0]).last.timing.computed_tokens == len(PROMPTS[0])
        assert engine.load().blocks_cached == 0


def test_hashes_of_other_blocks_are_refused(tiny_llama: Path) -> None:
    """Hashes for another block size are refused."""
    with engine_of(tiny_llama) as engine, pytest.raises(ValueError, match="block hashes"):
        Client(engine, PROMPTS[0], prefix=prefix_of(PROMPTS[0], 2 * BLOCK))


@pytest.mark.parametrize("phase", ["prefill", "decoding"])
def test_an_aborted_request_leaves_what_it_computed(tiny_llama: Path, phase: str) -> None:
    """Its complete blocks are found afterwards, with the right contents."""
    prompt = HEAD * 3
    with engine_of(tiny_llama, max_batch_tokens=4, max_running=2) as engine:
        if phase == "prefill":
            abort_while_computed(engine, "victim")
        params = replace(GREEDY, max_tokens=100)
        victim = asked(engine, prompt, params, name="victim", abort_at=3 if phase == "decoding" else None)
        assert victim.finish is FinishReason.ABORT
        assert asked(engine, prompt).token_ids == answers_without(tiny_llama, [prompt])[0]


def test_cached_blocks_are_announced_with_the_first_chunk(tiny_llama: Path) -> None:
    """A carrier gets every block of every layer once, whether it was computed or cached."""
    prompt = PROMPTS[1]
    with engine_of(tiny_llama, max_batch_tokens=8, max_running=4) as engine:
        plain, sharing = Carrier(engine), Carrier(engine)
        Client(engine, prompt, replace(GREEDY, max_tokens=1), outgoing=plain).wait()
        asked(engine, HEAD, replace(GREEDY, max_tokens=1)).wait()
        client = asked(engine, prompt, replace(GREEDY, max_tokens=1), outgoing=sharing).wait()
        found = client.last.timing.cached_tokens // BLOCK
        assert found > 0
        firsts = [first for layer, first, _ in sharing.calls if layer == 0]
        assert firsts[0] == 0
        assert len(sharing.calls[0][2]) > found
        assert sharing.copied.keys() == plain.copied.keys()
        last = len(prompt) % BLOCK
        for (layer, block), kv in sharing.copied.items():
            tokens = last if block == len(prompt) // BLOCK else BLOCK
            assert kv[:tokens].allclose(plain.copied[layer, block][:tokens], atol=1e-4)
        plain.hold.release()
        sharing.hold.release()


def unchained(tokens: Sequence[int]) -> PrefixHashes:
    """A mutant: a block's hash does not depend on the blocks before it."""
    hashes = [chained(root(), tokens[at : at + BLOCK]) for at in range(0, len(tokens) - BLOCK + 1, BLOCK)]
    return PrefixHashes(root(), tuple(hashes), lambda _parent, ids: chained(root(), ids))


def test_names_without_a_chain_would_be_seen(tiny_llama: Path) -> None:
    """Hashes that do not depend on earlier blocks give wrong answers."""
    prompts = [list(b"aaaa") + HEAD, list(b"bbbb") + HEAD]
    expected = answers_without(tiny_llama, prompts)
    with engine_of(tiny_llama) as engine:
        assert [asked(engine, prompt).token_ids for prompt in prompts] == expected
    # With names of the mutant's making the second prompt's first block differs, and the rest is found.
    with engine_of(tiny_llama) as engine:
        mutants = [*map(unchained, prompts)]
        mixed = replace(mutants[1], hashes=mutants[0].hashes[:1] + mutants[1].hashes[1:])
        answers = [
            Client(engine, prompt, prefix=names).token_ids
            for prompt, names in zip(prompts, (mutants[0], mixed), strict=True)
        ]
    assert answers != expected


def test_blocks_published_too_early_would_be_seen(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails leaves nothing for others to find; blocks published at their admission would be found."""
    prompt = HEAD * 2
    expected = answers_without(tiny_llama, [prompt])[0]

    def answer_after_a_failure() -> list[int]:
        with engine_of(tiny_llama) as engine:
            engine.pool.storage.fill_(3.0)  # not zeros, which would do little harm

            def failing(*_: object) -> None:
                raise RuntimeError("out of luck")

            with monkeypatch.context() as patch:
                patch.setattr(engine._model, "forward", failing)
                assert asked(engine, prompt).finish is FinishReason.ERROR
            return asked(engine, prompt).token_ids

    assert answer_after_a_failure() == expected
    admit = Scheduler._admit

    def published_at_admission(self: Scheduler, sequence):
        load = admit(self, sequence)
        computed, sequence.computed = sequence.computed, sequence.prompt_len
        self._publish(sequence)
        sequence.computed, sequence.published = computed, computed // BLOCK
        return load

    monkeypatch.setattr(Scheduler, "_admit", published_at_admission)
    assert answer_after_a_failure() != expected
