"""Digests of KV in a slot: the sender sends the digest of what it wrote, and the receiver compares what landed.

A cell is one block of one layer. Its digest is the sum of its words, each times its weight. The digest of a slot, or of
a part of one, is the sum of its cells' digests, each times its key. Everything is modulo 2**64, so the order of the
cells does not matter, and a piece of a prompt can be added while it is in memory.

* A single wrong word is always found: weights and keys are odd, so no difference becomes 0. Any other error is missed
  with a probability of about 2**-32 or less.
* Cells in the wrong place, or of another transfer, are found: keys depend on the transfer's id and on the cell's place
  in the prompt.
* Digests find accidents. They do not protect against an attacker; CURVE keys do.

``sample`` covers one cell in 64, different ones for every transfer, and always the last block of every layer, which is
written last. Both sides choose the same cells.

Source of the method: multilinear hashing (Carter and Wegman, "Universal classes of hash functions", 1979; speed on
today's machines: Lemire and Kaser, "Strongly universal string hashing is fast", 2014).
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from kvbelt.wire.ids import TransferId
from kvbelt.wire.reservation import Verify

Words = npt.NDArray[np.uint64]

SAMPLE: Final = 64  #: ``sample`` covers one cell in so many

WORD_BYTES: Final = 8

_ODD = np.uint64(1)


class Cells(NamedTuple):
    """Some of the blocks side by side in a staging buffer."""

    rows: npt.NDArray[np.int64]  #: their places, in blocks from the first; ascending
    keys: Words  #: one each

    def __len__(self) -> int:
        return len(self.rows)


def weights(num_words: int) -> Words:
    """The weights of a cell's words: odd, and the same for every cell."""
    return _mixed(np.arange(num_words, dtype=np.uint64)) | _ODD


class Choice:
    """The cells of one transfer that a digest covers, and their keys.

    ``num_blocks`` counts those of the prompt that do not travel as well. ``verify`` is not ``"off"``.
    """

    def __init__(self, transfer_id: TransferId, num_blocks: int, verify: Verify) -> None:
        self._seed = np.uint64(xxhash.xxh3_64_intdigest(transfer_id.encode()))
        self._num_blocks = num_blocks
        self._all = verify == "always"

    def of_run(self, layer: int, first: int, num_blocks: int, row: int = 0) -> Cells:
        """Cells of the blocks ``first .. first + num_blocks`` in one layer, the first of which is at ``row``."""
        place = np.arange(num_blocks, dtype=np.uint64) + np.uint64(layer * self._num_blocks + first)
        return self._chosen(place, row)

    def of_layers(self, num_layers: int, first: int, num_blocks: int) -> Cells:
        """Cells of these blocks in every layer, layer after layer, from row 0 on."""
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
    """The cells of several runs side by side."""
    if len(cells) == 1:
        return cells[0]
    return Cells(np.concatenate([each.rows for each in cells]), np.concatenate([each.keys for each in cells]))


def plus(one: int, other: int) -> int:
    """The digest of two pieces together."""
    return (one + other) & 0xFFFF_FFFF_FFFF_FFFF


def _mixed(numbers: Words) -> Words:
    """A bijection to numbers that look random (the finaliser of SplitMix64: Steele, Lea and Flood, 2014)."""
    mixed = (numbers + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)
