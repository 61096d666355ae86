"""One request's answer: its text, and the decision that it is over.

Order in which an answer ends, when one token would end it in several ways: an end token, a stop string, the length.
Until ``min_tokens`` none but the length counts. The text of an end token is not given out, unless the client asked
for stop strings to be included; what was held back (an incomplete character, half a stop string) comes with the end.
"""

from dataclasses import dataclass

from kvbelt.engine.api import FinishReason, GenerationRequest, TokenLogprob
from kvbelt.engine.sampling import Sampled
from kvbelt.engine.text import Decoder, Detokenizer, StopChecker


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added."""

    token_id: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class Answer:
    """Grows by one token at a time.

    Args:
        request: what was asked.
        decoder: the model's tokenizer.
        eos_token_ids: the model's end tokens.
        max_tokens: bound of the answer, the model's context included.
    """

    def __init__(
        self, request: GenerationRequest, decoder: Decoder, eos_token_ids: tuple[int, ...], max_tokens: int
    ) -> None:
        params = request.sampling
        self._params = params
        self._decoder = decoder
        self._eos = frozenset(() if params.ignore_eos else eos_token_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._max_tokens = max_tokens
        self._count = 0
        self._text = Detokenizer(decoder, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
        self._stops = StopChecker(params.stop, include=params.include_stop_str_in_output)
        #: Tokens that would end it; barred by the sampler until min_tokens.
        self.end_token_ids = tuple(self._eos | self._stop_ids)

    def push(self, sampled: Sampled) -> Piece:
        """Add the token that was drawn."""
        token = sampled.token_id
        assert token is not None, "a row that is not numbers has no token"
        self._count += 1
        reason: FinishReason | None = None
        stop_reason: int | str | None = None
        if self._count >= self._params.min_tokens and token in self._eos | self._stop_ids:
            reason = FinishReason.STOP
            stop_reason = None if token in self._eos else token
        hidden = reason is not None and not self._params.include_stop_str_in_output
        text = "" if hidden else self._text.push(token)
        if reason is None and self._count >= self._max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            text += self._text.flush()
        text = self._stops.push(text, checking=self._count > self._params.min_tokens)
        if self._stops.found is not None:
            if reason is not FinishReason.STOP:
                reason, stop_reason = FinishReason.STOP, self._stops.found
        elif reason is not None:
            text += self._stops.flush()
        return Piece(token, text, self._logprobs(sampled, token), reason, stop_reason)

    def _logprobs(self, sampled: Sampled, token: int) -> tuple[TokenLogprob, ...]:
        if sampled.logprob is None:
            return ()
        top = tuple((i, self._decoder.token(i), value) for i, value in sampled.top)
        return (TokenLogprob(token, self._decoder.token(token), sampled.logprob, top),)
