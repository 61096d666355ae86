"""How many tokens a prompt has, from its bytes. Pure.

Token ids are counted. For text, bytes per token are learnt from what workers report, apart for each model and for each
kind of text: English has about four, other scripts, code and images in base64 have others.
"""

#: Before the first answer to a prompt of its kind: those of English text, by the usual rule of thumb.
BYTES_PER_TOKEN = 4.0

#: Weight of the default among answers, in bytes of prompts: a few short prompts or a long one replace it.
_DEFAULT_BYTES = 256.0

#: What the answers until now weigh when another one comes.
_KEEP = 0.9

#: Models and kinds that are told apart. Clients name models, so there must be an end.
MOST_RATIOS = 512

#: Up to so many bytes ids are counted; of a longer list four pieces are, which is right within a few per cent.
_COUNTED = 2048
_PIECE = 256

#: Bytes of each of the two pieces by which the kind of a text is told.
_SAMPLE = 64

_ASCII = bytes(range(128))
_IDS = b"0123456789["


class BytesPerToken:
    """Of the latest prompts of one kind; long ones count more."""

    __slots__ = ("_bytes", "_tokens")

    def __init__(self) -> None:
        self._bytes = _DEFAULT_BYTES
        self._tokens = _DEFAULT_BYTES / BYTES_PER_TOKEN

    @property
    def value(self) -> float:
        return self._bytes / self._tokens

    def learn(self, num_bytes: int, tokens: int) -> None:
        self._bytes = _KEEP * self._bytes + num_bytes
        self._tokens = _KEEP * self._tokens + tokens


class PromptSize:
    """One prompt's length in tokens.

    Attributes:
        tokens: as far as it is known; at least 1.
    """

    __slots__ = ("_num_bytes", "_ratio", "tokens")

    def __init__(self, num_bytes: int, ratio: BytesPerToken | None, tokens: int) -> None:
        self._num_bytes = num_bytes
        self._ratio = ratio
        self.tokens = max(1, tokens)

    def learn(self, tokens: int) -> None:
        """A worker has counted them."""
        if tokens > 0:
            self.tokens = tokens
            if self._ratio is not None:
                self._ratio.learn(self._num_bytes, tokens)


class TokenCounts:
    """What is known of every model's tokenizer."""

    def __init__(self) -> None:
        self._ratios: dict[tuple[str, int], BytesPerToken] = {}

    def size_of(self, model: str, prompt: bytes | memoryview) -> PromptSize:
        """Of a prompt, or an array of messages, as JSON."""
        size, begin = len(prompt), bytes(prompt[:2])
        if begin[:1] == b"[" and begin[1:] in _IDS:
            return PromptSize(size, None, _ids_in(prompt))
        key = (model, kind_of(prompt))
        ratio = self._ratios.get(key)
        if ratio is None:
            if len(self._ratios) >= MOST_RATIOS:
                del self._ratios[next(iter(self._ratios))]
            ratio = self._ratios[key] = BytesPerToken()
        return PromptSize(size, ratio, int(size / ratio.value))


def kind_of(prompt: bytes | memoryview) -> int:
    """Prompts of one kind have about as many bytes per token, as far as a sample tells."""
    size, half = len(prompt), len(prompt) // 2
    sample = bytes(prompt[half // 2 : half // 2 + _SAMPLE]) + bytes(prompt[half : half + _SAMPLE])
    # Chat templates add tokens to every message, which counts in short ones.
    kind = (bytes(prompt[:1]) == b"[") | (size < 1024) << 1
    kind |= (10 * sample.count(b" ") < len(sample)) << 2  # base64, numbers, scripts without spaces
    kind |= (12 * sample.count(b"\\") > len(sample)) << 3  # scripts as \\uXXXX
    if not sample.isascii():
        others = len(sample.translate(None, _ASCII))
        kind |= (1 + 3 * others // len(sample)) << 4
    return kind


def _ids_in(prompt: bytes | memoryview) -> int:
    size = len(prompt)
    if size <= _COUNTED:
        return bytes(prompt).count(b",") + 1
    starts = range(0, size - _PIECE, (size - _PIECE) // 4 + 1)
    commas = sum(bytes(prompt[start : start + _PIECE]).count(b",") for start in starts)
    return round(size * commas / (4 * _PIECE))
