"""Texts and messages as token ids, and the hashes of their blocks. Works on a separate thread.

It is one thread, because a tokenizer may not be safe on several, and a long prompt must not delay streaming, health or
metrics.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jinja2
import msgspec

from kvbelt.engine.api import PrefixHashes
from kvbelt.errors import RequestError
from kvbelt.wire.block_hash import block_hashes, chained, root
from kvbelt.worker.requests import ChatRequest, CompletionRequest, split_prompts

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    prefix: PrefixHashes


class Prompts:
    """Turns requests into prompts of blocks of ``block_size`` tokens. The tokenizer has the chat template."""

    def __init__(self, tokenizer: Any, block_size: int) -> None:
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def of_completion(self, request: CompletionRequest) -> list[Prompt]:
        """Each prompt, in order. Raises RequestError 400: one is empty, of mixed kinds, or has an invalid token id."""
        prompts, salt = split_prompts(request.prompt), request.cache_salt
        return await self._off_loop(lambda: [self._named(self._ids(prompt), salt) for prompt in prompts])

    async def of_chat(self, request: ChatRequest) -> Prompt:
        """The rendered conversation. Raises RequestError 400: there is no chat template, or it refuses the messages."""
        return await self._off_loop(lambda: self._named(self._rendered(request), request.cache_salt))

    async def texts_of(self, prompts: Sequence[tuple[int, ...]]) -> list[str]:
        return await self._off_loop(
            lambda: [self._tokenizer.decode(list(ids), skip_special_tokens=True) for ids in prompts]
        )

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _named(self, token_ids: tuple[int, ...], salt: str | None) -> Prompt:
        try:
            hashes = block_hashes(token_ids, self._block_size, salt or "")
        except ValueError as error:
            raise RequestError(f"the prompt holds an invalid token id: {error}", param="prompt") from None
        return Prompt(token_ids, PrefixHashes(root(salt or ""), hashes, chained))

    def _ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        ids: list[int] = self._tokenizer.encode(prompt)
        if not ids:
            raise RequestError("prompt is empty once tokenized; send at least one token", param="prompt")
        return tuple(ids)

    def _rendered(self, request: ChatRequest) -> tuple[int, ...]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise RequestError("this model has no chat template; use /v1/completions", status=400, param="messages")
        messages = [
            {key: value for key, value in msgspec.to_builtins(message).items() if value is not None}
            for message in request.messages
        ]
        for message in messages:
            if isinstance(message.get("content"), list):
                message["content"] = "\n".join(part["text"] for part in message["content"])
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=request.add_generation_prompt and not request.continue_final_message,
                continue_final_message=request.continue_final_message,
                **(request.chat_template_kwargs or {}),
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise RequestError("the conversation is empty once rendered; send at least one token", param="messages")
        return tuple(ids)
