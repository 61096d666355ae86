"""A request's fields as the engine's sampling parameters. The engine checks their ranges."""

from dataclasses import replace
from math import isnan

from kvbelt.engine.api import SamplingParams
from kvbelt.errors import RequestError
from kvbelt.wire.requests import ChatRequest, CompletionRequest

DEFAULT_COMPLETION_TOKENS = 16  #: OpenAI's default; chat has none, and runs to the end of the context
_MAX_ID_DIGITS = 20  #: more than any token id has; Python refuses to read thousands of digits

_PASSED_ON = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "min_tokens",
)  # fmt: skip


def sampling_of(
    request: CompletionRequest | ChatRequest, choice: int, bad_words: tuple[tuple[int, ...], ...] = ()
) -> SamplingParams:
    """Choice *i* of a seeded request has seed ``seed + i``, as in vLLM. Raises RequestError 400: bad ``logit_bias``.

    ``bad_words``: the request's, as token ids.
    """
    chat = isinstance(request, ChatRequest)
    limit = request.max_tokens
    if isinstance(request, ChatRequest):
        limit = limit if request.max_completion_tokens is None else request.max_completion_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    else:
        logprobs = request.logprobs
    given = {name: value for name in _PASSED_ON if (value := getattr(request, name)) is not None}
    return SamplingParams(
        **given,
        seed=None if request.seed in (None, -1) else request.seed + choice,  # -1: none, as in vLLM
        logit_bias=_logit_bias(request.logit_bias or {}),
        allowed_token_ids=None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
        bad_words=bad_words,
        logprobs=logprobs,
        prompt_logprobs=logprobs if not chat and request.echo else None,
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stop_str_in_output=request.include_stop_str_in_output,
        max_tokens=1 if echoes_only(request) else DEFAULT_COMPLETION_TOKENS if limit is None and not chat else limit,
        ignore_eos=request.ignore_eos,
        skip_special_tokens=request.skip_special_tokens,
    )


def echoes_only(request: CompletionRequest | ChatRequest) -> bool:
    """Whether the prompt is all that is asked for. The engine always makes a token, which is then left out."""
    return isinstance(request, CompletionRequest) and bool(request.echo) and request.max_tokens == 0


def samplings_of(
    request: CompletionRequest | ChatRequest, bad_words: tuple[tuple[int, ...], ...] = ()
) -> list[SamplingParams]:
    """One a choice. They differ in their seeds alone, so that the rest is read once."""
    first, n = sampling_of(request, 0, bad_words), request.n or 1
    if first.seed is None:
        return [first] * n
    return [replace(first, seed=first.seed + choice) for choice in range(n)]


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    biases = {}
    for token, bias in given.items():
        number = _id(token)
        if number < 0 or isnan(bias):
            raise RequestError(
                f"logit_bias holds {token[:64]!r}: {bias}; it maps token ids to values between -100 and 100",
                param="logit_bias",
            )
        biases[number] = min(100.0, max(-100.0, bias))  # as in vLLM
    return biases


def _id(token: str) -> int:
    """Negative: it is none."""
    try:
        return int(token) if len(token) <= _MAX_ID_DIGITS else -1
    except ValueError:
        return -1
