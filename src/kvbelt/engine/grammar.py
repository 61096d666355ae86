"""Answers that follow a grammar, by llguidance: before each token, which ones may come next.

A grammar's state depends on the answer's tokens alone. So a request that is preempted keeps it, and a decode worker
that derives the first token from transferred KV starts it anew and gets the same answer.
"""

import threading
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from kvbelt.engine.api import InvalidRequestError

_NEVER = float("-inf")


class Matcher:
    """One answer's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> "Matcher":
        """For another answer; only before the first token."""
        return Matcher(self._matcher.deep_copy())

    @property
    def is_given_up(self) -> bool:
        """It costs too much to follow any further."""
        return bool(self._matcher.is_error())

    def restrict(self, logits: torch.Tensor) -> None:
        """Exclude tokens that may not come next, in place on one row. All, if the grammar costs too much to follow."""
        if self._matcher.is_error():
            logits.fill_(_NEVER)
        else:  # behind its end, only the end again: for min_tokens and ignore_eos
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
            excluded = torch.from_numpy(bits[: logits.shape[-1]] == 0).to(logits.device)
            logits[: excluded.shape[0]].masked_fill_(excluded, _NEVER)
            logits[excluded.shape[0] :] = _NEVER

    def accept(self, token_id: int) -> None:
        if not self._matcher.is_stopped() and not self._matcher.is_error():
            self._matcher.consume_token(token_id)


class Grammars:
    """Grammars over one model's tokens. Any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._hf = tokenizer
        self._vocab_size = max(vocab_size, len(tokenizer))
        self._eos = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Make the tokenizer, which takes a second of everybody's time: Python runs nothing else meanwhile.

        Nothing comes of a tokenizer that can follow no grammar; the requests that need one are told so.
        """
        with suppress(InvalidRequestError):
            self._made()

    def matcher(self, grammar: str, *, param: str) -> Matcher:
        """``grammar``: as llguidance writes it.

        Raises:
            InvalidRequestError: it is no grammar, or too large; it came in the field ``param``.
        """
        matcher = LLMatcher(self._made(), grammar, log_level=0)
        if error := matcher.get_error():
            raise InvalidRequestError(f"{param} cannot be followed: {error:.400}; simplify or correct it", param=param)
        return Matcher(matcher)

    def _made(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._make()
            return self._tokenizer

    def _make(self) -> LLTokenizer:
        try:
            return from_tokenizer(self._hf, n_vocab=self._vocab_size, eos_token=self._eos or None)
        except Exception as error:  # whatever it raises for tokenizers that it does not know
            raise InvalidRequestError(
                f"this model's tokenizer can follow no grammar: {error}", param="response_format"
            ) from error
