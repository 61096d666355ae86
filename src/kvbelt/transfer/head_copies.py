"""One copier for each cut of heads that a process sends or gets."""

from kvbelt.transfer.ports import PagedCopy
from kvbelt.wire.layout import KVLayout


class HeadCopies:
    def __init__(self, copy: PagedCopy, layout: KVLayout) -> None:
        self._layout = layout
        self._copies: dict[range | None, PagedCopy] = {None: copy}

    def of(self, heads: range | None) -> PagedCopy:
        """None: whole blocks."""
        if heads not in self._copies:
            self._copies[heads] = self._copies[None].of_heads(heads, self._layout)  # type: ignore[arg-type]
        return self._copies[heads]
