"""Block hashes: 16 bytes that identify a block of tokens and everything before it.

A block's hash is xxh3_128 over the hash of the block before it and its own token ids, each as four bytes, least
significant first. So equal hashes mean equal prefixes, on every machine and in every process; Python's own hashing has
no part in it. Among n blocks two different ones collide with a probability of about n²/2^129. xxh3 does not resist an
attacker who searches for collisions, so tenants that must not share blocks need a salt.

Source of the method: vLLM's prefix caching (a chain over full blocks); the function: https://xxhash.com, XXH3_128bits.
"""

import struct
from collections.abc import Sequence

import xxhash

HASH_SCHEME = "xxh3_128-chain-u32le"  #: in the handshake: two processes compare hashes only if they compute them alike
HASH_BYTES = 16  #: of one block hash

#: The most in one reservation (wire/codec.py). Later blocks of a longer prompt are sent even if they are shared.
MAX_SENT_HASHES = 3500

_TOKEN_BYTES = 4


def root(salt: str = "") -> bytes:
    """The parent of a first block's hash."""
    return xxhash.xxh3_128_digest(salt.encode())


def chained(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of the full block of these tokens that comes after the block with hash ``parent``, or after ``root``."""
    return xxhash.xxh3_128_digest(parent + struct.pack(f"<{len(token_ids)}I", *token_ids))


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str = "") -> tuple[bytes, ...]:
    """One hash for each full block of ``block_size`` tokens of a prompt; the rest at its end has none.

    Prompts with different salts share nothing (vLLM's ``cache_salt``).

    Raises:
        ValueError: a token id that does not fit four bytes, or a block size that is not positive.
    """
    if block_size <= 0:
        raise ValueError(f"a block of {block_size} tokens")
    num_tokens = len(token_ids) // block_size * block_size
    try:
        packed = memoryview(struct.pack(f"<{num_tokens}I", *token_ids[:num_tokens]))
    except struct.error as error:
        raise ValueError(f"a token id does not fit four bytes: {error}") from None
    parent = root(salt)
    hashes: list[bytes] = []
    size = block_size * _TOKEN_BYTES
    for start in range(0, len(packed), size):
        parent = xxhash.xxh3_128_digest(parent + packed[start : start + size])
        hashes.append(parent)
    return tuple(hashes)


def packed(hashes: Sequence[bytes]) -> bytes:
    """The first ``MAX_SENT_HASHES``, as a reservation carries them."""
    return b"".join(hashes[:MAX_SENT_HASHES])


def unpacked(prefix: bytes) -> tuple[bytes, ...]:
    """The inverse of ``packed``; an incomplete hash at the end is ignored."""
    end = len(prefix) // HASH_BYTES * HASH_BYTES
    return tuple(prefix[start : start + HASH_BYTES] for start in range(0, end, HASH_BYTES))
