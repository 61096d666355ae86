"""The belt's buffers: taken and registered when the first peer connects. A worker without peers holds none."""

from kvbelt.transfer.ports import Buffer, Channel, Region


class RegisteredBuffer:
    """A buffer that its channel can reach from ``take`` on. On the belt's thread."""

    def __init__(self, buffer: Buffer, channel: Channel) -> None:
        self.num_bytes = buffer.num_bytes
        self.device = buffer.device
        self._buffer = buffer
        self._channel = channel
        self._region: Region | None = None

    def take(self) -> Region:
        """The same region each time.

        Raises:
            ChannelError: the device has not that much memory, or the channel cannot move it.
        """
        if self._region is None:
            region = self._buffer.take()
            self._channel.register(region)
            self._region = region
        return self._region
