"""How long a fault was felt, who took part, and what it cost others."""

from kvbelt.ops.chaos.effect import Effect, percentile, seconds_to_first_token
from kvbelt.ops.chaos.ledger import Judged
from kvbelt.ops.chaos.recovery import Good, recoveries
from kvbelt.ops.chaos.trace import Trace, trace_of
from kvbelt.ops.chaos.verdict import Word
from tests.ops.chaos.support import injected

WORKERS = ["prefill-0", "prefill-1", "decode-0", "decode-1"]


def test_recovery_ends_with_the_first_right_answer_that_used_the_worker():
    """Answers of others, and those before the healing, do not count."""
    answers = [Good(11.0, frozenset({"decode-0:80"})), Good(12.5, frozenset({"decode-1:80"})),
               Good(14.0, frozenset({"decode-0:80"})), Good(13.0, frozenset({"decode-0:80"}))]  # fmt: skip
    assert recoveries([injected()], answers, WORKERS) == {1: 1.0}


def test_a_fault_of_nobody_in_particular_is_over_with_any_right_answer():
    """A burst, clients that leave, the proxy itself."""
    fault = injected("full-buffer", target=None)
    assert recoveries([fault], [Good(12.5, frozenset())], WORKERS) == {1: 0.5}


def test_a_recovery_that_another_fault_interrupts_is_not_counted():
    """It would tell of the other one. A fault of another worker, or a later one, is no interruption."""
    answers = [Good(20.0, frozenset({"decode-0:80"}))]
    again = injected(began=13.0, healed=14.0, number=2)
    assert recoveries([injected(), again], answers, WORKERS) == {2: 6.0}
    other = injected(target="decode-1", began=13.0, healed=14.0, number=2)
    later = injected(began=21.0, healed=22.0, number=3)
    assert recoveries([injected(), other, later], answers, WORKERS) == {1: 8.0}


def test_a_recovery_that_nobody_could_show_is_not_counted():
    """The proxy was away, or every partner was hurt; one partner is enough, and rubbish at the others hurts nobody."""
    answers = [Good(20.0, frozenset({"decode-0:80"}))]
    proxy = injected("restart-proxy", target=None, began=13.0, healed=14.0, number=2)
    assert 1 not in recoveries([injected(), proxy], answers, WORKERS)
    first = injected("cut-prefill", target="prefill-0", began=13.0, healed=14.0, number=2)
    second = injected("kill-prefill", target="prefill-1", began=15.0, healed=21.0, number=3)
    assert 1 not in recoveries([injected(), first, second], answers, WORKERS)
    assert recoveries([injected(), first], answers, WORKERS)[1] == 8.0
    rubbish = injected("rubbish-http", target="prefill-1", began=15.0, healed=21.0, number=3)
    assert recoveries([injected(), first, rubbish], answers, WORKERS)[1] == 8.0


def test_no_answer_no_recovery():
    """The load has ended, or the worker never came back: the invariants tell."""
    assert recoveries([injected()], [], WORKERS) == {}


RECORD = {
    "request_id": "r1",
    "decision": {"path": "first-token"},
    "workers": {"prefill": "h:1", "decode": "h:3"},
    "errors": [],
}
ADDRESSES = frozenset({"h:1", "h:2", "h:3"})


def test_who_took_part():
    """Of a local answer the decode worker alone, of a prefill-only one the prefill worker."""
    assert trace_of(RECORD, ADDRESSES) == Trace("h:1", "h:3", frozenset())
    assert trace_of(RECORD | {"decision": {"path": "local"}}, ADDRESSES).used == {"h:3"}
    assert trace_of(RECORD | {"decision": {"path": "prefill-only"}}, ADDRESSES).used == {"h:1"}


def test_who_failed_on_the_way():
    """Named in an error, or in an attempt that failed."""
    assert trace_of(RECORD | {"errors": ["decode_lost: worker h:2 is lost"]}, ADDRESSES).troubled == {"h:2"}
    attempts = [{"worker": "h:2", "reason": "decode_lost"}, {"worker": "h:3", "reason": None}]
    assert trace_of(RECORD | {"attempts": attempts}, ADDRESSES).troubled == {"h:2"}


def test_others_are_those_who_never_met_the_stopped_worker():
    """Streamed, right, begun in the window, and without the worker on its way."""
    traces = {
        "a": Trace("h:1", "h:3", frozenset()),
        "b": Trace("h:1", "h:2", frozenset()),
        "c": Trace("h:1", "h:3", frozenset({"h:2"})),
    }
    judged = [Judged(name, Word.RIGHT, 10.0, 12.0, 10.5) for name in ("a", "b", "c", "unknown")]
    judged += [Judged("a", Word.WRONG, 10.0, 12.0, 11.0), Judged("a", Word.RIGHT, 10.0, 12.0, None),
               Judged("a", Word.RIGHT, 30.0, 32.0, 31.0)]  # fmt: skip
    assert seconds_to_first_token(judged, traces, 9.0, 20.0, without="h:2") == (0.5,)


def test_the_ratio_is_of_the_99th_percentiles():
    """By nearest rank; unknown without requests on both sides."""
    assert percentile(range(1, 101), 99) == 99
    assert percentile([3.0], 50) == 3.0
    assert Effect("decode-1", (0.1, 0.2), (0.3, 0.4)).ratio == 2.0
    assert Effect("decode-1", (), (0.3,)).ratio is None
