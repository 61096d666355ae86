"""Checks a request before the engine takes it. Each refusal names the field, its value, and the bound."""

import math
from collections.abc import Sequence

from kvbelt.engine.api import GenerationRequest, InvalidRequestError, SamplingParams

#: Most alternatives to a token; vLLM's default.
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 2.0  #: OpenAI's limit, and vLLM's
_SEED_BITS = 63


def check_request(request: GenerationRequest, vocab_size: int, max_model_len: int) -> None:
    """Raise an InvalidRequestError, which names the field at fault, if the request can never be served."""
    prompt = request.prompt_token_ids
    if not prompt:
        raise InvalidRequestError("the prompt is empty; it needs at least one token", param="prompt")
    _check_ids("prompt", prompt, vocab_size)
    if len(prompt) + 1 > max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens; prompt and answer together must not exceed "
            f"{max_model_len}, so shorten the prompt to {max_model_len - 1} or less",
            param="prompt",
        )
    if request.sampling.prompt_logprobs is not None and request.incoming is not None:
        raise InvalidRequestError(
            "log probabilities of a prompt need all of it to be computed here; do not send its KV",
            param="kv_transfer_params",
        )
    _check_sampling(request.sampling, vocab_size)


def _check_sampling(p: SamplingParams, vocab_size: int) -> None:
    _check("temperature", p.temperature, 0 <= p.temperature <= MAX_TEMPERATURE, f"between 0 and {MAX_TEMPERATURE:g}")
    _check("top_p", p.top_p, 0 < p.top_p <= 1, "above 0 and at most 1")
    _check("top_k", p.top_k, p.top_k >= -1, "-1 or 0 (off) or at least 1")
    _check("min_p", p.min_p, 0 <= p.min_p <= 1, "between 0 and 1")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(p, name)
        _check(name, value, -2 <= value <= 2, "between -2 and 2")
    repetition, most_penalty = p.repetition_penalty, 100.0
    _check("repetition_penalty", repetition, 1 / most_penalty <= repetition <= most_penalty, "between 0.01 and 100")
    if p.seed is not None:
        _check("seed", p.seed, -(1 << _SEED_BITS) <= p.seed < (1 << _SEED_BITS), "a 64-bit integer")
    for name, count in (("logprobs", p.logprobs), ("prompt_logprobs", p.prompt_logprobs)):
        _check(name, count, count is None or 0 <= count <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
    if p.max_tokens is not None:
        _check("max_tokens", p.max_tokens, p.max_tokens >= 1, "at least 1")
    most = math.inf if p.max_tokens is None else p.max_tokens
    _check("min_tokens", p.min_tokens, 0 <= p.min_tokens <= most, f"between 0 and max_tokens ({p.max_tokens})")
    _check("stop", list(p.stop), all(p.stop), "strings of at least one character")
    _check_ids("stop_token_ids", p.stop_token_ids, vocab_size)
    _check("allowed_token_ids", p.allowed_token_ids, p.allowed_token_ids != (), "a list of at least one token id")
    _check_ids("allowed_token_ids", p.allowed_token_ids or (), vocab_size)
    for word in p.bad_words:
        _check("bad_words", word, bool(word), "texts of at least one token")
        _check_ids("bad_words", word, vocab_size)
    _check_ids("logit_bias", tuple(p.logit_bias), vocab_size)
    biases = list(p.logit_bias.values())
    _check("logit_bias", biases, all(map(math.isfinite, biases)), "finite numbers")


def _check(name: str, value: object, good: bool, bound: str) -> None:
    if not good:
        raise InvalidRequestError(f"{name} is {value!r}; it must be {bound}", param=name)


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidRequestError(
            f"{name} holds token id {wrong}; the model's vocabulary has the ids 0 to {vocab_size - 1}", param=name
        )
