"""Compares digests of received KV with the sender's. On the belt's thread, without waiting."""

import logging

from kvbelt.transfer.cut_copies import CutCopies
from kvbelt.transfer.ports import Digest
from kvbelt.transfer.receive.commands import Check
from kvbelt.transfer.receive.states import Verified
from kvbelt.transfer.shape import Part, SlotShape
from kvbelt.wire.digest import Cells, Choice
from kvbelt.wire.ids import TransferId
from kvbelt.wire.reservation import Verify

log = logging.getLogger(__name__)


def cells_of(transfer_id: TransferId, shape: SlotShape, part: Part, verify: Verify) -> Cells:
    """The cells of a part that are compared; rows count from the part's first."""
    choice = Choice(transfer_id, shape.num_blocks, verify)
    return choice.of_layers(shape.layout.num_layers, part.first, part.num_blocks)


class Checks:
    def __init__(self, copies: CutCopies, verify: Verify) -> None:
        self._copies = copies
        self._verify: Verify = verify
        self._open: list[tuple[Check, Digest]] = []

    @property
    def under_way(self) -> bool:
        return bool(self._open)

    def begin(self, check: Check) -> Verified | None:
        """Begin to check a part or a whole slot. Returns the verdict if it is known at once."""
        part = check.shape.part(check.part or 0)
        cells = cells_of(check.transfer_id, check.shape, part, self._verify)
        if not len(cells):
            return Verified(check.part, right=check.digest == 0)
        try:
            copy = self._copies.of(check.shape)
            digest = copy.digest_received(check.slot.offset + part.offset, cells, check.slot.region)
            if digest.done():
                return self._verdict(check, digest)
        except Exception:
            about = {"transfer_id": check.transfer_id}
            log.exception("transfer %s cannot be checked, and counts as wrong", check.transfer_id, extra=about)
            return Verified(check.part, right=False)
        self._open.append((check, digest))
        return None

    def ended(self) -> list[tuple[TransferId, Verified]]:
        verdicts: list[tuple[TransferId, Verified]] = []
        under_way: list[tuple[Check, Digest]] = []
        for check, digest in self._open:
            # Asked only once, because the answer may change between two calls.
            if digest.done():
                verdicts.append((check.transfer_id, self._verdict(check, digest)))
            else:
                under_way.append((check, digest))
        self._open = under_way
        return verdicts

    @staticmethod
    def _verdict(check: Check, digest: Digest) -> Verified:
        found = digest.value()
        if found != check.digest:
            what = "the slot" if check.part is None else f"part {check.part}"
            message = "transfer %s: the bytes of %s are not those that were sent (digest %#x, sent %#x)"
            about = {"transfer_id": check.transfer_id}
            log.error(message, check.transfer_id, what, found, check.digest, extra=about)
        return Verified(check.part, found == check.digest)
