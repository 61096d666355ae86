"""One end of a channel in a process of its own: something that can be stopped and killed.

Run as ``python -m tests.channels.peer_process KIND BYTES``: says its metadata (hex) and its memory's address, then
helps whoever writes, and answers ``OFFSET BYTES`` with what lies there (hex).
"""

import os
import select
import sys

from tests.channels.carriers import End, maker


def say(line: str) -> None:
    """One line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Until the pipe closes."""
    end = End(maker(sys.argv[1])(), int(sys.argv[2]))
    say(f"{end.channel.local_metadata().hex()} {end.at}")
    while True:
        if select.select([sys.stdin], [], [], 1e-3)[0]:
            line = sys.stdin.readline()
            if not line:
                os._exit(0)  # nobody waits for vendors' farewells
            offset, num_bytes = map(int, line.split())
            say(end.memory[offset : offset + num_bytes].numpy().tobytes().hex())
        end.channel.progress()


if __name__ == "__main__":
    main()
