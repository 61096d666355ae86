"""A client's request, parsed once as far as routing needs, and the bodies of the calls made from it.

Prompts and messages are never decoded here. A client's own ``kv_transfer_params`` are dropped: it could name another
request's KV.
"""

import re
from collections.abc import Mapping

import msgspec

from kvbelt.errors import RequestError
from kvbelt.limits import DEFAULTS, Limits
from kvbelt.proxy.request import splice
from kvbelt.routing.exactness import CARRIED, token_limit
from kvbelt.routing.view import CHAT_ONLY, VIEWED, RequestView
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff
from kvbelt.wire.json_body import JsonDecoder
from kvbelt.wire.lenient import fields_relaxed

#: The API's default for completions.
COMPLETIONS_MAX_TOKENS = 16

#: What the embedded engine takes, and vLLM with its defaults.
_MOST_CHOICES = 128
_MOST_LOGPROBS = 20
#: vLLM takes lower temperatures for 0, with which it makes one choice only.
_GREEDY = 1e-5

_LIST_OF_PROMPTS = re.compile(rb"""\[[ \t\r\n]*["\[]""")
_LIST_OF_LISTS = re.compile(rb"\[[ \t\r\n]*\[")
_NULL = b"null"
_HANDOFF = "kv_transfer_params"
_items: JsonDecoder[list[msgspec.Raw]] = JsonDecoder(list[msgspec.Raw])
_view: JsonDecoder[RequestView] = JsonDecoder(RequestView)
_encode = msgspec.json.Encoder().encode

#: Left out of a prefill call: replaced below, or about tokens that it does not generate.
_NOT_FOR_PREFILL = frozenset(
    {
        "stream", "stream_options", "n", "best_of", "echo", "max_tokens", "max_completion_tokens", "min_tokens",
        "return_token_ids", "logprobs", "top_logprobs", "prompt_logprobs", _HANDOFF,
    }
)  # fmt: skip
#: The model, the salt, and what a chat template writes before the messages.
_BESIDE_PROMPT = (
    "model", "cache_salt", "tools", "functions", "documents", "chat_template", "chat_template_kwargs",
    "add_special_tokens",
)  # fmt: skip

_ONE_TOKEN = b'"max_tokens":1,"n":1,"stream":false,"return_token_ids":true,"kv_transfer_params":'
_ONE_CHAT_TOKEN = b'"max_completion_tokens":1,' + _ONE_TOKEN


class ClientBody:
    __slots__ = ("_body", "_members", "_numbers", "chat", "names", "num_prompts", "view")

    def __init__(self, body: bytes, *, chat: bool, limits: Limits = DEFAULTS) -> None:
        """Parse. Raises RequestError: 400; not UTF-8, not a JSON object, a wrong field, or too many answers."""
        self.chat = chat
        self._body = body
        self._numbers: bytes | None = None
        self._members: Mapping[str, splice.Value] = self._parse(body, limits)
        #: Names of the members that are not null.
        self.names = frozenset(
            name
            for name, value in self._members.items()
            if name in ("prompt", "messages") or len(memoryview(value)) != 4 or bytes(value) != _NULL
        )
        read = VIEWED if chat else VIEWED - CHAT_ONLY
        viewed = splice.object_of({name: value for name, value in self._members.items() if name in read})
        try:
            self.view = _viewed(viewed)
        except msgspec.ValidationError as error:
            raise RequestError(
                f"invalid request: {error}; correct the field and send the request again", param=_place(error)
            ) from None
        self._check()
        self.num_prompts = 1 if chat else self._count_prompts(limits.sequences)
        limits.require_sequences(self.num_prompts, self.view.n or 1)

    def _parse(self, body: bytes, limits: Limits) -> Mapping[str, splice.Value]:
        limits.require_parts(body)
        try:
            if not body.isascii():
                body.decode()
            cut = None if self.chat else splice.cut_numbers(body, b"prompt")
            if cut is not None:
                rest, numbers = cut
                members: dict[str, splice.Value] = dict(splice.members_of(rest))
                prompt = members.get("prompt")
                if prompt is not None and bytes(prompt) == splice.PLACEHOLDER:
                    members["prompt"] = self._numbers = numbers
                    return members
            return dict(splice.members_of(body))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"the request body is not a JSON object in UTF-8: {error}") from None

    def _check(self) -> None:
        needed = "messages" if self.chat else "prompt"
        if needed not in self._members and "prompt_embeds" not in self.names:
            raise RequestError(f"{needed} is missing; send it", param=needed)
        for name in ("max_tokens", "max_completion_tokens"):
            limit = getattr(self.view, name)
            if limit is not None and limit < 0:
                raise RequestError(f"{name} is {limit}; it must be at least 0", param=name)
        if self.view.stream_options is not None and not self.view.stream:
            raise RequestError("stream_options is only allowed with stream: true", param="stream_options")

    def _count_prompts(self, most: int) -> int:
        """Their number; where it is more than ``most``, as many or fewer, which costs less to find out."""
        if self._numbers is not None:
            return 1
        prompt = self.prompt
        if _LIST_OF_PROMPTS.match(prompt) is None:  # else texts, lists of ids, or values that a worker refuses
            return 1
        return least if (least := _least_prompts(prompt)) > most else len(_items.decode(prompt))

    def why_whole(self, context: int | None) -> str | None:
        """Why a worker is to answer all of it, of ``wire/reasons.py``; None: it may be split.

        ``context``: the shortest one of a worker, in tokens; None: it is not known.
        """
        view = self.view
        if self.limit == 0:
            return "no_tokens"
        if self._may_be_refused(context):
            return "may_be_refused"
        if view.prompt_logprobs is not None or (view.echo and view.logprobs is not None):
            return "prompt_logprobs"  # a worker that is sent the prompt's KV does not compute them
        return "no_prompt" if len(self.prompt) == len(_NULL) and bytes(self.prompt) == _NULL else None

    def _may_be_refused(self, context: int | None) -> bool:
        """Whether a worker may refuse the value of a field that a prefill call leaves out.

        What is here is what either engine refuses by itself, without the prompt. One worker that is asked for all of it
        refuses it at once, in its own words; of two, the second would do so after a whole prefill.
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
                logprobs is not None
                and (isinstance(logprobs, bool) is not self.chat or not 0 <= logprobs <= _MOST_LOGPROBS)
            )
            or (top is not None and (not 0 <= top <= _MOST_LOGPROBS or (top > 0 and not logprobs)))
            or (least is not None and (least < 0 or (limit is not None and least > limit)))
            or (limit is not None and context is not None and limit >= context)
            or "use_beam_search" in self.names
        )

    @property
    def limit(self) -> int | None:
        """Tokens to generate; None: up to the model's context (chat only)."""
        limit = token_limit(self.view)
        return COMPLETIONS_MAX_TOKENS if limit is None and not self.chat else limit

    @property
    def include_usage(self) -> bool:
        options = self.view.stream_options
        return bool(options and options.include_usage)

    @property
    def prompt(self) -> memoryview:
        """The prompt or the messages, as JSON."""
        return memoryview(self._members.get("messages" if self.chat else "prompt", _NULL))

    @property
    def beside_prompt(self) -> bytes:
        """What must be equal, too, before a worker shares KV between two prompts."""
        return b"\n".join(self._members[name] for name in _BESIDE_PROMPT if name in self.names)

    def excerpt(self, characters: int) -> str:
        """The beginning of the prompt."""
        # A character is at most four bytes; the cut may go through one.
        return bytes(self.prompt[: 4 * characters]).decode("utf-8", "ignore")[:characters]

    # The bodies of the calls

    def plain(self) -> bytes:
        """The client's own body."""
        if _HANDOFF not in self._members:
            return self._body
        return splice.object_of({name: value for name, value in self._members.items() if name != _HANDOFF})

    def for_prefill(self, handoff: PrefillHandoff) -> bytes:
        """A prefill call: one token with its ids, and the KV to the receiver."""
        kept = {name: value for name, value in self._members.items() if name not in _NOT_FOR_PREFILL}
        if self.view.min_tokens:
            kept["min_tokens"] = b"1"
        fixed = _ONE_CHAT_TOKEN if self.chat else _ONE_TOKEN
        return b"".join((splice.object_of(kept)[:-1], b",", fixed, _encode(handoff), b"}"))

    def for_decode(self, handoff: DecodeHandoff) -> bytes:
        """The client's own body, over the transferred KV."""
        kept = {name: value for name, value in self._members.items() if name != _HANDOFF}
        kept[_HANDOFF] = _encode(handoff)
        return splice.object_of(kept)

    def for_continuation(
        self,
        prompt_token_ids: bytes,
        first_token_id: int,
        max_tokens: int,
        handoff: DecodeHandoff | None,
        *,
        special_tokens: bool = False,
    ) -> bytes:
        """A completion of the prompt and its first token.

        Args:
            prompt_token_ids: the prompt's ids as a JSON list.
            first_token_id: the id that the client already has.
            max_tokens: the tokens that may follow.
            handoff: the KV's name; None if it is lost, so that the worker computes it.
            special_tokens: the text has them, unless the client says something else.
        """
        kept = {name: value for name, value in self._members.items() if name in CARRIED}
        if special_tokens and "skip_special_tokens" not in self.names:
            kept["skip_special_tokens"] = b"false"
        kept["max_tokens"] = b"%d" % max_tokens
        for name in ("stream", "stream_options"):
            if name in self.names:
                kept[name] = self._members[name]
        if handoff is not None:
            kept[_HANDOFF] = _encode(handoff)
        rest = splice.object_of(kept)
        return b"".join((b'{"prompt":', prompt_token_ids[:-1], b",%d]," % first_token_id, rest[1:]))


def _viewed(members: bytes) -> RequestView:
    try:
        return _view.decode(members)
    except msgspec.ValidationError:
        return msgspec.convert(fields_relaxed(msgspec.json.decode(members), RequestView), RequestView)


def _least_prompts(prompt: memoryview) -> int:
    """At least half of a list's prompts, and never more than all, without a look at each.

    A list has a closing bracket. A text has two quotes; those inside it are escaped, and its last one looks so behind a
    backslash.
    """
    text = bytes(prompt)
    lists, texts = text.count(b"]") - 1, (text.count(b'"') - text.count(b'\\"')) // 2
    return lists if _LIST_OF_LISTS.match(text) else texts


def _place(error: msgspec.ValidationError) -> str | None:
    # msgspec ends its message with the place: "... - at `$.max_tokens`".
    _, found, place = str(error).rpartition("`$.")
    return place.rstrip("`").partition(".")[0].partition("[")[0] if found else None
