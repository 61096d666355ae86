"""Recovery times, participants, and the effect on other requests."""

from kvbelt.ops.chaos.effect import Effect, percentile, seconds_to_first_token
from kvbelt.ops.chaos.ledger import Judged
from kvbelt.ops.chaos.participants import Participants, participants_of
from kvbelt.ops.chaos.recovery import RightAnswer, recoveries
from kvbelt.ops.chaos.verdict import Outcome
from kvbelt.wire.request_record import REQUEST_RECORD
from tests.ops.chaos.support import injected
from tests.ops.support import request_record

WORKERS = ["prefill-0", "prefill-1", "decode-0", "decode-1"]


def test_recovery_ends_with_the_first_right_answer_that_used_the_worker():
    """Answers of others, and those before the healing, do not count."""
    moments = [(11.0, "decode-0:80"), (12.5, "decode-1:80"), (14.0, "decode-0:80"), (13.0, "decode-0:80")]
    answers = [RightAnswer(ended, frozenset({worker})) for ended, worker in moments]
    assert recoveries([injected()], answers, WORKERS) == {1: 1.0}


def test_a_fault_without_a_target_is_over_with_any_right_answer():
    """This holds for bursts, clients that leave, and the proxy."""
    fault = injected("full-buffer", target=None)
    assert recoveries([fault], [RightAnswer(12.5, frozenset())], WORKERS) == {1: 0.5}


def test_a_recovery_that_another_fault_interrupts_is_not_counted():
    """A fault of another worker, or a later one, does not interrupt."""
    answers = [RightAnswer(20.0, frozenset({"decode-0:80"}))]
    again = injected(began=13.0, healed=14.0, number=2)
    assert recoveries([injected(), again], answers, WORKERS) == {2: 6.0}
    other = injected(target="decode-1", began=13.0, healed=14.0, number=2)
    later = injected(began=21.0, healed=22.0, number=3)
    assert recoveries([injected(), other, later], answers, WORKERS) == {1: 8.0}


def test_a_recovery_that_could_not_be_observed_is_not_counted():
    """The proxy was restarting, or every partner was disabled; one partner is enough, and rubbish disables none."""
    answers = [RightAnswer(20.0, frozenset({"decode-0:80"}))]
    proxy = injected("restart-proxy", target=None, began=13.0, healed=14.0, number=2)
    assert 1 not in recoveries([injected(), proxy], answers, WORKERS)
    first = injected("cut-prefill", target="prefill-0", began=13.0, healed=14.0, number=2)
    second = injected("kill-prefill", target="prefill-1", began=15.0, healed=21.0, number=3)
    assert 1 not in recoveries([injected(), first, second], answers, WORKERS)
    assert recoveries([injected(), first], answers, WORKERS)[1] == 8.0
    rubbish = injected("rubbish-http", target="prefill-1", began=15.0, healed=21.0, number=3)
    assert recoveries([injected(), first, rubbish], answers, WORKERS)[1] == 8.0


def test_no_answer_no_recovery():
    """Without a right answer there is no recovery."""
    assert recoveries([injected()], [], WORKERS) == {}


def taking_part(path="first-token", **changes):
    """Participants of a request with h:1 and h:3 as its workers."""
    decision = {"path": path, "reason": None, "meaning": None}
    record = request_record(workers={"prefill": "h:1", "decode": "h:3"}, decision=decision, **changes)
    return participants_of(REQUEST_RECORD.convert(record, "the proxy"), ADDRESSES)


def attempt(worker, reason):
    """One leg."""
    return {"leg": "decode", "worker": worker, "transfer_id": None, "began_ms": 0.0, "answered_ms": None,
            "ended_ms": None, "reason": reason, "detail": "", "transfer": None}  # fmt: skip


ADDRESSES = frozenset({"h:1", "h:2", "h:3"})


def test_participants_of_a_request():
    """A local answer used the decode worker only, a prefill-only one the prefill worker."""
    assert taking_part() == Participants("h:1", "h:3", frozenset())
    assert taking_part("local").used == {"h:3"}
    assert taking_part("prefill-only").used == {"h:1"}


def test_troubled_workers_of_a_request():
    """A worker is troubled if an error names it or an attempt with it failed."""
    assert taking_part(errors=["decode_lost: worker h:2 is lost"]).troubled == {"h:2"}
    assert taking_part(attempts=[attempt("h:2", "decode_lost"), attempt("h:3", None)]).troubled == {"h:2"}


def test_other_requests_are_those_without_the_stopped_worker():
    """Only right streamed answers that began in the window and avoided the worker count."""
    participants = {
        "a": Participants("h:1", "h:3", frozenset()),
        "b": Participants("h:1", "h:2", frozenset()),
        "c": Participants("h:1", "h:3", frozenset({"h:2"})),
    }
    judged = [Judged(name, Outcome.RIGHT, 10.0, 12.0, 10.5) for name in ("a", "b", "c", "unknown")]
    judged += [Judged("a", Outcome.WRONG, 10.0, 12.0, 11.0), Judged("a", Outcome.RIGHT, 10.0, 12.0, None),
               Judged("a", Outcome.RIGHT, 30.0, 32.0, 31.0)]  # fmt: skip
    assert seconds_to_first_token(judged, participants, 9.0, 20.0, without="h:2") == (0.5,)


def test_the_ratio_is_of_the_99th_percentiles():
    """It uses the nearest rank, and is None without requests on both sides."""
    assert percentile(range(1, 101), 99) == 99
    assert percentile([3.0], 50) == 3.0
    assert Effect("decode-1", (0.1, 0.2), (0.3, 0.4)).ratio == 2.0
    assert Effect("decode-1", (), (0.3,)).ratio is None
