"""One end of a channel in a separate process, which can be stopped and killed.

Run as ``python -m tests.channels.peer_process KIND BYTES``: says its metadata (hex) and its memory's address, then
makes progress for its peers, and answers ``OFFSET BYTES`` with these bytes (hex).
"""

import os
import select
import sys

from tests.channels.carriers import End, maker


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until the pipe closes."""
    end = End(maker(sys.argv[1])(), int(sys.argv[2]))
    say(f"{end.channel.local_metadata().hex()} {end.at}")
    while True:
        if select.select([sys.stdin], [], [], 1e-3)[0]:
            line = sys.stdin.readline()
            if not line:
                os._exit(0)  # skip the vendors' atexit handlers
            offset, num_bytes = map(int, line.split())
            say(end.memory[offset : offset + num_bytes].numpy().tobytes().hex())
        end.channel.progress()


if __name__ == "__main__":
    main()
