"""One outgoing transfer, as a prefill engine sees it."""

from collections.abc import Callable, Sequence
from typing import Any

from kvbelt.transfer.send.driver import SenderDriver
from kvbelt.transfer.send.plan import Run
from kvbelt.transfer.send.session import SenderSession
from kvbelt.wire.layout import KVLayout


class Sending:
    """Passes on to the belt's thread. Calls come from one thread at a time."""

    def __init__(
        self,
        transfer: SenderSession,
        layout: KVLayout,
        batch_bytes: int,
        ask: Callable[..., object],
        sender: SenderDriver,
    ) -> None:
        self._transfer = transfer
        self._num_layers = layout.num_layers
        self._batch_blocks = -(-batch_bytes // layout.block_bytes)
        self._batch: list[Run] = []
        self._batched = 0  # blocks in _batch
        self._next = [0] * layout.num_layers  # the block that each layer expects next
        self._ask = ask
        self._sender = sender

    def blocks_written(self, layer: int, first: int, block_ids: Sequence[int], ready: Any) -> None:
        """These blocks of this layer are final. The caller keeps them until ``on_blocks_free``.

        Raises:
            ValueError: they are not the next blocks of that layer, or beyond the prompt: the caller's mistake.
        """
        if not 0 <= layer < self._num_layers:
            raise ValueError(f"layer {layer} of {self._num_layers}")
        expected, num_blocks = self._next[layer], self._transfer.engine_blocks
        if first != expected or first + len(block_ids) > num_blocks:
            raise ValueError(
                f"blocks {first} to {first + len(block_ids)} of layer {layer}; "
                f"expected from {expected} to {num_blocks} at most"
            )
        if not block_ids:
            return
        self._next[layer] += len(block_ids)
        self._batch.append(Run(layer, first, tuple(block_ids), ready))
        self._batched += len(block_ids)
        if self._batched >= self._batch_blocks:
            self._pass_on()

    def _pass_on(self) -> None:
        batch, self._batch, self._batched = self._batch, [], 0
        self._ask(self._sender.pipeline.hand_over, self._transfer, batch)

    def computed(self) -> None:
        """Every block of every layer has been handed over."""
        if self._batch:
            self._pass_on()
        self._ask(self._sender.pipeline.computed, self._transfer, self._sender.now())

    def cancel(self, reason: str) -> None:
        """The request is over without a complete prompt. Idempotent."""
        self._ask(self._sender.abort, self._transfer, reason)

    @property
    def failure(self) -> str | None:
        """The reason, if it has already failed."""
        return self._transfer.failure
