"""From a request's fields to the engine's sampling parameters. Ranges are the engine's to check, in one place."""

from kvbelt.engine.api import SamplingParams
from kvbelt.errors import RequestError
from kvbelt.worker.requests import ChatRequest, CompletionRequest

#: OpenAI's default for completions. Chat has none: it runs to the end of the context.
DEFAULT_COMPLETION_TOKENS = 16

#: A token id has fewer digits. Python refuses to read a number of thousands of them.
_MAX_ID_DIGITS = 20


def sampling_of(request: CompletionRequest | ChatRequest, choice: int) -> SamplingParams:
    """The sampling parameters of choice number ``choice``.

    Choice *i* of a seeded request is seeded with ``seed + i``, as in vLLM.

    Raises:
        RequestError: 400, ``logit_bias`` does not map token ids.
    """
    chat = isinstance(request, ChatRequest)
    limit = request.max_tokens
    if isinstance(request, ChatRequest):
        limit = limit if request.max_completion_tokens is None else request.max_completion_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    else:
        logprobs = request.logprobs
    given = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "min_tokens",
        )
        if (value := getattr(request, name)) is not None
    }
    return SamplingParams(
        **given,
        seed=None if request.seed is None else request.seed + choice,
        logit_bias=_logit_bias(request.logit_bias or {}),
        logprobs=logprobs,
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stop_str_in_output=request.include_stop_str_in_output,
        max_tokens=DEFAULT_COMPLETION_TOKENS if limit is None and not chat else limit,
        ignore_eos=request.ignore_eos,
        skip_special_tokens=request.skip_special_tokens,
    )


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    biases = {}
    for token, bias in given.items():
        if not token.isdecimal() or len(token) > _MAX_ID_DIGITS or not -100 <= bias <= 100:
            raise RequestError(
                f"logit_bias holds {token[:64]!r}: {bias}; it maps token ids to values between -100 and 100",
                param="logit_bias",
            )
        biases[int(token)] = bias
    return biases
