"""From token ids to text, one piece at a time.

A character may take several tokens, and some tokenizers spell a token differently at the start of a text. So the text
of new tokens is the *difference* of two decodings that share their beginning::

    start ........ read ........ end
    |-- context ---|-- pending --|      new text = decode(start..end) - decode(start..read)

Rules:

1. Text that was given out never changes. Text that can still change is held back: an incomplete character (it decodes
   to U+FFFD at the end), and text that may become a stop string.
2. The pieces do not depend on how many tokens come at a time; joined, they are the whole text.
3. The prompt's last tokens are the first context, so that a prompt of token ids is continued exactly. A character that
   the prompt leaves incomplete belongs to the token that completes it.
"""

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: A replacement character that is the model's own text, as tokenizers spell its three bytes EF BF BD.
_LITERAL = ("\u00ef\u00bf\u00bd", "<0xEF><0xBF><0xBD>", _REPLACEMENT)
#: Prompt tokens that the first decoding starts with: enough to be past a tokenizer's treatment of the text's start.
_CONTEXT_TOKENS = 6
#: A character has at most four bytes, so at most three tokens of the prompt can be the start of one.
_MAX_INCOMPLETE_TOKENS = 3


def _byte_level() -> dict[str, int]:
    """Byte-level tokenizers spell printable Latin-1 as itself, and the other bytes, in order, from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>\Z")
_META_SPACE = "\u2581"  #: a space, as SentencePiece spells it


@dataclass(frozen=True, slots=True)
class Token:
    id: int
    text: str  #: or, as with OpenAI, "bytes:" and the bytes in hexadecimal, if they are no text
    data: bytes
    special: bool


class Decoder:
    """Decodes the token ids of one tokenizer. Shared by all requests, without state of any."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # The Rust tokenizer behind it, if there is one, has a tenth of the overhead of a call.
        self._fast: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._tokens: dict[int, Token] = {}
        added = tokenizer.added_tokens_decoder
        self._added = frozenset(added)
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        #: How the tokenizer spells bytes, as its own JSON.
        decoder = getattr(self._fast, "decoder", None)
        self._spelling = "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()), ensure_ascii=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of these tokens, without any clean-up of spaces."""
        if self._fast is not None:
            text: str = self._fast.decode(token_ids, skip_special_tokens=skip_special_tokens)
        else:
            text = self._tokenizer.decode(
                token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        return text

    def incomplete(self, text: str, token_ids: Sequence[int]) -> bool:
        """Whether the text of these tokens ends inside a character."""
        if not text.endswith(_REPLACEMENT):
            return False
        tokens = self._tokenizer.convert_ids_to_tokens(list(token_ids[-len(_REPLACEMENT.encode()) :]))
        # Models are often padded to more ids than the tokenizer has; those have no token.
        raw = "".join(token or "" for token in tokens)
        return not raw.endswith(_LITERAL)

    def token(self, token_id: int) -> Token:
        """One token alone, special or not, for logprobs."""
        token = self._tokens.get(token_id)
        if token is None:
            token = self._tokens[token_id] = self._token(token_id)
        return token

    def _token(self, token_id: int) -> Token:
        data = self._bytes(token_id)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return Token(token_id, text, data, token_id in self._special)

    def _bytes(self, token_id: int) -> bytes:
        raw: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if raw is None:
            return b""
        if token_id in self._added:
            return raw.encode()
        if "ByteLevel" in self._spelling and all(character in _BYTE_LEVEL for character in raw):
            return bytes(_BYTE_LEVEL[character] for character in raw)
        if "ByteFallback" in self._spelling and (byte := _BYTE_FALLBACK.match(raw)):
            return bytes.fromhex(byte[1])
        if _META_SPACE in self._spelling:
            return raw.replace(_META_SPACE, " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()


class Detokenizer:
    def __init__(self, decoder: Decoder, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._ids = list(prompt_token_ids[-_CONTEXT_TOKENS - _MAX_INCOMPLETE_TOKENS :])
        self._read = len(self._ids)
        for back in range(min(_MAX_INCOMPLETE_TOKENS, len(self._ids)) + 1):
            end = len(self._ids) - back
            if not self._decoder.incomplete(self._decode(end), self._ids[:end]):
                self._read = end
                break
        else:
            # There is no clean cut. A stray character given out twice is better than text that changes afterwards.
            self._read = max(0, len(self._ids) - _MAX_INCOMPLETE_TOKENS)
        self._read_text = self._decode(self._read)

    def push(self, token_id: int) -> str:
        """Add a token. Returns the text that cannot change any more."""
        self._ids.append(token_id)
        text = self._decode(len(self._ids))
        if not text.startswith(self._read_text) or self._decoder.incomplete(text, self._ids):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """The pending text, complete or not, after the last token."""
        if self._read == len(self._ids):
            return ""
        text = self._decode(len(self._ids))
        self._read_text = text[: len(self._read_text)]
        return self._advance(text)

    def _advance(self, text: str) -> str:
        new = text[len(self._read_text) :]
        if not new:
            # No text (a special token that is skipped): keep the context.
            self._read = len(self._ids)
            return ""
        # The pending tokens become the context, and the old context is not needed any more.
        del self._ids[: self._read]
        self._read = len(self._ids)
        self._read_text = self._decode(self._read)
        return new

    def _decode(self, end: int) -> str:
        return self._decoder.decode(self._ids[:end], skip_special_tokens=self._skip)


class Places:
    """Where in an answer's text each of its tokens begins. A token within a character begins where the character does.

    Attributes:
        carried: bytes of a character that the prompt leaves incomplete. They belong to the answer (rule 3).
    """

    def __init__(self, decoder: Decoder, prompt_token_ids: Sequence[int]) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in prompt_token_ids[-_MAX_INCOMPLETE_TOKENS:]:
            self._utf8.decode(decoder.token(token_id).data)
        self.carried: bytes = self._utf8.getstate()[0]
        self._at = 0

    def push(self, data: bytes) -> int:
        at = self._at
        self._at += len(self._utf8.decode(data))
        return at


class StopChecker:
    """Finds the first stop string in a growing text, and holds back text that may become one."""

    def __init__(self, stop: Sequence[str], *, include: bool) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._held = ""
        #: Characters at the start of ``_held`` that cannot end a match, because they came before min_tokens.
        self._exempt = 0
        #: The string that was found.
        self.found: str | None = None

    def push(self, text: str, *, checking: bool = True) -> str:
        """Add text. Returns the text that can be given out; nothing once ``found`` is set.

        Not ``checking`` (before ``min_tokens``): a stop string that ends in this text does not count.
        """
        if not self._stop:
            return text
        if self.found is not None:
            return ""
        self._held += text
        if not checking:
            self._exempt = len(self._held)
        match = self._first_match()
        if match is not None:
            start, end, self.found = match
            given, self._held = self._held[: end if self._include else start], ""
            return given
        keep = self._possible_start()
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._exempt = max(0, self._exempt - len(given))
        return given

    def flush(self) -> str:
        """The text that was held back, after the last token."""
        given, self._held = self._held, ""
        return given

    def _first_match(self) -> tuple[int, int, str] | None:
        """The match that ends first, as if characters came one by one; the longest, if several end together."""
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = self._held.find(stop, max(0, self._exempt - len(stop) + 1))
            if start < 0:
                continue
            found = (start, start + len(stop), stop)
            if best is None or (found[1], found[0]) < (best[1], best[0]):
                best = found
        return best

    def _possible_start(self) -> int:
        """Length of the longest suffix of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop):
                return length
        return 0
