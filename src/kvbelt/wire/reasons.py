"""Every reason: why an answer took its path, why a leg or a transfer failed, why a message was refused.

Reasons label metrics and headers, and travel between processes, so they are few and each is registered here once.
``docs/failures.md`` is drawn from this table (``python -m tools.draw_failures``). A test fails when the code uses a
reason that is missing here, or when a reason here is never used.

The proxy also acts by this table: ``remedy`` tells what to try after a transfer has failed.
"""

import re
from dataclasses import dataclass
from enum import Flag, StrEnum, auto


class Where(Flag):
    CHOICE = auto()  #: ``x-kvbelt-path``: why the path was chosen; not a failure
    PREFILL = auto()  #: an attempt's record: a prefill leg failed
    DECODE = auto()  #: an attempt's record: a decode leg failed
    ERROR = auto()  #: the ``reason`` of the proxy's own error
    SEND = auto()  #: how a transfer ended for the prefill worker; at the proxy ``transfer_<reason>``
    RECEIVE = auto()  #: how a transfer ended for the decode worker, and ``x-kvbelt-kv``
    CONTROL = auto()  #: a message or a peer was refused on a control socket
    WARM = auto()  #: two workers could not be connected before a request
    PROBE = auto()  #: ``kvbelt doctor``: a link was not measured, or not to the end


class Remedy(StrEnum):
    ELSEWHERE = "elsewhere"  #: another prefill worker may do better
    HERE = "here"  #: the decode worker computes the prompt: another prefill worker would fail too
    NOTHING = "nothing"  #: no request waits any more


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason. A name that ends in ``*`` is a family of reasons."""

    name: str
    where: Where
    meaning: str
    remedy: Remedy = Remedy.ELSEWHERE  #: for transfers only
    #: It follows from what the two processes are: while both live, every transfer between them fails so.
    lasting: bool = False

    @property
    def of_pair(self) -> bool:
        """Whether it is about two workers, not about one prompt."""
        return Where.WARM in self.where


_CHOICE, _PREFILL, _DECODE, _ERROR, _SEND, _RECEIVE, _CONTROL, _WARM, _PROBE = Where
_HERE, _NOTHING = Remedy.HERE, Remedy.NOTHING

REASONS: tuple[Reason, ...] = (
    # Choices: one worker serves the request.
    Reason("calm", _CHOICE, "hardly a request is generating, so splitting gains nothing"),
    Reason("prefill_busy", _CHOICE, "prefill workers would be later"),
    Reason("probe", _CHOICE, "to learn anew how fast a worker is that has been idle"),
    Reason("placement_whole", _CHOICE, "`--placement whole`: no request is split"),
    Reason("splitting_loses", _CHOICE, "splitting is switched off: it has lost (`kvbelt_placement_regret_ratio`)"),
    Reason("no_room", _CHOICE, "no decode worker that takes KV has room"),
    Reason("no_prefill_worker", _CHOICE, "no prefill worker is ready"),
    Reason("pairs_refused", _CHOICE, "the decode workers refused every ready prefill worker (`refused_*`, keys)"),
    Reason("short_prompt", _CHOICE, "shorter than `--min-prompt-tokens`"),
    Reason("many_prompts", _CHOICE, "several prompts in one request"),
    Reason("no_tokens", _CHOICE, "`max_tokens` is 0"),
    Reason("may_be_refused", _CHOICE, "a field has a value that workers may refuse: one does so at once"),
    Reason("no_prompt", _CHOICE, "the prompt is embeddings, of which the proxy knows nothing"),
    Reason("routed_experts", _CHOICE, "the servers tell which experts computed which token, and only one can for all"),
    Reason("decode_has_no_receiver", _CHOICE, "no decode worker takes KV"),
    # Choices: the decode worker gives the first token, over transferred KV.
    Reason("n", _CHOICE, "several choices"),
    Reason("best_of", _CHOICE, "several candidates"),
    Reason("echo", _CHOICE, "the prompt is part of the answer"),
    Reason("logprobs", _CHOICE, "log probabilities were asked for"),
    Reason("prompt_logprobs", _CHOICE, "log probabilities of the prompt were asked for"),
    Reason("stop", _CHOICE, "a stop string may begin in the first token and end in the second"),
    Reason("seed", _CHOICE, "seeded sampling counts its draws"),
    Reason("penalty", _CHOICE, "a penalty depends on earlier output"),
    Reason("min_tokens", _CHOICE, "a minimum counts output"),
    Reason("tools", _CHOICE, "tool calls keep a state"),
    Reason("guided", _CHOICE, "guided decoding keeps a state"),
    Reason("continuous_usage", _CHOICE, "usage in every event"),
    Reason("unknown_field", _CHOICE, "the proxy does not know a field of the request"),
    Reason("unknown_context", _CHOICE, "the decode worker does not say how long its context is"),
    Reason("context_exceeded", _CHOICE, "prompt and answer do not fit the context; the decode worker decides"),
    Reason("no_token_ids", _CHOICE, "the prefill worker's answer has no token ids"),
    Reason(
        "parsed_message", _CHOICE, "the first token was parsed, or the rest of the answer may be: reasoning, tool calls"
    ),
    Reason("media", _CHOICE, "the prompt has images, audio, video or embeddings, and its token ids do not tell which"),
    Reason("new_adapter", _CHOICE, "whether both workers have the same LoRA adapter under this name is to be seen"),
    Reason("incomplete_text", _CHOICE, "the first token ends inside a character"),
    # Legs.
    Reason("prefill_unreachable", _PREFILL, "no connection to the prefill worker"),
    Reason("prefill_lost", _PREFILL | _WARM, "the prefill worker's connection ended, or it does not answer `/health`"),
    Reason("prefill_5xx", _PREFILL, "the prefill worker answered with a status of 500 or above"),
    Reason("prefill_bad_answer", _PREFILL | _WARM, "the prefill worker's answer is not a completion"),
    Reason("prefill_refused", _PREFILL, "the prompt is too long for the prefill worker, but not for the decode worker"),
    Reason(
        "model_missing", _PREFILL | _DECODE, "the worker has no such model or adapter (404), but perhaps another one"
    ),
    Reason("stale_connection", _PREFILL | _DECODE, "a kept connection was just being closed; sent again at once"),
    Reason("transfer_*", _PREFILL | _DECODE, "the transfer failed, with the prefill worker's reason (below)"),
    Reason("decode_unreachable", _DECODE, "no connection to the decode worker"),
    Reason("decode_lost", _DECODE | _ERROR, "the decode worker's connection ended, or it does not answer `/health`"),
    Reason("decode_restarted", _DECODE, "the decode worker that the KV was sent to is another process now"),
    Reason("decode_5xx", _DECODE, "the decode worker answered with a status of 500 or above"),
    Reason("too_long", _DECODE, "the prompt is too long for this worker, but perhaps not for another one"),
    Reason("kv_lost", _DECODE, "the decode worker computed the prompt itself and gave no reason"),
    # The proxy's own errors.
    Reason("no_decode_worker", _CHOICE | _ERROR, "no decode worker is ready, or none is left to try"),
    Reason("queue_full", _ERROR, "as many requests wait for a worker as may (`--max-waiting`)"),
    Reason("overloaded", _ERROR, "no worker could take the request within `--max-wait-seconds`"),
    Reason("bad_answer", _ERROR, "a worker's answer is not an answer to the request"),
    Reason("internal", _ERROR, "a fault of the proxy itself; see its log"),
    # Transfers: both sides.
    Reason("done", _SEND | _RECEIVE, "committed, or read to its end"),
    Reason("deadline", _SEND | _RECEIVE | _ERROR | _PROBE, "its deadline has passed", _HERE),
    Reason("peer_lost", _SEND | _RECEIVE | _WARM, "the other side is gone, or was silent for a lease", _HERE),
    Reason("closed", _SEND | _RECEIVE | _WARM, "this worker is stopping"),
    Reason("belt_failed", _SEND | _RECEIVE, "a fault of the belt itself; see the worker's log"),
    Reason("cancelled", _SEND | _RECEIVE, "the other side cancelled it", _NOTHING),
    Reason("digest", _SEND | _RECEIVE, "the digest of what has landed differs from the sender's"),
    Reason("no_digest", _SEND | _RECEIVE | _CONTROL, "a digest was required and did not come"),
    Reason("out_of_order", _SEND | _RECEIVE | _CONTROL, "a part, or the commit, of a prompt in parts, before its turn"),
    Reason("wrong_size", _SEND | _RECEIVE, "a size does not follow from the layout or the reservation"),
    Reason("no_belt", _SEND | _RECEIVE | _WARM | _PROBE, "this worker has no belt", lasting=True),
    Reason("kv_groups", _SEND | _RECEIVE, "the model has kinds of KV cache that cannot be sent", _HERE),
    Reason("probed", _SEND | _RECEIVE, "no prompt's transfer: `kvbelt doctor` has measured the link", _NOTHING),
    # Transfers: the prefill worker's side.
    Reason("receiver_full", _SEND | _ERROR | _PROBE, "the decode worker has had no room", _HERE),
    Reason("too_large", _SEND, "larger than the decode worker's buffer", _HERE),
    Reason("too_many", _SEND | _CONTROL, "4,096 transfers of this prefill worker are open at the decode worker"),
    Reason("not_yours", _SEND | _CONTROL, "the transfer belongs to another prefill worker"),
    Reason("ended", _SEND | _CONTROL, "the transfer is over", _HERE),
    Reason("stale_engine", _SEND | _WARM, "meant for an earlier incarnation of the decode worker", _HERE),
    Reason("no_handshake", _SEND | _CONTROL | _WARM, "the decode worker does not know this prefill worker (any more)"),
    Reason("peer_unreachable", _SEND | _WARM, "no answer to the handshake"),
    Reason("idle", _SEND | _WARM, "the connection was unused for long, and was closed", _HERE),
    Reason("refused_*", _SEND | _CONTROL | _WARM, "the handshake was refused: this field differs", lasting=True),
    Reason("no_key", _SEND | _WARM, "one side has keys and the other does not", lasting=True),
    Reason("untrusted_key", _SEND | _WARM, "the decode worker's key is not trusted here", lasting=True),
    Reason("another_key", _SEND | _CONTROL | _WARM, "the engine id does not belong to the key", lasting=True),
    Reason("too_many_peers", _SEND | _WARM, "this prefill worker has its largest number of connections"),
    Reason("no_memory", _SEND | _WARM, "the prefill worker has no memory for its send buffer (`pd_buffer_size`)"),
    Reason("not_yet", _WARM, "the handshake still goes on; the proxy asks again"),
    Reason("sends_nothing", _WARM | _PROBE, "this worker has no buffer to send from", lasting=True),
    Reason("channel", _SEND | _WARM, "the channel cannot reach the decode worker"),
    Reason("write_failed", _SEND, "a write failed"),
    Reason("gather_failed", _SEND, "blocks could not be copied to the staging buffer"),
    Reason("incomplete", _SEND, "fewer blocks were handed over than the prompt has"),
    Reason("bad_grant", _SEND, "the decode worker granted room outside its buffer", _HERE),
    Reason("duplicate_transfer", _SEND, "the transfer is under way here already"),
    Reason("bad_handoff", _SEND, "`kv_transfer_params` are malformed"),
    Reason("failed", _SEND, "the prefill worker gave no reason"),
    Reason("aborted", _SEND, "the request ended before its prompt was computed", _NOTHING),
    Reason("preempted", _SEND, "the engine took the prompt's blocks away"),
    Reason("refused", _SEND, "the engine refused the request", _NOTHING),
    # Measurements, besides the failures of transfers.
    Reason("busy", _PROBE, "requests or transfers are under way, which a measurement would disturb"),
    Reason("not_connected", _PROBE, "the prefill worker is not connected to the decode worker"),
    Reason("staging_full", _PROBE, "the prefill worker has no room in its staging buffer"),
    # Transfers: the decode worker's side.
    Reason("lease", _RECEIVE, "the prefill worker was silent for a lease"),
    Reason("unknown_transfer", _RECEIVE | _CONTROL, "no prefill worker has announced it"),
    Reason("unclaimed", _RECEIVE, "committed, but no request claimed it", _NOTHING),
    Reason("reader_gone", _RECEIVE, "the request that waited for it is over", _NOTHING),
    Reason("already_claimed", _RECEIVE, "another request has claimed the transfer"),
    Reason("expired_before_load", _RECEIVE, "the slot expired before the engine read it"),
    Reason("prefix_evicted", _RECEIVE, "blocks that the decode worker had when the KV was sent are evicted since"),
    Reason("slot_gone", _RECEIVE, "the slot expired before the engine read it (vLLM)"),
    Reason(
        "window_edge", _RECEIVE, "a sliding window of the decode worker's begins a block before what was sent", _HERE
    ),
    Reason("wrong_length", _RECEIVE, "the KV has another number of tokens than the prompt"),
    Reason("heads_missing", _RECEIVE, "not all heads or layers of the KV came (parallel servers of different degrees)"),
    Reason("adapter_differs", _RECEIVE, "the prefill worker has another LoRA adapter under this name"),
    Reason("copy_failed", _RECEIVE, "the KV could not be copied into the engine's blocks"),
    Reason("cached", _RECEIVE, "the decode worker's prefix cache has it all, so the KV is not read", _NOTHING),
    Reason("dropped", _RECEIVE, "the request ended before its KV was read", _NOTHING),
    # Control sockets.
    Reason("malformed", _CONTROL, "not a message of this protocol"),
    Reason("oversized", _CONTROL, "larger than any message of its kind"),
    Reason("version", _CONTROL, "another version of the protocol"),
    Reason("unknown_key", _CONTROL, "the key is missing or not trusted"),
    Reason("handshake", _CONTROL, "the connection ended before its handshake"),
    Reason("stale_slot", _CONTROL, "the message is about an earlier use of its slot"),
    Reason("other", _CONTROL | _SEND | _RECEIVE, "the counter has no room for another reason"),
)

_WORD = re.compile(r"[a-z0-9_]{1,64}")
_BY_NAME = {reason.name: reason for reason in REASONS}
_FAMILIES = tuple(reason for reason in REASONS if reason.name.endswith("*"))


def as_word(said: str | None, otherwise: str) -> str:
    """A reason from another process if it is fit for a header and a label, else ``otherwise``."""
    return said if said is not None and _WORD.fullmatch(said) else otherwise


def find(name: str) -> Reason | None:
    """The entry of a reason, or of its family."""
    return _BY_NAME.get(name) or next((one for one in _FAMILIES if name.startswith(one.name[:-1])), None)


def of_transfer(name: str) -> Reason:
    """The entry of a transfer's reason. An unknown one, of a newer worker, has the defaults: it is tried elsewhere."""
    return find(name) or Reason(name, _SEND, "")
