"""Every word that says why: why an answer took its way, why a leg or a transfer failed, why a message was refused.

Reasons label metrics and headers, and travel between processes, so they are few and each is registered here once.
``docs/failures.md`` is drawn from this table (``python -m kvbelt.ops.draw_failures``), and a test fails when a reason
that stands in the code is missing here, or one that stands here is said nowhere.

The registry is also what the proxy acts by: ``remedy`` tells what is worth trying after a transfer has failed.
"""

import re
from dataclasses import dataclass
from enum import Flag, StrEnum, auto


class Where(Flag):
    """Where a reason is said."""

    CHOICE = auto()  #: ``x-kvbelt-path``: the way that a request took from the start; no failure
    PREFILL = auto()  #: an attempt's record: a prefill leg failed
    DECODE = auto()  #: an attempt's record: a decode leg failed
    ERROR = auto()  #: the ``reason`` of an error that the proxy itself answers
    SEND = auto()  #: how a transfer ended for the prefill worker; the proxy says ``transfer_<reason>``
    RECEIVE = auto()  #: how a transfer ended for the decode worker, and ``x-kvbelt-kv``
    CONTROL = auto()  #: a message or a peer was refused on a control socket
    WARM = auto()  #: two workers could not be connected ahead of the first request
    PROBE = auto()  #: ``kvbelt doctor``: a pair was not measured, or not to the end


class Remedy(StrEnum):
    """What helps after a transfer has failed."""

    ELSEWHERE = "elsewhere"  #: another prefill worker may do better
    HERE = "here"  #: the decode worker computes the prompt: another prefill worker would meet the same
    NOTHING = "nothing"  #: nobody waits any more


@dataclass(frozen=True, slots=True)
class Reason:
    """One word and what it means. A name that ends in ``*`` is a family of them."""

    name: str
    where: Where
    meaning: str
    remedy: Remedy = Remedy.ELSEWHERE  #: of a transfer's end; of no account for others
    #: It follows from what the two processes are: as long as both live, another transfer between them fails likewise.
    lasting: bool = False


_CHOICE, _PREFILL, _DECODE, _ERROR = Where.CHOICE, Where.PREFILL, Where.DECODE, Where.ERROR
_SEND, _RECEIVE, _CONTROL, _WARM, _PROBE = Where.SEND, Where.RECEIVE, Where.CONTROL, Where.WARM, Where.PROBE
_HERE, _NOTHING = Remedy.HERE, Remedy.NOTHING

REASONS: tuple[Reason, ...] = (
    # Choices: one worker does it all.
    Reason("no_prefill_worker", _CHOICE, "no prefill worker is ready"),
    Reason(
        "pairs_refused", _CHOICE, "every ready prefill worker was refused by this decode worker (`refused_*`, keys)"
    ),
    Reason("short_prompt", _CHOICE, "shorter than `--min-prompt-tokens`"),
    Reason("many_prompts", _CHOICE, "several prompts in one request"),
    Reason("decode_has_no_receiver", _CHOICE, "the decode worker takes no KV"),
    # Choices: the decode worker gives the first token, over transferred KV.
    Reason("n", _CHOICE, "several choices"),
    Reason("best_of", _CHOICE, "several candidates"),
    Reason("echo", _CHOICE, "the prompt is a part of the answer"),
    Reason("logprobs", _CHOICE, "log probabilities were asked for"),
    Reason("prompt_logprobs", _CHOICE, "likewise, of the prompt"),
    Reason("stop", _CHOICE, "a stop string may begin in the first token and end in the second"),
    Reason("seed", _CHOICE, "seeded sampling counts its draws"),
    Reason("penalty", _CHOICE, "a penalty looks at earlier output"),
    Reason("min_tokens", _CHOICE, "a minimum counts output"),
    Reason("tools", _CHOICE, "tool calls keep a state"),
    Reason("guided", _CHOICE, "guided decoding keeps a state"),
    Reason("continuous_usage", _CHOICE, "usage in every event"),
    Reason("unknown_field", _CHOICE, "a field that nobody here knows"),
    Reason("unknown_context", _CHOICE, "the decode worker does not say how long its context is"),
    Reason("context_exceeded", _CHOICE, "prompt and answer do not fit the context; the decode worker decides"),
    Reason("no_token_ids", _CHOICE, "the prefill worker's answer has no token ids"),
    Reason("parsed_message", _CHOICE, "the first token was parsed into reasoning or a tool call"),
    Reason("incomplete_text", _CHOICE, "the first token ends inside a character"),
    # Legs.
    Reason("prefill_unreachable", _PREFILL, "no connection to the prefill worker"),
    Reason("prefill_lost", _PREFILL | _WARM, "the prefill worker's connection ended, or it does not answer `/health`"),
    Reason("prefill_5xx", _PREFILL, "the prefill worker answered with a status of 500 or above"),
    Reason("prefill_bad_answer", _PREFILL | _WARM, "the prefill worker's answer is not a completion"),
    Reason("prefill_refused", _PREFILL, "the prompt is too long for the prefill worker, but not for the decode worker"),
    Reason("stale_connection", _PREFILL | _DECODE, "a kept connection was just being closed; asked again at once"),
    Reason("transfer_*", _PREFILL | _DECODE, "the transfer failed, in the prefill worker's words (below)"),
    Reason("decode_unreachable", _DECODE, "no connection to the decode worker"),
    Reason("decode_lost", _DECODE | _ERROR, "the decode worker's connection ended, or it does not answer `/health`"),
    Reason("decode_restarted", _DECODE, "the decode worker that the KV was sent to is another process now"),
    Reason("decode_5xx", _DECODE, "the decode worker answered with a status of 500 or above"),
    Reason("kv_lost", _DECODE, "the decode worker computed the prompt itself and did not say why"),
    # The proxy's own errors.
    Reason("no_decode_worker", _ERROR, "no decode worker is ready, or none is left to try"),
    Reason("bad_answer", _ERROR, "a worker's answer is not what was asked for"),
    Reason("internal", _ERROR, "a fault of the proxy itself; its log has more"),
    # Transfers: both sides.
    Reason("done", _SEND | _RECEIVE, "committed, or read to its end"),
    Reason("deadline", _SEND | _RECEIVE | _ERROR | _PROBE, "its deadline has passed", _HERE),
    Reason("peer_lost", _SEND | _RECEIVE | _WARM, "the other side is gone, or was silent for a lease", _HERE),
    Reason("closed", _SEND | _RECEIVE | _WARM, "this worker is stopping"),
    Reason("belt_failed", _SEND | _RECEIVE, "a fault of the belt itself; the worker's log has more"),
    Reason("cancelled", _SEND | _RECEIVE, "the other side wanted it no more", _NOTHING),
    Reason("digest", _SEND | _RECEIVE, "what has landed is not what was sent: its digest differs"),
    Reason("no_digest", _SEND | _RECEIVE | _CONTROL, "a digest was asked for and did not come"),
    Reason("out_of_order", _SEND | _RECEIVE | _CONTROL, "a part, or the commit, of a prompt in parts, before its turn"),
    Reason("wrong_size", _SEND | _RECEIVE, "a size that does not follow from the layout or the reservation"),
    Reason("no_belt", _SEND | _RECEIVE | _WARM | _PROBE, "this worker has no belt", lasting=True),
    Reason("probed", _SEND | _RECEIVE, "no prompt's: `kvbelt doctor` has measured the link", _NOTHING),
    # Transfers: the prefill worker's side.
    Reason("receiver_full", _SEND | _ERROR | _PROBE, "the decode worker has had no room", _HERE),
    Reason("too_large", _SEND, "larger than the decode worker's buffer", _HERE),
    Reason("too_many", _SEND | _CONTROL, "4,096 transfers of this prefill worker are open at the decode worker"),
    Reason("not_yours", _SEND | _CONTROL, "a transfer of this name is another prefill worker's"),
    Reason("ended", _SEND | _CONTROL, "a transfer of this name is over", _HERE),
    Reason("stale_engine", _SEND | _WARM, "meant for an earlier life of the decode worker", _HERE),
    Reason("no_handshake", _SEND | _CONTROL | _WARM, "the decode worker does not know this prefill worker (any more)"),
    Reason("peer_unreachable", _SEND | _WARM, "no answer to the handshake"),
    Reason("idle", _SEND | _WARM, "the connection was unused for long, and was closed", _HERE),
    Reason("refused_*", _SEND | _CONTROL | _WARM, "the handshake was refused: this field differs", lasting=True),
    Reason("no_key", _SEND | _WARM, "one side has keys and the other none", lasting=True),
    Reason("untrusted_key", _SEND | _WARM, "the decode worker's key is not trusted here", lasting=True),
    Reason("another_key", _SEND | _CONTROL | _WARM, "an engine id that does not go with its key", lasting=True),
    Reason("too_many_peers", _SEND | _WARM, "this prefill worker is connected to as many decode workers as it can be"),
    Reason("not_yet", _WARM, "the handshake still goes on; asked again"),
    Reason("sends_nothing", _WARM | _PROBE, "this worker has nothing to send from", lasting=True),
    Reason("channel", _SEND | _WARM, "the channel cannot reach the decode worker"),
    Reason("write_failed", _SEND, "a write failed"),
    Reason("gather_failed", _SEND, "blocks could not be copied to the staging buffer"),
    Reason("incomplete", _SEND, "fewer blocks were handed over than the prompt has"),
    Reason("bad_grant", _SEND, "the decode worker granted room outside its buffer", _HERE),
    Reason("duplicate_transfer", _SEND, "a transfer of this name is under way here"),
    Reason("bad_handoff", _SEND, "`kv_transfer_params` that are none"),
    Reason("failed", _SEND, "the prefill worker did not say why"),
    Reason("aborted", _SEND, "its request was over before its prompt was computed", _NOTHING),
    Reason("preempted", _SEND, "the engine took the prompt's blocks away"),
    Reason("refused", _SEND, "the engine refused the request", _NOTHING),
    # Measurements, besides the failures of transfers.
    Reason("busy", _PROBE, "requests or transfers are under way: they are not disturbed"),
    Reason("not_connected", _PROBE, "the prefill worker is not connected to the decode worker"),
    Reason("staging_full", _PROBE, "the prefill worker has no room in its staging buffer"),
    # Transfers: the decode worker's side.
    Reason("lease", _RECEIVE, "the prefill worker was silent for a lease"),
    Reason("unknown_transfer", _RECEIVE | _CONTROL, "no prefill worker has spoken of it"),
    Reason("unclaimed", _RECEIVE, "committed, and nobody wanted it", _NOTHING),
    Reason("reader_gone", _RECEIVE, "the request that waited for it is over", _NOTHING),
    Reason("already_claimed", _RECEIVE, "another request reads this transfer"),
    Reason("expired_before_load", _RECEIVE, "the slot was given up before the engine read it"),
    Reason(
        "prefix_evicted", _RECEIVE, "blocks that the decode worker had when the KV was sent have been evicted since"
    ),
    Reason("slot_gone", _RECEIVE, "likewise (vLLM)"),
    Reason("wrong_length", _RECEIVE, "KV of another number of tokens than the prompt has"),
    Reason("copy_failed", _RECEIVE, "the KV could not be copied into the engine's blocks"),
    Reason("cached", _RECEIVE, "the decode worker's prefix cache has it all: it is not read", _NOTHING),
    Reason("dropped", _RECEIVE, "the request ended before its KV was read", _NOTHING),
    # Control sockets.
    Reason("malformed", _CONTROL, "no message of this protocol"),
    Reason("oversized", _CONTROL, "larger than any message of its kind"),
    Reason("version", _CONTROL, "another version of the protocol"),
    Reason("unknown_key", _CONTROL, "a key that is not trusted, or none"),
    Reason("handshake", _CONTROL, "a connection that ended before its handshake did"),
    Reason("stale_slot", _CONTROL, "a slot's earlier use"),
    Reason("other", _CONTROL | _SEND | _RECEIVE, "one of more words than a counter keeps apart"),
)

_WORD = re.compile(r"[a-z0-9_]{1,64}")
_BY_NAME = {reason.name: reason for reason in REASONS}
_FAMILIES = tuple(reason for reason in REASONS if reason.name.endswith("*"))


def as_word(said: str | None, otherwise: str) -> str:
    """A reason that another process has said, fit for a header and a label; ``otherwise`` if it is none."""
    return said if said is not None and _WORD.fullmatch(said) else otherwise


def find(name: str) -> Reason | None:
    """The entry for a reason as it is said, by its family if need be."""
    known = _BY_NAME.get(name)
    if known is not None:
        return known
    return next((family for family in _FAMILIES if name.startswith(family.name[:-1])), None)


def remedy_of(transfer_reason: str) -> Remedy:
    """What is worth trying after a transfer has ended with this reason, as the prefill worker says it.

    A word of a newer worker that is not known here is treated as most are: another prefill worker may do better.
    """
    known = find(transfer_reason)
    return Remedy.ELSEWHERE if known is None else known.remedy


def is_lasting(transfer_reason: str) -> bool:
    """Whether two workers that have failed with this reason would fail so again, as long as both live."""
    known = find(transfer_reason)
    return known is not None and known.lasting


def is_of_pair(transfer_reason: str) -> bool:
    """Whether it is about two workers rather than about one prompt."""
    known = find(transfer_reason)
    return known is not None and Where.WARM in known.where
