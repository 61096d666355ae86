from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class _Done:
    """A copy that was complete when the call returned."""

    def done(self) -> bool:
        return True


DONE = _Done()


class Known(_Done):
    """A digest that was known when the call returned."""

    def __init__(self, value: int) -> None:
        self._value = value

    def value(self) -> int:
        return self._value


def checked(block_ids: Sequence[int], num_blocks: int) -> npt.NDArray[np.int64]:
    """The ids as an array.

    Raises:
        ValueError: an id is not in the pool; a copy would clip or wrap it.
    """
    ids = np.asarray(block_ids, dtype=np.int64)
    if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < num_blocks):
        raise ValueError(f"block ids {int(ids.min())} to {int(ids.max())} of a pool of {num_blocks} blocks")
    return ids
