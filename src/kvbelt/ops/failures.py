"""What can fail, when, and what becomes of it: the rows of ``docs/failures.md`` (``ops/draw_failures.py``).

A row is a promise, and names a test that shows it. Tests hold the rows to the code: reasons are those of
``wire/reasons.py``, metrics those that are exported, and the tests exist.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Failure:
    """One cause in one phase of a request."""

    cause: str
    phase: str
    client: str  #: what the client sees
    freed: str  #: what is given back, and when
    metrics: tuple[str, ...]  #: which count it
    reasons: tuple[str, ...]  #: which words say so
    shown_by: str  #: ``file::test``, from ``tests/``


@dataclass(frozen=True, slots=True)
class Group:
    """Failures of one part."""

    title: str
    failures: tuple[Failure, ...]


_ATTEMPTS = "kvbelt_proxy_failed_attempts_total"
_PATHS = "kvbelt_proxy_requests_total"
_ERRORS = "kvbelt_proxy_errors_total"
_BROKEN = "kvbelt_proxy_broken_streams_total"
_ENDED = "kvbelt_transfers_ended_total"
_HELD = "kvbelt_receive_bytes"
_PAIRS = "kvbelt_proxy_pairs"
_REFUSED = "kvbelt_refused_messages_total"

_ELSEWHERE = "200: another prefill worker reads the prompt, else the decode worker"
_ALONE = "200: the decode worker computes the prompt"
_SLOT = "decode: the slot, once the writer is known dead (same host) or has acknowledged; quarantined until then"
_NOTHING = "nothing is held"

_PREFILL = Group(
    "A prefill worker",
    (
        Failure(
            "gone or unreachable", "before the request", _ELSEWHERE, _NOTHING, (_ATTEMPTS, _PATHS),
            ("prefill_unreachable", "no_prefill_worker"),
            "proxy/test_failover.py::test_another_prefill_worker_takes_over",
        ),
        Failure(
            "killed", "while it reads the prompt", _ELSEWHERE, _SLOT, (_ATTEMPTS, _ENDED, _HELD),
            ("prefill_lost", "peer_lost", "lease"),
            "e2e/test_failover.py::test_workers_of_each_kind_are_killed_under_load",
        ),
        Failure(
            "stopped, or cut off", "while it reads the prompt",
            f"{_ELSEWHERE}, when its health has been silent for 3 s", _SLOT, (_ATTEMPTS, _ENDED, _HELD),
            ("prefill_lost", "lease"),
            "proxy/test_failover.py::test_a_prefill_worker_that_is_stopped_is_replaced_when_its_health_is_silent",
        ),
        Failure(
            "killed or stopped", "its first token is there, its KV is not", f"{_ALONE}; a stream says so in a comment",
            _SLOT, (_ATTEMPTS, _PATHS, _ENDED, _HELD), ("prefill_lost", "peer_lost", "lease"),
            "proxy/test_failures.py::test_a_prefill_worker_lost_while_its_kv_is_awaited",
        ),
        Failure(
            "killed or stopped", "its KV is committed", "200, as if nothing had happened", _NOTHING, (_PATHS,), (),
            "e2e/test_failures.py::test_prefill_killed_after_the_transfer",
        ),
        Failure(
            "answers 5xx, or nonsense", "while it reads the prompt", _ELSEWHERE, "prefill: blocks; decode: the slot",
            (_ATTEMPTS, _PATHS), ("prefill_5xx", "prefill_bad_answer"),
            "proxy/test_failover.py::test_another_prefill_worker_takes_over",
        ),
        Failure(
            "refuses the request (4xx)", "before it reads the prompt",
            "its refusal; a prompt that is too long for it alone goes to the decode worker", _NOTHING, (_ATTEMPTS,),
            ("prefill_refused",),
            "proxy/test_failures.py::test_a_prefill_worker_that_refuses_is_quoted",
        ),
        Failure(
            "started again", "at any time", "200; the new life is told of every decode worker before it gets requests",
            "decode: slots of the earlier life", (_PAIRS, _HELD), (),
            "proxy/test_warming.py::test_a_prefill_worker_that_comes_back_is_told_again",
        ),
    ),
)  # fmt: skip

_DECODE = Group(
    "A decode worker",
    (
        Failure(
            "gone, killed or unreachable", "before anything was said to the client",
            "200: another decode worker, with a prefill leg of its own; 503 with Retry-After if none is left",
            "prefill: blocks and staging, when its transfer fails", (_ATTEMPTS, _ERRORS, _ENDED),
            ("decode_unreachable", "decode_lost", "no_decode_worker", "peer_lost"),
            "proxy/test_failover.py::test_another_decode_worker_takes_over",
        ),
        Failure(
            "killed", "the client has the first token, and nothing else",
            "200: another decode worker computes prompt and token, the stream goes on",
            "prefill: blocks and staging, when its transfer fails", (_ATTEMPTS, _PATHS), ("decode_lost",),
            "proxy/test_failures.py::test_a_decode_worker_lost_behind_the_first_token_is_replaced",
        ),
        Failure(
            "killed", "in the middle of a stream", "an error event and [DONE]: what was said cannot be taken back",
            _NOTHING, (_BROKEN, _ERRORS), ("decode_lost",),
            "e2e/test_failures.py::test_decode_killed_mid_stream",
        ),
        Failure(
            "stopped, or cut off", "at any time",
            "as if it had been killed, when its health has been silent for 3 s; requests to others are not delayed",
            "prefill: blocks and staging, after a lease of 2 s", (_ATTEMPTS, _ENDED), ("decode_lost", "peer_lost"),
            "e2e/test_failover.py::test_a_stopped_worker_does_not_delay_the_others",
        ),
        Failure(
            "started again", "between the prefill leg and its own", "200: the prompt is read again, for the new life",
            "prefill: blocks and staging, when it is told of the new life", (_ATTEMPTS, _ENDED),
            ("decode_restarted", "stale_engine"),
            "proxy/test_failover.py::test_a_decode_worker_that_was_started_again_gets_the_prompt_anew",
        ),
        Failure(
            "started again", "while KV is being sent to it", "200, as for one that was killed",
            "prefill: blocks and staging, at once", (_ENDED, _PAIRS), ("stale_engine",),
            "transfer/test_warm.py::test_a_receiver_that_restarted_ends_what_was_under_way_to_its_earlier_life",
        ),
        Failure(
            "answers 5xx", "before anything was said to the client",
            "200: another decode worker; its own words if none is left", "prefill: blocks and staging", (_ATTEMPTS,),
            ("decode_5xx",),
            "proxy/test_failover.py::test_the_last_decode_workers_own_words_reach_the_client",
        ),
        Failure(
            "its buffer is full", "the KV has no room for 30 s", _ALONE, "prefill: blocks, which were held meanwhile",
            (_PATHS, _ENDED), ("deadline",),
            "proxy/test_failures.py::test_kv_lost_on_the_way_is_said_in_the_header_or_in_a_comment",
        ),
        Failure(
            "its buffer is full", "the request's deadline passes", "503 with Retry-After",
            "prefill: blocks; decode: the place in the queue", (_ERRORS, _ENDED), ("receiver_full",),
            "proxy/test_failover.py::test_a_deadline_missed_for_want_of_room_is_503",
        ),
        Failure(
            "its buffer holds less than two blocks", "the KV is offered", _ALONE, "prefill: blocks", (_PATHS, _ENDED),
            ("too_large",),
            "proxy/test_failover.py::test_a_transfer_that_another_prefill_worker_could_not_do_either_is_not_tried_again",
        ),
        Failure(
            "nobody wants the KV: the client has left, or the first token was the last", "the KV has come", "nothing",
            "decode: committed KV that nobody claims, after 5 s", (_ENDED,), ("unclaimed", "reader_gone"),
            "transfer/test_desk.py::test_committed_kv_that_nobody_claims_expires",
        ),
    ),
)  # fmt: skip

_BELT = Group(
    "A transfer",
    (
        Failure(
            "a write or a copy fails, blocks are taken away, a part is missing", "before the prefill worker's answer",
            _ELSEWHERE, "prefill: blocks and staging; decode: the slot", (_ATTEMPTS, _ENDED),
            ("write_failed", "gather_failed", "incomplete", "preempted", "bad_grant", "transfer_*"),
            "proxy/test_failover.py::test_a_transfer_that_failed_early_is_tried_from_another_prefill_worker",
        ),
        Failure(
            "likewise", "the first token is there", _ALONE, "prefill: blocks and staging; decode: the slot",
            (_ATTEMPTS, _PATHS, _ENDED), ("transfer_*", "cancelled"),
            "proxy/test_failures.py::test_a_failed_transfer_that_the_decode_worker_did_not_hear_of",
        ),
        Failure(
            "bytes that are not what was sent", "after the last write", _ALONE, "prefill: blocks; decode: the slot",
            (_PATHS, _ENDED), ("digest",),
            "transfer/test_digests.py::test_bytes_that_never_landed_are_no_answer",
        ),
        Failure(
            "two workers do not fit: model, dtype, layout, protocol, key", "their handshake",
            f"{_ELSEWHERE}; the pair is not tried again while both live, and `kvbelt workers list` shows both values",
            _NOTHING, (_PAIRS, _ATTEMPTS, _REFUSED),
            ("refused_*", "untrusted_key", "another_key", "no_key", "pairs_refused"),
            "proxy/test_failover.py::test_a_pair_that_was_refused_is_not_tried_again",
        ),
        Failure(
            "nobody answers the handshake", "their handshake", _ELSEWHERE, _NOTHING, (_PAIRS, _ATTEMPTS),
            ("peer_unreachable",),
            "transfer/test_warm.py::test_nobody_there_is_an_outcome",
        ),
        Failure(
            "the network between two workers is cut", "during the transfer", f"{_ALONE}, after a lease of 2 s",
            _SLOT, (_ENDED, _HELD), ("lease", "peer_lost"),
            "transfer/test_parts.py::test_a_writer_that_falls_silent_breaks_its_reader_and_is_fenced",
        ),
        Failure(
            "the slot is taken back before it is read", "the KV has come", _ALONE, "decode: the slot", (_PATHS,),
            ("expired_before_load", "slot_gone"),
            "engine/test_handover.py::test_lost_kv_is_computed",
        ),
        Failure(
            "blocks that were not sent, because the decode worker had them, are evicted", "before it reads the rest",
            _ALONE, "decode: the slot", (_PATHS,), ("prefix_evicted",),
            "e2e/test_prefix_reuse.py::test_what_was_promised_and_evicted_is_computed",
        ),
        Failure(
            "rubbish, a stranger, a message again or out of turn", "at any time", "nothing", _NOTHING, (_REFUSED,),
            ("malformed", "oversized", "version", "unknown_key", "handshake", "stale_slot", "unknown_transfer",
             "no_handshake", "ended", "not_yours", "too_many"),
            "security/test_belt_keys.py::test_what_comes_too_early_or_too_late_is_refused_and_counted",
        ),
    ),
)  # fmt: skip

_PROXY = Group(
    "The client, the proxy, the operator",
    (
        Failure(
            "the client leaves", "at any time", "nothing", "all of it; the slot when its writer has stopped",
            ("kvbelt_proxy_answers_total", _ENDED), ("aborted", "reader_gone", "cancelled"),
            "e2e/test_failures.py::test_client_gone_stops_both_workers",
        ),
        Failure(
            "the deadline passes, the proxy's or the client's own", "at any time", "504; an error event in a stream",
            "all of it, likewise", (_ERRORS,), ("deadline",),
            "proxy/test_failures.py::test_the_deadline_ends_what_takes_too_long",
        ),
        Failure(
            "no decode worker is ready", "before the request", "503 with Retry-After", _NOTHING, (_ERRORS,),
            ("no_decode_worker",),
            "proxy/test_failover.py::test_nobody_left_says_so_with_a_reason",
        ),
        Failure(
            "a request that breaks whoever takes it", "each of three attempts", "503 with Retry-After",
            "as for each of the workers", (_ATTEMPTS, _ERRORS), ("decode_lost",),
            "proxy/test_failover.py::test_the_number_of_legs_is_bounded",
        ),
        Failure(
            "a decode worker sends something else than a completion", "at any time", "502; an error event in a stream",
            "all of it", (_ERRORS, _BROKEN), ("bad_answer",),
            "proxy/test_failures.py::test_an_event_that_is_no_event_ends_the_stream_with_an_error",
        ),
        Failure(
            "a fault of the proxy itself", "at any time", "500", "all of it", (_ERRORS,), ("internal",),
            "proxy/test_failures.py::test_a_fault_of_the_proxy_itself_is_an_honest_500",
        ),
        Failure(
            "a worker is drained or removed", "at any time", "nothing: what it has is finished", _NOTHING,
            ("kvbelt_proxy_worker_ready", "kvbelt_proxy_worker_requests"), (),
            "proxy/test_admin.py::test_a_worker_that_leaves_finishes_what_it_has",
        ),
        Failure(
            "a worker is slow to say how it is", "before the request", "nothing: others are preferred", _NOTHING,
            ("kvbelt_proxy_worker_ready",), (),
            "proxy/test_failover.py::test_a_worker_that_is_late_to_say_how_it_is_gets_nothing_while_there_is_another",
        ),
    ),
)  # fmt: skip

GROUPS = (_PREFILL, _DECODE, _BELT, _PROXY)
