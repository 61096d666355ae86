"""From texts and messages to token ids. Runs off the event loop, on one thread of its own.

One thread, because a tokenizer is not promised to be safe on several, and because a long prompt
must not hold up streaming, health or metrics.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jinja2
import msgspec

from kvbelt.errors import RequestError
from kvbelt.worker.requests import ChatRequest, CompletionRequest, split_prompts

T = TypeVar("T")


class Prompts:
    """Turns requests into token ids with the model's tokenizer and chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def of_completion(self, request: CompletionRequest) -> list[tuple[int, ...]]:
        """Token ids of each prompt, in order.

        Raises:
            RequestError: 400, the prompt is empty or of mixed kinds.
        """
        prompts = split_prompts(request.prompt)
        return await self._off_loop(lambda: [self._ids(prompt) for prompt in prompts])

    async def of_chat(self, request: ChatRequest) -> tuple[int, ...]:
        """Token ids of the rendered conversation.

        Raises:
            RequestError: 400, the model has no chat template, or the template refuses the messages.
        """
        return await self._off_loop(lambda: self._rendered(request))

    async def texts_of(self, prompts: list[tuple[int, ...]]) -> list[str]:
        """The prompts' texts, for ``echo``."""
        return await self._off_loop(
            lambda: [self._tokenizer.decode(list(ids), skip_special_tokens=True) for ids in prompts]
        )

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

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
