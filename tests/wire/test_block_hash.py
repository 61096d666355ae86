"""Block hashes: equal for equal prefixes, and for nothing else."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbelt.wire.block_hash import HASH_BYTES, block_hashes

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_the_scheme_does_not_move() -> None:
    """Processes of different versions compare these bytes, so another scheme needs another name."""
    first, second = block_hashes(range(8), 4)
    assert first.hex() == "f3edf4a85182e178bd160734e9d3c692"
    assert second.hex() == "253b5e2d31cb25b08e49ec89af37e1aa"


@given(TOKENS, st.integers(1, 8))
def test_full_blocks_have_a_hash_each(tokens: list[int], block_size: int) -> None:
    """A partly filled block has none."""
    hashes = block_hashes(tokens, block_size)
    assert len(hashes) == len(tokens) // block_size
    assert all(len(one) == HASH_BYTES for one in hashes)


@given(TOKENS, TOKENS, st.integers(1, 8))
def test_hashes_are_equal_as_far_as_prefixes_are(one: list[int], other: list[int], block_size: int) -> None:
    """A hash stands for its block and all before it."""
    for index, (mine, theirs) in enumerate(
        zip(block_hashes(one, block_size), block_hashes(other, block_size), strict=False)
    ):
        end = (index + 1) * block_size
        assert (mine == theirs) == (one[:end] == other[:end])


@given(TOKENS)
def test_a_salt_shares_nothing(tokens: list[int]) -> None:
    assert not set(block_hashes(tokens, 4)) & set(block_hashes(tokens, 4, "tenant"))


def test_another_process_makes_the_same() -> None:
    """PYTHONHASHSEED has no effect."""
    code = "from kvbelt.wire.block_hash import block_hashes; print(block_hashes(range(16), 16)[0].hex())"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == block_hashes(range(16), 16)[0].hex()


@pytest.mark.parametrize(("tokens", "block_size"), [([-1], 1), ([2**32], 1), ([1], 0)])
def test_what_is_no_prompt_is_refused(tokens: list[int], block_size: int) -> None:
    """It is not hashed as another prompt."""
    with pytest.raises(ValueError, match=r"block of|token id"):
        block_hashes(tokens, block_size)
