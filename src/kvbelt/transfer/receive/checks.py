"""Digests of what has landed here, compared with what the sender says. On the belt's thread; none is waited for."""

import logging
from typing import NamedTuple

from kvbelt.transfer.ports import Digest, PagedCopy
from kvbelt.transfer.receiver_commands import Check
from kvbelt.transfer.shape import Part, SlotShape
from kvbelt.wire.digest import Cells, Choice, Verify
from kvbelt.wire.ids import TransferId

log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """What came of a check."""

    transfer_id: TransferId
    part: int | None
    right: bool


def cells_of(transfer_id: TransferId, shape: SlotShape, part: Part, verify: Verify) -> Cells:
    """Which cells of a part are looked at; rows are counted from the part's own beginning."""
    choice = Choice(transfer_id, shape.num_blocks, verify)
    return choice.of_layers(shape.layout.num_layers, part.first, part.num_blocks)


class Checks:
    """All checks of one process that are under way."""

    def __init__(self, copy: PagedCopy, verify: Verify) -> None:
        self._copy = copy
        self._verify: Verify = verify
        self._open: list[tuple[Check, Digest]] = []

    @property
    def under_way(self) -> bool:
        """Whether a look soon is worth while."""
        return bool(self._open)

    def begin(self, check: Check) -> Verdict | None:
        """Look at a part, or at a whole slot. The verdict, where it is known at once."""
        part = check.shape.part(check.part or 0)
        cells = cells_of(check.transfer_id, check.shape, part, self._verify)
        if not len(cells):
            return Verdict(check.transfer_id, check.part, right=check.digest == 0)
        try:
            digest = self._copy.digest_received(check.slot.offset + part.offset, cells, check.slot.region)
            if digest.done():
                return self._verdict(check, digest)
        except Exception:
            about = {"transfer_id": check.transfer_id}
            log.exception("transfer %s cannot be checked, and counts as wrong", check.transfer_id, extra=about)
            return Verdict(check.transfer_id, check.part, right=False)
        self._open.append((check, digest))
        return None

    def ended(self) -> list[Verdict]:
        """Those whose verdict is known by now."""
        verdicts: list[Verdict] = []
        under_way: list[tuple[Check, Digest]] = []
        for check, digest in self._open:
            # Asked once: between two questions it may have ended.
            if digest.done():
                verdicts.append(self._verdict(check, digest))
            else:
                under_way.append((check, digest))
        self._open = under_way
        return verdicts

    @staticmethod
    def _verdict(check: Check, digest: Digest) -> Verdict:
        found = digest.value()
        if found != check.digest:
            what = "the slot" if check.part is None else f"part {check.part}"
            log.error(
                "transfer %s: the bytes of %s are not those that were sent (digest %#x, sent %#x)",
                check.transfer_id,
                what,
                found,
                check.digest,
                extra={"transfer_id": check.transfer_id},
            )
        return Verdict(check.transfer_id, check.part, found == check.digest)
