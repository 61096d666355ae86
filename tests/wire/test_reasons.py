"""The registry of reasons and the code agree, and the proxy acts by it."""

import ast

import pytest

from kvbelt.wire.notification import ENDED_ON_PURPOSE
from kvbelt.wire.reasons import REASONS, Remedy, Where, as_word, find, of_transfer
from tests.wire import said_reasons

SOURCES = [file for file in said_reasons.SOURCE.rglob("*.py") if file.name != "reasons.py"]


def test_every_reason_that_is_said_is_registered():
    """A page, a metric and the proxy need its meaning."""
    missing = {word: place for word, place in said_reasons.said().items() if find(word) is None}
    assert not missing, "register in wire/reasons.py (or, no reason at all, list in tests/wire/said_reasons.py)"


def test_every_reason_that_is_registered_is_said():
    """The page explains no reason that cannot happen."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in SOURCES)
    unsaid = [reason.name for reason in REASONS if f'"{reason.name.removesuffix("*")}' not in text]
    assert not unsaid


def test_a_reason_is_registered_once():
    """A word has one meaning everywhere."""
    names = [reason.name for reason in REASONS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ('lose(peer, "stale_engine", "in detail")', {"stale_engine"}),
        ('raise Failed(reason="a_reason")', {"a_reason"}),
        ('reason = "one" if x else "other_one"', {"one", "other_one"}),
        ('problem = "out_of_order", f"committed when {x}"', {"out_of_order"}),
        ('return f"refused_{name}"', {"refused_*"}),
        ('class State(StrEnum):\n    WAITING = "waiting"', set()),
        ('x = "cpu"', set()),
    ],
)
def test_the_scan_finds_what_it_should(code, words):
    """The tests above depend on this scan."""
    assert {word for word, _ in said_reasons._all_words(ast.parse(code))} == words


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ('Lost("no_belt", "this worker has no belt")', {"no_belt"}),
        ('RequestError("text", status=503, reason="no_decode_worker")', {"no_decode_worker"}),
        ('reason, detail = "prefill_lost", f"no answer"', {"prefill_lost"}),
        ('if message.reason in {"a", "b"}: pass', {"a", "b"}),
        ('answer = {"state": "failed", "reason": "bad_handoff"}', {"bad_handoff"}),
        ('self.outcome = "cached" if x else "deadline"', {"cached", "deadline"}),
        ('def _fill(self):\n    return "copy_failed"', {"copy_failed"}),
        ('choice = {"finish_reason": "stop"}', set()),
    ],
)
def test_the_scan_finds_reasons_by_their_places(code, words):
    """These are the reasons outside of the belt."""
    assert {word for word, _ in said_reasons._in_places(ast.parse(code), said_reasons.POSITIONS)} == words


def test_families_are_known_by_their_beginning():
    """A family's end is a field's name."""
    assert find("refused_anything").name == "refused_*"
    assert find("refused").name == "refused"
    assert find("nothing_known") is None


def test_what_is_not_known_is_tried_elsewhere_and_may_pass():
    """A newer worker may know more reasons."""
    unknown = of_transfer("a_new_word")
    assert unknown.remedy is Remedy.ELSEWHERE
    assert not unknown.lasting
    assert not unknown.of_pair


def test_only_a_pairs_failures_are_lasting():
    """Any other reason must not make the proxy avoid a pair."""
    for reason in REASONS:
        if reason.lasting:
            assert reason.where & Where.WARM, reason.name


def test_ends_on_purpose_are_registered():
    """They are ends of transfers, too."""
    for name in ENDED_ON_PURPOSE:
        assert find(name).where & Where.SEND


@pytest.mark.parametrize("said", [None, "", "two words", "a\r\nb: c", "x" * 65, "Ä", "UPPER"])
def test_only_a_word_is_fit_for_a_header(said):
    """Another process may send any text as its reason."""
    assert as_word(said, "otherwise") == "otherwise"
    assert as_word("refused_dtype", "otherwise") == "refused_dtype"


def test_the_scan_looks_into_every_folder():
    """Most reasons are in the folders of the proxy and of the belt."""
    folders = {place.rpartition("/")[0] for place in said_reasons.said().values()}
    assert folders >= {
        "proxy",
        "proxy/request",
        "proxy/workers",
        "transfer",
        "transfer/send",
        "transfer/receive",
        "vllm",
    }
