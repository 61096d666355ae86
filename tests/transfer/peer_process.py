"""A prefill worker's belt in a process of its own, driven over a pipe: something that can be stopped and killed.

Run as ``python -m tests.transfer.peer_process ENGINE SEED CHANNEL``: reads one JSON object a line, answers with one.
"""

import json
import sys

from kvbelt.transfer.settings import BeltSettings
from kvbelt.wire.handoff import ReceiverAddress
from tests.channels.carriers import maker
from tests.transfer.belts import LAYOUT, Side, begin, hand_over


def say(answer: str) -> None:
    """One line."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Do what is asked until the pipe closes."""
    engine = sys.argv[1]
    settings = BeltSettings(lease_seconds=2.0, handshake_seconds=20.0, heartbeat_seconds=0.1, batch_bytes=1)
    with Side(engine, "prefill", maker(sys.argv[3])(), settings=settings) as side:
        side.fill(int(sys.argv[2]))
        sends = {}
        say("ready")
        for line in sys.stdin:
            order = json.loads(line)
            match order.pop("do"):
                case "send":
                    address = ReceiverAddress(**order["address"])
                    sends[order["id"]] = begin(side, address, order["id"], order["tokens"])
                    answer = "sending"
                case "some":
                    sends[order["id"]][0].blocks_written(0, 0, order["blocks"], None)
                    answer = "written"
                case "all":
                    hand_over(sends[order["id"]][0], LAYOUT, order["blocks"])
                    answer = "written"
                case "outcome":
                    answer = sends[order["id"]][1].outcome().reason
            say(answer)


if __name__ == "__main__":
    main()
