"""From a request's fields to the engine's sampling parameters; ranges are checked here, once."""

import math

from kvbelt.engine.api import SamplingParams
from kvbelt.errors import RequestError
from kvbelt.worker.requests import ChatRequest, CompletionRequest

#: OpenAI's default for completions. Chat has none: it runs to the end of the context.
DEFAULT_COMPLETION_TOKENS = 16

_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)


def sampling_of(request: CompletionRequest | ChatRequest, choice: int) -> SamplingParams:
    """The sampling parameters of choice number ``choice``.

    Choice *i* of a seeded request is seeded with ``seed + i``, as in vLLM.

    Raises:
        RequestError: 400, a value is out of range; ``param`` names it.
    """
    for name, low, high in _RANGES:
        value = getattr(request, name)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise RequestError(f"{name} is {value}; it must lie between {low:g} and {high:g}", param=name)
    top_p = 1.0 if request.top_p is None else request.top_p
    if not 0 < top_p <= 1:
        raise RequestError(f"top_p is {top_p}; it must be above 0 and at most 1", param="top_p")
    top_k = 0 if request.top_k is None else request.top_k
    if top_k < -1:
        raise RequestError(f"top_k is {top_k}; it must be -1 or 0 (off) or positive", param="top_k")
    repetition = 1.0 if request.repetition_penalty is None else request.repetition_penalty
    if not (math.isfinite(repetition) and repetition > 0):
        raise RequestError(f"repetition_penalty is {repetition}; it must be above 0", param="repetition_penalty")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if any(not text for text in stop):
        raise RequestError("stop holds an empty string; leave it out", param="stop")
    limit, name = _limit(request)
    minimum = request.min_tokens or 0
    if minimum < 0:
        raise RequestError(f"min_tokens is {minimum}; it cannot be negative", param="min_tokens")
    if limit is not None and minimum > limit:
        raise RequestError(f"min_tokens is {minimum}, more than {name} {limit}", param="min_tokens")
    if request.seed is not None and not -(2**63) <= request.seed < 2**64:
        raise RequestError(f"seed is {request.seed}; it must fit in 64 bits", param="seed")
    return SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        min_p=request.min_p or 0.0,
        seed=None if request.seed is None else request.seed + choice,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=repetition,
        logit_bias=_logit_bias(request),
        logprobs=_logprobs(request),
        stop=tuple(stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stop_str_in_output=request.include_stop_str_in_output,
        min_tokens=minimum,
        max_tokens=limit,
        ignore_eos=request.ignore_eos,
        skip_special_tokens=request.skip_special_tokens,
    )


def _limit(request: CompletionRequest | ChatRequest) -> tuple[int | None, str]:
    if isinstance(request, CompletionRequest):
        return (DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens), "max_tokens"
    if request.max_completion_tokens is None:
        return request.max_tokens, "max_tokens"
    if request.max_completion_tokens < 1:
        raise RequestError(
            f"max_completion_tokens is {request.max_completion_tokens}; it must be at least 1",
            param="max_completion_tokens",
        )
    return request.max_completion_tokens, "max_completion_tokens"


def _logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    return (request.top_logprobs or 0) if request.logprobs else None


def _logit_bias(request: CompletionRequest | ChatRequest) -> dict[int, float]:
    biases = {}
    for token, bias in (request.logit_bias or {}).items():
        if not token.isdecimal() or not -100 <= bias <= 100:
            raise RequestError(
                f"logit_bias holds {token!r}: {bias}; it maps token ids to values between -100 and 100",
                param="logit_bias",
            )
        biases[int(token)] = bias
    return biases
