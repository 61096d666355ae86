"""All of a request beside its prompt, and what follows from it. Pure.

Requests of one application differ in little else than their prompts. So what their other fields mean is worked out
once for equal bytes, and kept.
"""

from collections.abc import Mapping

import msgspec

from kvbelt.errors import RequestError
from kvbelt.proxy.request import splice
from kvbelt.routing.exactness import CARRIED, Decision, first_token, token_limit
from kvbelt.routing.view import CHAT_ONLY, VIEWED, RequestView
from kvbelt.wire.json_body import JsonDecoder
from kvbelt.wire.lenient import fields_relaxed

#: The API's default for completions.
COMPLETIONS_MAX_TOKENS = 16

HANDOFF = "kv_transfer_params"

#: What the embedded engine takes, and vLLM with its defaults.
_MOST_CHOICES = 128
_MOST_LOGPROBS = 20
_SEED_BITS = 63  # and a sign
#: vLLM takes lower temperatures for 0, with which it makes one choice only.
_GREEDY = 1e-5

#: Left out of a prefill call: replaced below, or about tokens that it does not generate. With a seed, vLLM's CPU engine
#: dies of a prompt that takes several steps (0.32), and the token that the seed would choose is not used.
_NOT_FOR_PREFILL = frozenset(
    {
        "stream", "stream_options", "n", "best_of", "echo", "max_tokens", "max_completion_tokens", "min_tokens",
        "return_token_ids", "logprobs", "top_logprobs", "prompt_logprobs", "seed", HANDOFF,
    }
)  # fmt: skip
#: Of these, what may not be null.
_NOT_NULL = frozenset({"min_tokens", "n", "echo"})
#: The model, the salt, and what a chat template writes before the messages.
_BESIDE_PROMPT = (
    "model", "cache_salt", "tools", "functions", "documents", "chat_template", "chat_template_kwargs",
    "add_special_tokens",
)  # fmt: skip

_ONE_TOKEN = b',"max_tokens":1,"n":1,"stream":false,"return_token_ids":true'
_ONE_CHAT_TOKEN = b',"max_completion_tokens":1' + _ONE_TOKEN

#: Fields that are kept, each of at most so many bytes: those of the latest requests that differ.
_MOST_KEPT = 256
_MOST_BYTES = 2048

_view: JsonDecoder[RequestView] = JsonDecoder(RequestView)


class Fields:
    """Frozen by convention: requests share it.

    Attributes:
        view: the fields that routing reads.
        names: of the fields that are not null.
        limit: tokens to generate; None: up to the model's context (chat only).
        stream: the answer is to come in pieces.
        include_usage: its stream ends with a usage.
        first: where the first token of one prompt may come from.
        may_be_refused: a worker may refuse the value of a field that a prefill call leaves out.
        no_handoff: the client has sent no ``kv_transfer_params``.
        for_prefill, carried, others: members of calls, each with a comma before it: those of a prefill call, those
            that a continuation takes over, and all but ``kv_transfer_params``.
        beside_prompt: what must be equal, too, before a worker shares KV between two prompts.
    """

    __slots__ = (
        "beside_prompt", "carried", "first", "for_prefill", "include_usage", "limit", "may_be_refused", "model",
        "names", "no_handoff", "others", "stream", "view",
    )  # fmt: skip

    def __init__(self, members: Mapping[str, splice.Value], *, chat: bool) -> None:
        """Raises RequestError 400: a field is wrong."""
        self.names = frozenset(name for name, value in members.items() if memoryview(value) != splice.NULL)
        read = VIEWED if chat else VIEWED - CHAT_ONLY
        try:
            view = self.view = _viewed(splice.object_of({name: members[name] for name in members if name in read}))
        except msgspec.ValidationError as error:
            raise RequestError(
                f"invalid request: {error}; correct the field and send the request again", param=_place(error)
            ) from None
        _check(view)
        if view.stream_options is not None and not view.stream and msgspec.json.decode(members["stream_options"]):
            raise RequestError("stream_options is only allowed with stream: true", param="stream_options")
        self.model = view.model or ""
        limit = token_limit(view)
        self.limit = COMPLETIONS_MAX_TOKENS if limit is None and not chat else limit
        self.stream = bool(view.stream)
        self.include_usage = bool(view.stream_options and view.stream_options.include_usage)
        self.first = first_token(view, self.names, num_prompts=1)
        nulls = not _NOT_NULL.isdisjoint(members.keys() - self.names)
        self.may_be_refused = self._may_be_refused(chat=chat, nulls=nulls)
        self.no_handoff = HANDOFF not in members
        others = {name: value for name, value in members.items() if name != HANDOFF}
        self.others = splice.more_of(others)
        kept = {name: value for name, value in others.items() if name not in _NOT_FOR_PREFILL}
        if view.min_tokens:
            kept["min_tokens"] = b"1"
        self.for_prefill = splice.more_of(kept) + (_ONE_CHAT_TOKEN if chat else _ONE_TOKEN)
        kept = {name: value for name, value in others.items() if name in CARRIED}
        kept |= {name: members[name] for name in ("stream", "stream_options") if name in self.names}
        self.carried = splice.more_of(kept)
        self.beside_prompt = b"\n".join(members[name] for name in _BESIDE_PROMPT if name in self.names)

    def first_of(self, num_prompts: int) -> Decision:
        return self.first if num_prompts == 1 else first_token(self.view, self.names, num_prompts=num_prompts)

    def _may_be_refused(self, *, chat: bool, nulls: bool) -> bool:
        """What is here is what either engine refuses by itself, without the prompt.

        One worker that is asked for all of it refuses it at once, in its own words; of two, the second would do so
        after a whole prefill.
        """
        view, limit = self.view, self.limit
        n = 1 if view.n is None else view.n
        greedy = view.temperature is not None and view.temperature < _GREEDY
        logprobs, top, least = view.logprobs, view.top_logprobs, view.min_tokens
        return (
            not 1 <= n <= _MOST_CHOICES
            or (n > 1 and greedy)
            or view.best_of not in (None, n)
            or (
                logprobs is not None and (isinstance(logprobs, bool) is not chat or not 0 <= logprobs <= _MOST_LOGPROBS)
            )
            or (top is not None and (not 0 <= top <= _MOST_LOGPROBS or (top > 0 and not logprobs)))
            or (view.seed is not None and not -(1 << _SEED_BITS) <= view.seed < (1 << _SEED_BITS))
            or (least is not None and (least < 0 or (limit is not None and least > limit)))
            or "use_beam_search" in self.names
            or nulls
        )


class KnownFields:
    """Those of the latest requests, by their bytes. Chats and completions have one each."""

    def __init__(self, *, chat: bool) -> None:
        self._chat = chat
        self._known: dict[bytes, Fields] = {}

    def get(self, text: bytes) -> Fields | None:
        return self._known.get(text)

    def of(self, members: Mapping[str, splice.Value], text: bytes) -> Fields:
        """Of the object that ``text`` is, and its members. Raises RequestError 400: a field is wrong."""
        fields = self._known.get(text)
        if fields is None:
            fields = Fields(members, chat=self._chat)
            if len(text) <= _MOST_BYTES:
                if len(self._known) >= _MOST_KEPT:
                    del self._known[next(iter(self._known))]
                self._known[text] = fields
        return fields


def _check(view: RequestView) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        limit = getattr(view, name)
        if limit is not None and limit < 0:
            raise RequestError(f"{name} is {limit}; it must be at least 0", param=name)


def _viewed(members: bytes) -> RequestView:
    try:
        return _view.decode(members)
    except msgspec.ValidationError:
        return msgspec.convert(fields_relaxed(msgspec.json.decode(members), RequestView), RequestView)


def _place(error: msgspec.ValidationError) -> str | None:
    # msgspec ends its message with the place: "... - at `$.max_tokens`".
    _, found, place = str(error).rpartition("`$.")
    return place.rstrip("`").partition(".")[0].partition("[")[0] if found else None
