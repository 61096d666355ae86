"""What workers are believed to hold, compared with the prompts that they have."""

import json
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbelt.routing.prefixes import _ENDS, MOST_NAMED, Prefix, Prefixes

CHUNKS = [letter * size for letter, size in (("a", 300), ("b", 1024), ("c", 1700), ("d", 4000))]
WORKERS = ["one", "two", "three"]


def text(chunks):
    return "".join(CHUNKS[chunk] for chunk in chunks)


def prefix(prompt, tokens=None, beside=b""):
    """One token a byte, unless said otherwise."""
    raw = json.dumps(prompt).encode()
    return Prefix(raw, len(raw) if tokens is None else tokens, beside)


def fleet(*names, capacity=None):
    prefixes = Prefixes()
    for name in names or WORKERS:
        prefixes.join(name, capacity)
    return prefixes


def common(one, other):
    """Bytes of the two prompts that are equal, the quote before them included."""
    return 1 + len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def blocks_in(size):
    return max(end for end in _ENDS if end <= size)


PROMPTS = st.lists(st.integers(0, len(CHUNKS) - 1), max_size=6).map(text)
CHATS = st.lists(st.integers(0, len(CHUNKS) - 1), max_size=4).map(lambda chunks: [said(CHUNKS[one]) for one in chunks])


def said(content, role="user"):
    return {"role": role, "content": content}


@given(st.lists(st.tuples(st.sampled_from(WORKERS), PROMPTS), max_size=12), PROMPTS)
@settings(max_examples=200, deadline=None)
def test_workers_hold_what_was_sent_to_them(sent, wanted):
    """No more than the longest common beginning, and no less than its whole blocks."""
    prefixes = fleet()
    for worker, prompt in sent:
        prefixes.sent(prefix(prompt), worker)
    held = prefixes.held(prefix(wanted))
    for worker in WORKERS:
        most = max((common(prompt, wanted) for name, prompt in sent if name == worker), default=0)
        assert blocks_in(most) <= held.get(worker, 0) <= most


@given(st.lists(st.tuples(st.sampled_from(WORKERS), PROMPTS | CHATS, st.integers(0, 3)), max_size=30))
@settings(max_examples=100, deadline=None)
def test_memory_is_bounded_and_given_back(sent):
    prefixes = fleet(capacity=20_000)
    for worker, prompt, what in sent:
        one = prefix(prompt)
        believed = prefixes.sent(one, worker)
        if what >= 1:
            prefixes.generated(one, worker, 500 * what)
        if what >= 2:
            prefixes.answered(one, worker)
            prefixes.counted(one, worker, believed, 0 if what == 2 else believed)
        for state in prefixes._workers.values():
            assert 0 <= state.tokens <= state.bound <= state.capacity
            assert state.promised <= state.blocks.keys()
    for worker in WORKERS:
        prefixes.leave(worker)
    assert not prefixes._holders
    assert not prefixes._rests


def test_the_next_turn_is_held_with_the_answer_before_it():
    prefixes = fleet()
    first = prefix("a" * 5000, tokens=1000)
    prefixes.sent(first, "one")
    prefixes.sent(first, "two")
    prefixes.generated(first, "two", 300)
    per_token = 5002 / 1000
    held = prefixes.held(prefix("a" * 5000 + "b" * 2502, tokens=1500))
    assert held == {"one": pytest.approx(5001 / per_token, abs=1), "two": pytest.approx(5001 / per_token + 300, abs=1)}


def test_the_next_turn_of_a_chat_begins_with_the_one_before():
    prefixes = fleet()
    said = [{"role": "user", "content": "a" * 3000}]
    first, second = (
        Prefix(json.dumps(turns).encode(), 3000) for turns in (said, [*said, {"role": "assistant", "content": "b"}])
    )
    prefixes.sent(first, "one")
    assert prefixes.held(second)["one"] == int(first.size * second.per_byte)


@given(
    system=st.sampled_from([0, 300, 2100]),
    asked=st.lists(st.text(max_size=40), min_size=1, max_size=30, unique=True),
    answer=st.sampled_from([10, 3000]),
    separators=st.sampled_from([None, (",", ":")]),
    content_first=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_of_many_conversations_each_is_found_with_its_answer(system, asked, answer, separators, content_first):
    """However short they begin, however many begin alike, and however their client writes JSON."""

    def raw(messages):
        if content_first:
            messages = [dict(reversed(one.items())) for one in messages]
        written = json.dumps(messages, separators=separators).encode()
        return Prefix(written, len(written))

    prefixes = fleet(*(f"w{number}" for number in range(len(asked))))
    for number, question in enumerate(asked):
        first = raw([said("s" * system, "system"), said(question)])
        prefixes.sent(first, f"w{number}")
        prefixes.generated(first, f"w{number}", 77)
    for number, question in enumerate(asked):
        begun = [said("s" * system, "system"), said(question)]
        held = prefixes.held(raw([*begun, said("b" * answer, "assistant"), said("and more")]))
        assert held[f"w{number}"] == raw(begun).size + 77
        assert all(tokens < held[f"w{number}"] for name, tokens in held.items() if name != f"w{number}")


def test_a_short_chat_proves_nothing():
    """It may be shorter than a worker's blocks, which then cannot hold it."""
    prefixes = fleet()
    for _ in range(5):
        assert answer(prefixes, prefix([said("hello")]), "one", 0) == 0
    assert prefixes.useful


def test_a_text_that_looks_like_messages_has_none():
    prefixes = fleet()
    quoted = 'Hello {},{"role":"user","content":"x"'
    prefixes.sent(prefix([said("Hello {")]), "one")
    assert prefixes.held(prefix([said(quoted)])) == {}


def test_prompts_beside_other_tools_share_nothing():
    prefixes = fleet()
    prefixes.sent(prefix("a" * 5000, beside=b"a tool"), "one")
    assert prefixes.held(prefix("a" * 5000, beside=b"another")) == {}


def test_a_prompt_without_a_whole_block_is_not_looked_for():
    prefixes = fleet()
    prefixes.sent(prefix("short"), "one")
    assert prefixes.held(prefix("short and more")) == {}


def test_the_oldest_is_forgotten_first():
    prefixes = fleet(capacity=10_000)
    for letter in "abca":
        prefixes.sent(prefix(letter * 4000), "one")
    assert [bool(prefixes.held(prefix(letter * 4000))) for letter in "abc"] == [True, False, True]


def test_an_incarnation_that_has_ended_holds_nothing():
    prefixes = fleet()
    prompt = prefix("a" * 5000)
    prefixes.sent(prompt, "one")
    prefixes.leave("one")
    prefixes.join("one again")
    assert prefixes.held(prompt) == {}


def test_there_is_nothing_to_choose_with_one_worker():
    prefixes = fleet("one")
    assert not prefixes.useful
    prefixes.join("two")
    assert prefixes.useful
    prefixes.leave("one")
    assert not prefixes.useful


def test_a_look_up_names_those_that_hold_most():
    names = [f"w{number}" for number in range(20)]
    prefixes = fleet(*names)
    for number, name in enumerate(names):
        prefixes.sent(prefix("a" * 1024 * (1 + number // 5) + name), name)
    held = prefixes.held(prefix("a" * 8192))
    assert len(held) == MOST_NAMED
    assert set(names[15:]) < set(held)


def test_of_equal_workers_a_look_up_names_others_each_time():
    names = [f"w{number}" for number in range(3 * MOST_NAMED)]
    prefixes = fleet(*names)
    prompt = prefix("a" * 5000)
    for name in names:
        prefixes.sent(prompt, name)
    named = [frozenset(prefixes.held(prompt)) for _ in range(3)]
    assert set().union(*named) == set(names)


def answer(prefixes, prompt, worker, cached):
    """What the worker was believed to hold when the prompt was sent."""
    believed = prefixes.sent(prompt, worker)
    prefixes.answered(prompt, worker)
    prefixes.counted(prompt, worker, believed, cached)
    return believed


def test_a_worker_that_had_to_compute_what_it_held_is_believed_less():
    """The oldest half of what it holds is forgotten, the prompt that it has just computed is not."""
    prefixes = fleet()
    prompts = [prefix(letter * 4000) for letter in "abcdef"]
    for prompt in prompts:
        answer(prefixes, prompt, "one", 0)
    assert answer(prefixes, prompts[0], "one", 0) > 3000
    assert [bool(prefixes.held(prompt)) for prompt in prompts] == [True, False, False, False, True, True]


def test_a_worker_without_a_prefix_cache_is_soon_asked_no_more():
    prefixes = fleet("one", "two")
    prompt = prefix("a" * 4000)
    for _ in range(4):
        for worker in ("one", "two"):
            answer(prefixes, prompt, worker, 0)
    assert not prefixes.useful
    answer(prefixes, prompt, "one", 3000)
    assert prefixes.useful


def test_a_worker_that_is_believed_rightly_is_believed_more_again():
    prefixes = fleet("one", "two", capacity=100_000)
    prompts = [prefix(letter * 4000) for letter in "abcdef"]
    for prompt in prompts:
        answer(prefixes, prompt, "one", 0)
    answer(prefixes, prompts[0], "one", 0)
    for _ in range(20):
        answer(prefixes, prompts[0], "one", 4000)
    for prompt in prompts:
        prefixes.sent(prompt, "one")
    assert all(prefixes.held(prompt) for prompt in prompts)


def test_a_prompt_that_is_still_being_computed_proves_nothing():
    """The second of two equal prompts in one step is computed, too."""
    prefixes = fleet()
    prompt = prefix("a" * 4000)
    assert prefixes.sent(prompt, "one") == 0
    assert prefixes.held(prompt)
    believed = prefixes.sent(prompt, "one")
    prefixes.answered(prompt, "one")
    prefixes.counted(prompt, "one", believed, 0)
    assert believed == 0
    assert prefixes.held(prompt)
    assert prefixes.sent(prompt, "one") > 3000


def test_a_worker_that_does_not_say_what_it_had_is_believed():
    prefixes = fleet()
    prompt = prefix("a" * 4000)
    for _ in range(5):
        answer(prefixes, prompt, "one", None)
    assert prefixes.held(prompt)


def test_a_worker_that_counts_only_what_it_had_is_understood():
    prefixes = fleet()
    prompt = prefix("a" * 4000)
    for cached in (None, 3000, None):
        answer(prefixes, prompt, "one", cached)
    assert not prefixes.held(prompt)


def test_a_worker_that_says_how_much_fits_it_holds_no_more():
    prefixes = fleet()
    for letter in "abc":
        prefixes.sent(prefix(letter * 4000), "one")
    prefixes.join("one", 5000)
    assert [bool(prefixes.held(prefix(letter * 4000))) for letter in "abc"] == [False, False, True]
