"""Digests of KV in a slot: what a sender says that it has written, and a receiver finds.

A cell is one block of one layer. Its digest is a sum of its words, each times a number of its own; the digest of a
slot, or of a part of one, is the sum of its cells' digests, each times a key of its own. Everything is modulo 2**64,
so the order in which cells are looked at does not matter, and a piece of a prompt can be added while it is at hand.

* A single wrong word is always found: the numbers are odd, so no difference is multiplied away. Any other error is
  missed with a chance of about 2**-32 or less.
* Cells that are whole but in the wrong place, or of another transfer, are found: keys follow from the transfer's id
  and the cell's place in the prompt.
* It finds accidents. It does not withstand somebody who wants to deceive: that is what keys are for.

``sample`` looks at one cell in 64, another choice for every transfer, and always at the last block of every layer,
which is written last; both sides make the same choice.

Source of the method: multilinear hashing (Carter and Wegman, "Universal classes of hash functions", 1979; speed on
today's machines: Lemire and Kaser, "Strongly universal string hashing is fast", 2014).
"""

from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from kvbelt.wire.ids import TransferId

Words = npt.NDArray[np.uint64]

#: What is looked at before KV becomes visible: nothing, a sample of its cells, all of them.
Verify = Literal["off", "sample", "always"]

#: One cell in so many is looked at by ``sample``.
SAMPLE: Final = 64

WORD_BYTES: Final = 8

_ODD = np.uint64(1)


class Cells(NamedTuple):
    """Some of the blocks that lie side by side in a staging buffer."""

    rows: npt.NDArray[np.int64]  #: which of them, counted in blocks from the first; ascending
    keys: Words  #: of each

    def __len__(self) -> int:
        """How many."""
        return len(self.rows)


def weights(num_words: int) -> Words:
    """The numbers that a cell's words are multiplied by: odd, and the same for every cell."""
    return _mixed(np.arange(num_words, dtype=np.uint64)) | _ODD


class Choice:
    """Which cells of one transfer are looked at, and their keys.

    Args:
        transfer_id: of the transfer.
        num_blocks: of the prompt, those that do not travel included.
        verify: ``"sample"`` or ``"always"``.
    """

    def __init__(self, transfer_id: TransferId, num_blocks: int, verify: Verify) -> None:
        self._seed = np.uint64(xxhash.xxh3_64_intdigest(transfer_id.encode()))
        self._num_blocks = num_blocks
        self._all = verify == "always"

    def of_run(self, layer: int, first: int, num_blocks: int, row: int = 0) -> Cells:
        """Of the prompt's blocks ``first .. first + num_blocks`` in one layer, the first of which lies at ``row``."""
        place = np.arange(num_blocks, dtype=np.uint64) + np.uint64(layer * self._num_blocks + first)
        return self._chosen(place, row)

    def of_layers(self, num_layers: int, first: int, num_blocks: int) -> Cells:
        """Of these blocks in every layer, layer after layer, the first of which lies at row 0."""
        layers = np.arange(num_layers, dtype=np.uint64) * np.uint64(self._num_blocks)
        place = np.add.outer(layers, np.arange(first, first + num_blocks, dtype=np.uint64))
        return self._chosen(place.astype(np.uint64).ravel(), 0)

    def _chosen(self, place: Words, row: int) -> Cells:
        mixed = _mixed(place ^ self._seed)
        if self._all:
            return Cells(np.arange(row, row + len(place), dtype=np.int64), mixed | _ODD)
        last = place % np.uint64(self._num_blocks) == np.uint64(self._num_blocks - 1)
        rows = np.flatnonzero(((mixed >> np.uint64(32)) % np.uint64(SAMPLE) == 0) | last)
        return Cells(rows + row, mixed[rows] | _ODD)


def joined(cells: list[Cells]) -> Cells:
    """Of several runs that lie side by side."""
    if len(cells) == 1:
        return cells[0]
    return Cells(np.concatenate([each.rows for each in cells]), np.concatenate([each.keys for each in cells]))


def plus(one: int, other: int) -> int:
    """The digest of two pieces together."""
    return (one + other) & 0xFFFF_FFFF_FFFF_FFFF


def _mixed(numbers: Words) -> Words:
    """Numbers that look random, one for one (the finaliser of SplitMix64: Steele, Lea and Flood, 2014)."""
    mixed = (numbers + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)
