"""Bytes made from other bytes, by a seeded chance."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

CORPUS = Path(__file__).parent / "corpus"

#: What parsers stumble over: put in anywhere.
NASTY = (
    b"[" * 20000, b'{"a":' * 5000, b"9" * 5000, b"-1", b"1e400", b"NaN", b"null", b"{}", b"[]", b'""', b"\x00", b"\xff",
    b"\xc3\x28", b"\xed\xa0\x80", b'"\\ud800"', b"\r\n", b"\n\n", b"\r\n\r\n", b"\n", b"\r", b":", b",", b"0\r\n\r\n",
    b"transfer-encoding: chunked\r\n", b"content-length: 3\r\n", b"upgrade: h2c\r\nconnection: upgrade\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n", b"\x91" * 3000, b"\xcf" + b"\xff" * 8, b"data: ", b"[DONE]", b"- ",
)  # fmt: skip


def seeds(target: str) -> list[bytes]:
    """A target's files of the corpus, in the order of their names."""
    return [path.read_bytes() for path in files(target)]


def files(target: str) -> list[Path]:
    """A target's files of the corpus."""
    return sorted(path for path in (CORPUS / target).glob("*") if path.is_file())


def mutated(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """One change: a bit, a cut, an insertion, a repetition, or the end of another one."""
    at = chance.randrange(len(data) + 1)
    to = min(len(data), at + chance.choice((1, 2, 4, 16, 64)))
    head, middle, tail = data[:at], data[at:to], data[to:]
    match chance.randrange(7):
        case 0 if middle:
            middle = bytes([middle[0] ^ 1 << chance.randrange(8)]) + middle[1:]
        case 1:
            middle = b""
        case 2:
            middle = tail = b""
        case 3:
            middle = chance.choice(NASTY) + chance.choice((b"", middle))
        case 4:
            middle *= chance.choice((2, 3, 100))
        case 5:
            other = chance.choice(others)
            middle, tail = b"", other[chance.randrange(len(other) + 1) :]
        case _:
            middle = chance.randbytes(chance.choice((1, 2, 8)))
    return head + middle + tail


def inputs(target: str, chance: Random) -> Iterator[bytes]:
    """Yield inputs without end: files of the corpus with up to five changes, and sometimes random bytes."""
    begin = seeds(target)
    while True:
        if chance.random() < 0.05:
            yield chance.randbytes(chance.randrange(100))
            continue
        data = chance.choice(begin)
        for _ in range(chance.randint(1, 5)):
            data = mutated(data, begin, chance)
        yield data[: 1 << 20]
