"""The failures of ``docs/failures.md``: what happens, what the client sees, what is freed, and which test shows it.

Each names the outcomes of the plan (``proxy/request/steps.py``) by which the proxy meets it; none where the proxy has
nothing to decide. Tests compare reasons, metrics and outcomes with the code, and import each test.
"""

from dataclasses import dataclass

from kvbelt.proxy.request.steps import Outcome

O = Outcome  # noqa: E741 - the rows are read across


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure in one phase of a request. The texts are sentences."""

    title: str
    client: str
    freed: str
    outcomes: tuple[O, ...]
    metrics: tuple[str, ...]
    reasons: tuple[str, ...]
    shown_by: str  #: ``file::test``, from ``tests/``


_ATTEMPTS = "kvbelt_proxy_failed_attempts_total"
_PATHS = "kvbelt_proxy_requests_total"
_ERRORS = "kvbelt_proxy_errors_total"
_BROKEN = "kvbelt_proxy_broken_streams_total"
_ENDED = "kvbelt_transfers_ended_total"
_HELD = "kvbelt_receive_bytes"
_PAIRS = "kvbelt_proxy_pairs"
_REFUSED = "kvbelt_refused_messages_total"

_ELSEWHERE = "200. Another prefill worker computes the prompt; if none is left, the decode worker does."
_ALONE = "200. The decode worker computes the prompt."
_503 = "503 with `Retry-After`."
_SLOT = (
    "Decode: the slot, once the prefill worker has acknowledged or is known to be dead. "
    "Until then it is quarantined ([transfer.md](transfer.md))."
)
_NOTHING = "Nothing is held."
_BLOCKS = "Prefill: blocks and staging memory."
_BOTH = "Prefill: blocks and staging memory. Decode: the slot."
_ALL = "Everything, on both workers."

_PREFILL = (
    Failure(
        "It cannot be reached",
        _ELSEWHERE,
        _NOTHING,
        (O.PREFILL_FAILED, O.STALE),
        (_ATTEMPTS, _PATHS),
        ("prefill_unreachable", "no_prefill_worker", "stale_connection"),
        "proxy/test_failover.py::test_another_prefill_worker_takes_over",
    ),
    Failure(
        "It is killed while it computes the prompt",
        _ELSEWHERE,
        _SLOT,
        (O.PREFILL_FAILED,),
        (_ATTEMPTS, _ENDED, _HELD),
        ("prefill_lost", "peer_lost", "lease"),
        "e2e/test_failover.py::test_workers_of_each_kind_are_killed_under_load",
    ),
    Failure(
        "It is stopped or cut off while it computes the prompt",
        f"{_ELSEWHERE} The worker counts as lost when `/health` has been silent for 3 s.",
        _SLOT,
        (O.PREFILL_FAILED,),
        (_ATTEMPTS, _ENDED, _HELD),
        ("prefill_lost", "lease"),
        "proxy/test_failover.py::test_a_prefill_worker_that_is_stopped_is_replaced_when_its_health_is_silent",
    ),
    Failure(
        "It is lost after its first token, before its KV has arrived",
        f"{_ALONE} A stream reports it in a comment.",
        _SLOT,
        (O.KV_LOST,),
        (_ATTEMPTS, _PATHS, _ENDED, _HELD),
        ("prefill_lost", "peer_lost", "lease"),
        "proxy/test_failures.py::test_a_prefill_worker_lost_while_its_kv_is_awaited",
    ),
    Failure(
        "It is lost after its KV was committed",
        "200. The client sees no difference.",
        _NOTHING,
        (),
        (_PATHS,),
        (),
        "e2e/real/test_failures.py::test_prefill_killed_after_the_transfer",
    ),
    Failure(
        "It answers 5xx and is not well, or answers something other than a completion",
        _ELSEWHERE,
        "Prefill: blocks. Decode: the slot.",
        (O.PREFILL_FAILED,),
        (_ATTEMPTS, _PATHS),
        ("prefill_5xx", "prefill_bad_answer"),
        "proxy/test_failover.py::test_another_prefill_worker_takes_over",
    ),
    Failure(
        "It answers 500 and is well: the request itself fails there",
        "That 500. The request is not tried on another worker, where it would fail as well.",
        "Prefill: blocks. Decode: the slot.",
        (O.REFUSED,),
        (_ATTEMPTS,),
        ("prefill_5xx", "decode_5xx"),
        "proxy/test_failover.py::test_a_request_that_a_decode_worker_fails_at_is_not_tried_on_the_next_one",
    ),
    Failure(
        "It refuses the request (4xx)",
        "The refusal. A prompt that is too long for this worker only goes to another one.",
        _NOTHING,
        (O.REFUSED, O.PREFILL_FAILED),
        (_ATTEMPTS,),
        ("prefill_refused", "too_long"),
        "proxy/test_failures.py::test_a_prefill_worker_that_refuses_is_quoted",
    ),
    Failure(
        "It has no such model (404): an adapter that is loaded into some of the workers only",
        "200, whole by a worker that has it. If none has it, the last one's 404.",
        _NOTHING,
        (O.PREFILL_FAILED, O.DECODE_5XX),
        (_ATTEMPTS,),
        ("model_missing",),
        "proxy/test_failures.py::test_a_model_that_one_worker_lacks_is_served_by_the_other",
    ),
    Failure(
        "It is restarted",
        "200. The new process is connected to every decode worker before it gets requests.",
        "Decode: the slots of the earlier process.",
        (),
        (_PAIRS, _HELD),
        (),
        "proxy/test_warm_up.py::test_a_prefill_worker_that_comes_back_is_connected_again",
    ),
)

_DECODE = (
    Failure(
        "It cannot be reached, or is killed, before anything was sent to the client",
        "200. Another decode worker answers, after a new prefill call. If none is left, 503 with `Retry-After`.",
        "Prefill: blocks and staging memory, when its transfer fails.",
        (O.DECODE_FAILED, O.NO_WORKER, O.STALE),
        (_ATTEMPTS, _ERRORS, _ENDED),
        ("decode_unreachable", "decode_lost", "no_decode_worker", "peer_lost"),
        "proxy/test_failover.py::test_another_decode_worker_takes_over",
    ),
    Failure(
        "It is killed when the client has the first token and nothing else",
        "200. Another decode worker computes prompt and first token, and the stream goes on.",
        "Prefill: blocks and staging memory, when its transfer fails.",
        (O.DECODE_FAILED, O.NO_WORKER),
        (_ATTEMPTS, _PATHS),
        ("decode_lost",),
        "proxy/test_failures.py::test_a_decode_worker_lost_after_the_first_token_is_replaced",
    ),
    Failure(
        "It is killed in the middle of a stream",
        "An error event and `[DONE]`. What was sent cannot be taken back.",
        _NOTHING,
        (O.STREAM_LOST,),
        (_BROKEN, _ERRORS),
        ("decode_lost",),
        "e2e/real/test_failures.py::test_decode_killed_mid_stream",
    ),
    Failure(
        "It is stopped or cut off",
        "Its open streams wait for it, to the deadline at most. After 3 s without an answer to `/health`, requests "
        "that it has not begun to answer go elsewhere. Other requests are not delayed.",
        "Prefill: blocks and staging memory, after a lease of 2 s.",
        (O.DECODE_FAILED, O.STREAM_LOST),
        (_ATTEMPTS, _ENDED),
        ("decode_lost", "peer_lost"),
        "proxy/test_failures.py::test_a_stream_waits_for_a_decode_worker_that_stands_still",
    ),
    Failure(
        "It is restarted between the prefill call and the decode call",
        "200. The prompt is computed again, for the new process.",
        "Prefill: blocks and staging memory, when it learns of the new process.",
        (O.DECODE_FAILED,),
        (_ATTEMPTS, _ENDED),
        ("decode_restarted", "stale_engine"),
        "proxy/test_failover.py::test_a_restarted_decode_worker_gets_the_prompt_again",
    ),
    Failure(
        "It is restarted while KV is sent to it",
        "200, as for a worker that was killed.",
        "Prefill: blocks and staging memory, at once.",
        (O.KV_HOPELESS, O.TOKEN_KV_HOPELESS, O.DECODE_FAILED),
        (_ENDED, _PAIRS),
        ("stale_engine",),
        "transfer/test_warm.py::test_a_receiver_that_restarted_ends_what_was_under_way_to_its_earlier_life",
    ),
    Failure(
        "It answers 5xx before anything was sent to the client, and is not well",
        "200. Another decode worker answers. If none is left, the client gets the last one's answer.",
        "Prefill: blocks and staging memory.",
        (O.DECODE_5XX, O.LAST_WORDS),
        (_ATTEMPTS,),
        ("decode_5xx",),
        "proxy/test_failover.py::test_the_last_decode_workers_answer_reaches_the_client",
    ),
    Failure(
        "Its receive buffer has no room for 30 s",
        _ALONE,
        "Prefill: blocks, which were held meanwhile.",
        (O.KV_HOPELESS, O.TOKEN_KV_HOPELESS),
        (_PATHS, _ENDED),
        ("deadline",),
        "proxy/test_failures.py::test_lost_kv_is_reported_in_the_header_or_in_a_comment",
    ),
    Failure(
        "Its receive buffer has no room until the request's deadline",
        _503,
        "Prefill: blocks. Decode: the place in the queue.",
        (O.RECEIVER_FULL,),
        (_ERRORS, _ENDED),
        ("receiver_full",),
        "proxy/test_failover.py::test_a_deadline_missed_for_want_of_room_is_503",
    ),
    Failure(
        "Its receive buffer is smaller than two blocks",
        _ALONE,
        "Prefill: blocks.",
        (O.KV_HOPELESS, O.TOKEN_KV_HOPELESS),
        (_PATHS, _ENDED),
        ("too_large",),
        "proxy/test_failover.py::test_a_transfer_that_another_prefill_worker_could_not_do_either_is_not_tried_again",
    ),
    Failure(
        "No request reads the KV that has arrived",
        "Nothing: the client has left, or the first token was the last.",
        "Decode: the committed KV, after 5 s.",
        (),
        (_ENDED,),
        ("unclaimed", "reader_gone"),
        "transfer/test_incoming.py::test_committed_kv_that_is_not_claimed_expires",
    ),
)

_BELT = (
        Failure(
            "It fails before the prefill worker has answered",
            f"{_ELSEWHERE} A write or a copy failed, blocks were taken away, or a part was missing.",
            _BOTH,
            (O.KV_FAILED, O.TOKEN_KV_FAILED),
            (_ATTEMPTS, _ENDED),
            ("write_failed", "gather_failed", "incomplete", "preempted", "bad_grant", "transfer_*"),
            "proxy/test_failover.py::test_a_transfer_that_failed_early_is_tried_from_another_prefill_worker",
        ),
        Failure(
            "It fails after the first token",
            _ALONE,
            _BOTH,
            (O.KV_LOST,),
            (_ATTEMPTS, _PATHS, _ENDED),
            ("transfer_*", "cancelled"),
            "proxy/test_failures.py::test_a_failed_transfer_that_the_decode_worker_did_not_learn_of",
        ),
        Failure(
            "The bytes that arrive are not the bytes that were sent",
            _ALONE,
            "Prefill: blocks. Decode: the slot.",
            (),
            (_PATHS, _ENDED),
            ("digest",),
            "transfer/test_digests.py::test_bytes_that_never_landed_are_no_answer",
        ),
        Failure(
            "Two workers differ in model, dtype, layout, protocol or key",
            f"{_ELSEWHERE} The pair is not tried again while both processes live, and `kvbelt workers list` shows the "
            "two values.",
            _NOTHING,
            (O.KV_FAILED, O.TOKEN_KV_FAILED),
            (_PAIRS, _ATTEMPTS, _REFUSED),
            ("refused_*", "untrusted_key", "another_key", "no_key", "pairs_refused"),
            "proxy/test_failover.py::test_a_pair_that_was_refused_is_not_tried_again",
        ),
        Failure(
            "The handshake gets no answer",
            _ELSEWHERE,
            _NOTHING,
            (O.KV_FAILED, O.TOKEN_KV_FAILED),
            (_PAIRS, _ATTEMPTS),
            ("peer_unreachable",),
            "transfer/test_warm.py::test_a_receiver_that_does_not_answer_is_an_outcome",
        ),
        Failure(
            "The network between two workers is cut during the transfer",
            f"{_ALONE} This takes a lease of 2 s.",
            _SLOT,
            (O.KV_LOST, O.KV_HOPELESS, O.TOKEN_KV_HOPELESS),
            (_ENDED, _HELD),
            ("lease", "peer_lost"),
            "transfer/test_parts.py::test_a_writer_that_falls_silent_breaks_its_reader_and_is_fenced",
        ),
        Failure(
            "The slot is taken back before the decode worker has read it",
            _ALONE,
            "Decode: the slot.",
            (),
            (_PATHS,),
            ("expired_before_load", "slot_gone"),
            "engine/test_handover.py::test_lost_kv_is_computed",
        ),
        Failure(
            "Blocks that were not sent, because the decode worker had them, are evicted",
            _ALONE,
            "Decode: the slot.",
            (),
            (_PATHS,),
            ("prefix_evicted",),
            "e2e/test_prefix_reuse.py::test_what_was_promised_and_evicted_is_computed",
        ),
        Failure(
            "A message is malformed, from an untrusted peer, repeated or out of turn",
            "Nothing. The message is dropped.",
            _NOTHING,
            (),
            (_REFUSED,),
            (
                "malformed", "oversized", "version", "unknown_key", "handshake", "stale_slot", "unknown_transfer",
                "no_handshake", "ended", "not_yours", "too_many",
            ),
            "security/test_belt_keys.py::test_what_comes_too_early_or_too_late_is_refused_and_counted",
        ),
)  # fmt: skip

_PROXY = (
    Failure(
        "The client leaves",
        "Nothing.",
        f"{_ALL} The slot follows when its prefill worker has stopped writing.",
        (O.CLIENT_GONE,),
        ("kvbelt_proxy_answers_total", _ENDED),
        ("aborted", "reader_gone", "cancelled"),
        "e2e/real/test_failures.py::test_client_gone_stops_both_workers",
    ),
    Failure(
        "The deadline passes, the proxy's or the client's own",
        "504, or an error event in a stream.",
        f"{_ALL} The slot follows when its prefill worker has stopped writing.",
        (O.DEADLINE,),
        (_ERRORS,),
        ("deadline",),
        "proxy/test_failures.py::test_the_deadline_ends_what_takes_too_long",
    ),
    Failure(
        "No decode worker is ready",
        _503,
        _NOTHING,
        (O.NO_WORKER,),
        (_ERRORS,),
        ("no_decode_worker",),
        "proxy/test_failover.py::test_no_decode_worker_left_is_503_with_a_reason",
    ),
    Failure(
        "More requests come than the workers can take",
        "429 with `Retry-After`: `--max-waiting` requests wait already, or this one has for `--max-wait-seconds`.",
        _NOTHING,
        (O.QUEUE_FULL, O.OVERLOADED),
        (_ERRORS,),
        ("queue_full", "overloaded"),
        "proxy/test_placing.py::test_a_full_queue_refuses_the_next_request",
    ),
    Failure(
        "A request breaks every worker that takes it",
        f"{_503} Each kind of worker is called three times at most.",
        "As for each of the workers.",
        (O.ATTEMPTS_USED,),
        (_ATTEMPTS, _ERRORS),
        ("decode_lost",),
        "proxy/test_failover.py::test_the_number_of_legs_is_bounded",
    ),
    Failure(
        "A decode worker sends something other than a completion",
        "502, or an error event in a stream.",
        _ALL,
        (O.BAD_ANSWER,),
        (_ERRORS, _BROKEN),
        ("bad_answer",),
        "proxy/test_failures.py::test_an_event_that_is_no_event_ends_the_stream_with_an_error",
    ),
    Failure(
        "The proxy itself has a fault",
        "500, or an error event in a stream.",
        _ALL,
        (O.FAULT,),
        (_ERRORS,),
        ("internal",),
        "proxy/test_failures.py::test_a_fault_of_the_proxy_itself_is_an_honest_500",
    ),
    Failure(
        "A worker is drained or removed",
        "Nothing. The worker finishes the requests that it has.",
        _NOTHING,
        (),
        ("kvbelt_proxy_worker_ready", "kvbelt_proxy_worker_requests"),
        (),
        "proxy/test_admin.py::test_a_worker_that_leaves_finishes_what_it_has",
    ),
    Failure(
        "A worker is slow to answer `/health`",
        "Nothing. Other workers are preferred.",
        _NOTHING,
        (),
        ("kvbelt_proxy_worker_ready",),
        (),
        "proxy/test_failover.py::test_a_late_worker_gets_no_requests_while_there_is_another",
    ),
)

#: By the part that fails.
GROUPS = {
    "A prefill worker": _PREFILL,
    "A decode worker": _DECODE,
    "A transfer": _BELT,
    "The client, the proxy, the operator": _PROXY,
}
