"""A client's request, parsed once as far as routing needs, and the bodies of the calls made from it.

Prompts and messages are never decoded here. A client's own ``kv_transfer_params`` are dropped: it could name another
request's KV.
"""

import re

import msgspec

from kvbelt.errors import RequestError
from kvbelt.http import Pieces
from kvbelt.limits import DEFAULTS, Limits, not_an_object, require_ids_fit
from kvbelt.proxy.request import splice
from kvbelt.proxy.request.fields import HANDOFF, KnownFields
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff
from kvbelt.wire.json_body import PLACEHOLDER, JsonDecoder, cut_numbers

_LIST_OF_PROMPTS = re.compile(rb"""\[[ \t\r\n]*["\[]""")
_LIST_OF_LISTS = re.compile(rb"\[[ \t\r\n]*\[")
_WITH_HANDOFF = splice.key(HANDOFF)
_items: JsonDecoder[list[msgspec.Raw]] = JsonDecoder(list[msgspec.Raw])
_encode = msgspec.json.Encoder().encode
_completions, _chats = KnownFields(chat=False), KnownFields(chat=True)


class ClientBody:
    """One request.

    Attributes:
        fields: everything beside its prompt.
        prompt: the prompt or the messages, as JSON.
        num_prompts: how many it has.
    """

    __slots__ = ("_before", "_body", "chat", "fields", "num_prompts", "prompt")

    def __init__(self, body: bytes, *, chat: bool, limits: Limits = DEFAULTS, context: int | None = None) -> None:
        """Parse.

        Raises RequestError: 400; not UTF-8, not a JSON object, a wrong field, too many answers or ids.

        Args:
            body: one that is not small for ``limits`` has been looked through.
            chat: it has messages.
            limits: of a request.
            context: the longest one of a worker, in tokens; None: it is not known.
        """
        self.chat = chat
        self._body = body
        self.num_prompts = 1
        try:
            if limits.is_small(body) and not body.isascii():
                body.decode()
            cut = None if chat else cut_numbers(body, b"prompt")
            if cut is None or not self._take_numbers(*cut, limits, context):
                members = splice.members_of(body)
                limits.require_members(members)
                self._take(members, limits.sequences)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise not_an_object(error) from None
        limits.require_sequences(self.num_prompts, self.fields.view.n or 1)

    def _take_numbers(self, rest: bytes, numbers: memoryview, limits: Limits, context: int | None) -> bool:
        """Take a prompt of ids, which was cut out of the ``rest``; False: it is another list."""
        fields = _completions.get(rest)
        if fields is None:
            members = splice.members_of(rest)
            limits.require_members(members)
            prompt = members.pop("prompt", None)
            if prompt is None or bytes(prompt) != PLACEHOLDER:
                return False
            fields = _completions.of(members, rest)
        if "truncate_prompt_tokens" not in fields.names:
            require_ids_fit(numbers, context)
        self.fields, self.prompt, self._before = fields, numbers, b'{"prompt":'
        return True

    def _take(self, members: dict[str, splice.Value], most: int) -> None:
        name = "messages" if self.chat else "prompt"
        prompt = members.pop(name, None)
        self.fields = (_chats if self.chat else _completions).of(members, splice.object_of(members))
        if prompt is None:
            if "prompt_embeds" not in self.fields.names:
                raise RequestError(f"{name} is missing; send it", param=name)
            self.prompt, self._before = memoryview(splice.NULL), b""
            return
        self.prompt, self._before = memoryview(prompt), splice.key(name)
        if not self.chat:
            self.num_prompts = _count_prompts(self.prompt, most)

    def why_whole(self, context: int | None) -> str | None:
        """Why a worker is to answer all of it, of ``wire/reasons.py``; None: it may be split.

        ``context``: the shortest one of a worker, in tokens; None: it is not known.
        """
        fields = self.fields
        limit, view = fields.limit, fields.view
        if limit == 0:
            return "no_tokens"
        if fields.may_be_refused or (limit is not None and context is not None and limit >= context):
            return "may_be_refused"
        if view.prompt_logprobs is not None or (view.echo and view.logprobs is not None):
            return "prompt_logprobs"  # a worker that is sent the prompt's KV does not compute them
        return "no_prompt" if self.prompt == splice.NULL else None

    def excerpt(self, characters: int) -> str:
        """The beginning of the prompt."""
        # A character is at most four bytes; the cut may go through one.
        return bytes(self.prompt[: 4 * characters]).decode("utf-8", "ignore")[:characters]

    # The bodies of the calls

    def plain(self) -> Pieces:
        """The client's own body."""
        return (self._body,) if self.fields.no_handoff else self._with(self.fields.others)

    def for_prefill(self, handoff: PrefillHandoff) -> Pieces:
        """A prefill call: one token with its ids, and the KV to the receiver."""
        return self._with(self.fields.for_prefill, _WITH_HANDOFF, _encode(handoff))

    def for_decode(self, handoff: DecodeHandoff) -> Pieces:
        """The client's own body, over the transferred KV."""
        return self._with(self.fields.others, _WITH_HANDOFF, _encode(handoff))

    def _with(self, *members: bytes) -> Pieces:
        """The object of the prompt and these members, each with a comma before it."""
        if self._before:
            return (b"{", self._before[1:], self.prompt, *members, b"}")
        return (b"{", b"".join(members)[1:], b"}")

    def for_continuation(
        self,
        prompt_token_ids: bytes | memoryview,
        first_token_id: int,
        max_tokens: int,
        handoff: DecodeHandoff | None,
        *,
        special_tokens: bool = False,
    ) -> Pieces:
        """A completion of the prompt and its first token.

        Args:
            prompt_token_ids: the prompt's ids as a JSON list.
            first_token_id: the id that the client already has.
            max_tokens: the tokens that may follow.
            handoff: the KV's name; None if it is lost, so that the worker computes it.
            special_tokens: the text has them, unless the client says something else.
        """
        fields = self.fields
        special = special_tokens and "skip_special_tokens" not in fields.names
        return (
            b'{"prompt":',
            memoryview(prompt_token_ids)[:-1],
            b',%d],"max_tokens":%d' % (first_token_id, max_tokens),
            fields.carried,
            b',"skip_special_tokens":false' if special else b"",
            b"}" if handoff is None else _WITH_HANDOFF + _encode(handoff) + b"}",
        )


def _count_prompts(prompt: memoryview, most: int) -> int:
    """Their number; where it is more than ``most``, as many or fewer, which costs less to find out."""
    if _LIST_OF_PROMPTS.match(prompt) is None:  # else texts, lists of ids, or values that a worker refuses
        return 1
    return least if (least := _least_prompts(prompt)) > most else len(_items.decode(prompt))


def _least_prompts(prompt: memoryview) -> int:
    """At least half of a list's prompts, and never more than all, without a look at each.

    A list has a closing bracket. A text has two quotes; those inside it are escaped, and its last one looks so behind a
    backslash.
    """
    text = bytes(prompt)
    lists, texts = text.count(b"]") - 1, (text.count(b'"') - text.count(b'\\"')) // 2
    return lists if _LIST_OF_LISTS.match(text) else texts
