"""One copier for each cut of blocks that a process sends or gets."""

from kvbelt.transfer.ports import PagedCopy
from kvbelt.transfer.shape import SlotShape
from kvbelt.wire.layout import KVLayout


class CutCopies:
    def __init__(self, copy: PagedCopy, layout: KVLayout) -> None:
        self._layout = layout
        self._whole = copy
        self._cuts: dict[tuple[range | None, int, range | None], PagedCopy] = {(None, 1, None): copy}

    def of(self, shape: SlotShape) -> PagedCopy:
        cut = shape.heads, shape.per_block, shape.layers
        if cut not in self._cuts:
            self._cuts[cut] = self._whole.cut(*cut, self._layout)
        return self._cuts[cut]
