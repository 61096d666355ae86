"""The errors that cross packages.

A tree, so that a caller can catch as widely as it needs::

    KVBeltError
    ├── SettingsError        a setting, a flag or a file is wrong: one line, exit status 2
    ├── RequestError         a client's request is wrong or cannot be served: an HTTP status
    ├── ChannelError         bytes could not be moved: the peer is gone, the vendor refused
    └── StartError           a process could not start (port taken, model unreadable): exit status 2

Packages that import none of the others (http, wire, engine, channels) raise their own errors, and their callers
translate.
"""

import difflib
from collections.abc import Sequence


class KVBeltError(Exception):
    """Every error that kvbelt raises on purpose."""


class SettingsError(KVBeltError):
    """A setting is wrong. The message names it, its value and the remedy."""


class StartError(KVBeltError):
    """A process cannot start. The message has the reason and the remedy."""


class RequestError(KVBeltError):
    """A request that gets an HTTP error in OpenAI's shape."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message  #: what was wrong, with which value, and what to do
        self.kind = kind  #: OpenAI's ``error.type``
        self.param = param  #: the request field at fault, if one is
        self.code = code or status  #: OpenAI's ``error.code`` where it has one, by which clients tell errors apart
        self.reason = reason  #: of ``wire/reasons.py``, where the fault is not the request's


def context_exceeded(context: int, prompt: int, answer: int | None = None, *, at_least: bool = False) -> RequestError:
    """400: the prompt's tokens, or they and those of the answer, are more than the model's context.

    Clients (LangChain, LiteLLM) know this error by its code or by the message's beginning, and send less or go to a
    model of a larger context. ``at_least``: the prompt was not counted to its end.
    """
    wanted = f"the prompt has {'at least ' if at_least else ''}{prompt}"
    if answer is not None:
        wanted += f" and max_tokens asks for {answer} more"
    return RequestError(
        f"This model's maximum context length is {context} tokens; {wanted}. Send a shorter prompt"
        + (" or ask for fewer tokens" if answer is not None else ", which leaves room for an answer"),
        param="prompt" if answer is None else "max_tokens",
        code="context_length_exceeded",
    )


class ChannelError(KVBeltError):
    """Memory could not be registered or bytes could not be moved. The message has the vendor's text."""


def resembling(word: str, known: Sequence[str]) -> str:
    """`` (did you mean X?)`` if ``word`` looks like one of ``known``, else nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
