"""Texts and messages as token ids, and the hashes of their blocks. Works beside the event loop.

Long prompts have a thread of their own, so that short ones do not wait for them. A text that cannot fit into the
context is refused by its length, or by the tokens of its beginning, so that nobody waits for what is refused anyway.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from kvbelt.engine.api import InvalidRequestError, PrefixHashes
from kvbelt.engine.grammar import Grammars, Matcher
from kvbelt.errors import RequestError, context_exceeded
from kvbelt.wire.block_hash import block_hashes, chained, root
from kvbelt.wire.requests import ChatRequest, CompletionRequest
from kvbelt.worker.messages import for_template, text_of
from kvbelt.worker.requests import split_prompts
from kvbelt.worker.structure import Form

T = TypeVar("T")

_LONG = 64 * 1024  #: characters, or token ids, from which on a prompt counts as long
_PROBED = 8  #: characters a token, of which a text rarely has more: of a longer text the beginning is tokenized first
#: Words of ``chat_template_kwargs`` that fields of a request or the server itself decide, as in vLLM.
_BY_FIELDS = frozenset({"chat_template", "add_generation_prompt", "continue_final_message", "tools"})
#: Arguments of the function that renders, which are none of a template's.
_NO_WORDS = frozenset(
    {
        "conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
    }
)  # fmt: skip
_CUT_TOKENS = 256  #: more than a cut through a word can add


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    prefix: PrefixHashes


class Prompts:
    """Turns requests into prompts of blocks of ``block_size`` tokens. The tokenizer has the chat template."""

    def __init__(self, tokenizer: Any, block_size: int, max_model_len: int, *, trusts_templates: bool = False) -> None:
        """``trusts_templates``: a request may bring its own chat template, which is a program of any length."""
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._trusts_templates = trusts_templates
        self._longest_token = _longest_token(tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._long_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="long-prompts")

    def close(self) -> None:
        for thread in (self._thread, self._long_thread):
            thread.shutdown(wait=False, cancel_futures=True)

    async def of_completion(self, request: CompletionRequest) -> list[Prompt]:
        """Each prompt, in order. Raises RequestError 400: one is empty, of mixed kinds, or has an invalid token id."""
        prompts = split_prompts(request.prompt)
        size = sum(map(len, prompts))
        return await self._off_loop(
            lambda: [self._named(self._ids(prompt, request), request) for prompt in prompts], size
        )

    async def of_chat(self, request: ChatRequest) -> Prompt:
        """The rendered conversation. Raises RequestError 400: there is no chat template, or it refuses the messages."""
        self._check_template(request)
        size = sum(len(text_of(message)) for message in request.messages)
        self._check_size(request, size)
        own = _own_template(request) is not None
        return await self._off_loop(lambda: self._named(self._rendered(request), request), _LONG + 1 if own else size)

    def _check_size(self, request: ChatRequest, characters: int) -> None:
        """What cannot fit is not rendered: a message is a token at least, a token so many characters at most."""
        if request.truncate_prompt_tokens is not None:
            return
        least = len(request.messages)
        if self._longest_token is not None:
            least = max(least, -(-characters // self._longest_token))
        if least > self._max_model_len:
            raise context_exceeded(self._max_model_len, least, at_least=True)

    def _check_template(self, request: ChatRequest) -> None:
        if _own_template(request) is not None and not self._trusts_templates:
            where = "chat_template" if request.chat_template is not None else "chat_template_kwargs"
            raise RequestError(
                f"{where} has a chat template, but this server uses its model's own; leave it out (its operator can "
                "allow it with --trust-request-chat-template)",
                param=where,
            )
        for word in request.chat_template_kwargs or {}:
            if word in _NO_WORDS:
                raise RequestError(
                    f"chat_template_kwargs has {word!r}, which is no variable of a chat template; leave it out",
                    param="chat_template_kwargs",
                )

    async def matcher_of(self, form: Form | None, grammars: Grammars) -> Matcher | None:
        """Raises RequestError 400: the grammar cannot be followed."""
        if form is None:
            return None
        try:
            return await self._off_loop(lambda: grammars.matcher(form.grammar, param=form.param), _LONG + 1)
        except InvalidRequestError as error:
            raise RequestError(str(error), param=error.param) from error

    async def bad_words_of(self, request: CompletionRequest | ChatRequest) -> tuple[tuple[int, ...], ...]:
        """Each bad word as token ids, at the start of a text and inside one. Raises RequestError 400: it is empty."""
        if not request.bad_words:
            return ()
        return await self._off_loop(lambda: self._bad_words(request.bad_words), sum(map(len, request.bad_words)))

    def _bad_words(self, words: list[str]) -> tuple[tuple[int, ...], ...]:
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare, inside = (
                tuple(self._tokenizer.encode(text, add_special_tokens=False))
                for text in (word.lstrip(), " " + word.lstrip())
            )
            if not bare:
                raise RequestError(f"bad_words holds {word!r}; each must have at least one token", param="bad_words")
            found[bare] = None
            # A space may be a token of its own; the word behind it is the one above.
            if len(inside) == len(bare) and inside[0] != bare[0]:
                found[inside] = None
        return tuple(found)

    async def texts_of(self, prompts: Sequence[tuple[int, ...]]) -> list[str]:
        return await self._off_loop(
            lambda: [self._tokenizer.decode(list(ids), skip_special_tokens=True) for ids in prompts],
            sum(map(len, prompts)),
        )

    async def _off_loop(self, work: Callable[[], T], size: int) -> T:
        """``size``: characters, or token ids."""
        thread = self._thread if size <= _LONG else self._long_thread
        return await asyncio.get_running_loop().run_in_executor(thread, work)

    def _encode(self, text: str, request: CompletionRequest | ChatRequest) -> list[int]:
        kept = request.truncate_prompt_tokens
        if self._longest_token is not None:
            most = self._max_model_len * self._longest_token
            if len(text) > most and kept is None:
                raise context_exceeded(self._max_model_len, len(text) // self._longest_token, at_least=True)
            if kept is not None:  # so many tokens are kept at most
                text = text[:most] if request.truncation_side == "right" else text[-most:]
        if kept is None and len(text) > max(_LONG, _PROBED * self._max_model_len):
            # Tokens of the beginning; where it is cut, they may be others than the whole text's.
            beginning = self._ids_of(text[: _PROBED * self._max_model_len], request)
            if len(beginning) > self._max_model_len + _CUT_TOKENS:
                raise context_exceeded(self._max_model_len, len(beginning) - _CUT_TOKENS, at_least=True)
        return self._ids_of(text, request)

    def _ids_of(self, text: str, request: CompletionRequest | ChatRequest) -> list[int]:
        # Unlike the Rust tokenizer's own call, this one lets other threads run meanwhile.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=request.add_special_tokens)
        return ids

    def _named(self, token_ids: tuple[int, ...], request: CompletionRequest | ChatRequest) -> Prompt:
        token_ids = self._truncated(token_ids, request)
        salt = request.cache_salt or ""
        try:
            hashes = block_hashes(token_ids, self._block_size, salt)
        except ValueError as error:
            raise RequestError(f"the prompt holds an invalid token id: {error}", param="prompt") from None
        return Prompt(token_ids, PrefixHashes(root(salt), hashes, chained))

    def _truncated(self, token_ids: tuple[int, ...], request: CompletionRequest | ChatRequest) -> tuple[int, ...]:
        """The last tokens that the request wants to keep, or the first ones."""
        most = request.truncate_prompt_tokens
        if most is None:
            return token_ids
        if most > self._max_model_len:
            raise RequestError(
                f"truncate_prompt_tokens is {most}; the model's context is {self._max_model_len}",
                param="truncate_prompt_tokens",
            )
        if most < 0:  # as many as there is room for
            most = self._max_model_len - 1
        if most == 0:
            raise RequestError("truncate_prompt_tokens is 0; keep at least one token", param="truncate_prompt_tokens")
        return token_ids[:most] if request.truncation_side == "right" else token_ids[-most:]

    def _ids(self, prompt: str | list[int], request: CompletionRequest) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            if len(prompt) > self._max_model_len and request.truncate_prompt_tokens is None:
                raise context_exceeded(self._max_model_len, len(prompt))
            return tuple(prompt)
        ids = self._encode(prompt, request)
        if not ids:
            raise RequestError("prompt is empty once tokenized; send at least one token", param="prompt")
        return tuple(ids)

    def _rendered(self, request: ChatRequest) -> tuple[int, ...]:
        own = _own_template(request)
        if own is None and not getattr(self._tokenizer, "chat_template", None):
            raise RequestError("this model has no chat template; use /v1/completions", status=400, param="messages")
        messages = for_template(request.messages, own or str(self._tokenizer.chat_template))
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=request.tools,
                tokenize=False,
                chat_template=own,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                **_template_words(request),
            )
        except Exception as error:  # noqa: BLE001 -- whatever the template does with what a client sends
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from None
        ids = self._encode(text, request)
        if not ids:
            raise RequestError("the conversation is empty once rendered; send at least one token", param="messages")
        return tuple(ids)


def _template_words(request: ChatRequest) -> dict[str, Any]:
    """What the template is told beside the messages; a client's own words count most."""
    words: dict[str, Any] = {"documents": request.documents}
    if request.reasoning_effort is not None:
        words |= {"reasoning_effort": request.reasoning_effort, "enable_thinking": request.reasoning_effort != "none"}
    given = request.chat_template_kwargs or {}
    return words | {name: value for name, value in given.items() if name not in _BY_FIELDS}


def _own_template(request: ChatRequest) -> str | None:
    named: str | None = (request.chat_template_kwargs or {}).get("chat_template")
    return named if request.chat_template is None else request.chat_template


def _longest_token(tokenizer: Any) -> int | None:
    """Characters that a token can stand for; None: any number, because what is unknown becomes one token."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if model is None or (getattr(model, "unk_token", None) is not None and not getattr(model, "byte_fallback", False)):
        return None
    return max(map(len, tokenizer.get_vocab()))
