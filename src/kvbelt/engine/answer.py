"""One request's answer: its text, and the decision that it is over.

If one token ends an answer in several ways, the first of these counts: an end token, a stop string, the length. Before
``min_tokens`` only the length counts. The text of an end token is left out, unless the client asked for stop strings to
be included. Text that was held back (an incomplete character, half a stop string) comes with the end.
"""

from collections.abc import Sequence

from kvbelt.engine.api import FinishReason, GenerationRequest, Output, TokenLogprob, TopLogprob
from kvbelt.engine.sampling import Sampled
from kvbelt.engine.text import Decoder, Detokenizer, Places, StopChecker


class Answer:
    """Grows by one token at a time, up to ``max_tokens``, which take the model's context into account."""

    def __init__(
        self, request: GenerationRequest, decoder: Decoder, eos_token_ids: tuple[int, ...], max_tokens: int
    ) -> None:
        params = request.sampling
        self._request_id = request.request_id
        self._params = params
        self._prompt = request.prompt_token_ids
        self._decoder = decoder
        self._eos = frozenset(() if params.ignore_eos else eos_token_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._max_tokens = max_tokens
        self._count = 0
        self._text = Detokenizer(decoder, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
        self._places = None if params.logprobs is None else Places(decoder, request.prompt_token_ids)
        self._stops = StopChecker(params.stop, include=params.include_stop_str_in_output)
        #: Tokens that end it; the sampler excludes them until min_tokens.
        self.end_token_ids = tuple(self._eos | self._stop_ids)

    def push(self, sampled: Sampled) -> Output:
        """Add a sampled token. Returns what it adds to the answer."""
        token = sampled.token_id
        assert token is not None, "a row of NaN has no token"
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
        logprobs = self._logprobs(sampled, token, hidden=hidden)
        return Output(self._request_id, (token,), text, logprobs, reason, stop_reason)

    def of_prompt(self, reports: Sequence[Sampled]) -> tuple[TokenLogprob, ...]:
        """The prompt's tokens, whose text leaves special ones out; nothing is before the first."""
        places = Places(self._decoder, ())
        entries = []
        for token_id, report in zip(self._prompt, (Sampled(None), *reports), strict=True):
            token = self._decoder.token(token_id)
            data = None if token.special else token.data
            top = tuple(self._alternative(*one) for one in report.top)
            entries.append(TokenLogprob(token_id, token.text, data, places.push(data or b""), report.logprob, top))
        return tuple(entries)

    def _logprobs(self, sampled: Sampled, token_id: int, *, hidden: bool) -> tuple[TokenLogprob, ...]:
        if sampled.logprob is None:
            return ()
        assert self._places is not None
        token = self._decoder.token(token_id)
        data = None if hidden or (token.special and self._params.skip_special_tokens) else token.data
        offset = self._places.push(data or b"")
        if data is not None and self._count == 1:
            data = self._places.carried + data
        top = tuple(self._alternative(*one) for one in sampled.top)
        return (TokenLogprob(token_id, token.text, data, offset, sampled.logprob, top),)

    def _alternative(self, token_id: int, logprob: float) -> TopLogprob:
        token = self._decoder.token(token_id)
        return TopLogprob(token_id, token.text, token.data, logprob)
