"""A belt in a process of its own, built as a rank of a vLLM server builds it, and driven over a pipe.

Run as ``python -m tests.vllm.host_process KV_ROLE HOST``: reads one JSON object a line, answers with one.
"""

import json
import sys

import msgspec
import torch

from kvbelt.belt_setup import channel_for, make_belt
from kvbelt.security.keys import new_engine_id
from kvbelt.transfer.settings import BeltIdentity
from kvbelt.vllm.settings import load_settings
from kvbelt.wire.handoff import PrefillHandoff, ReceiverAddress
from kvbelt.wire.ids import TransferId
from tests.transfer.belts import LAYOUT

#: 2 MiB of KV.
BLOCKS = 256


def main() -> None:
    """Do what is asked until the pipe closes."""
    extra = {"pd_peer_host": sys.argv[2], "pd_insecure": True, "pd_verify": "off", "pd_buffer_size": 8 << 20}
    settings = load_settings(sys.argv[1], extra, "cpu", {})
    pool = torch.zeros((LAYOUT.num_layers, BLOCKS, LAYOUT.block_bytes), dtype=torch.uint8)
    engine_id = new_engine_id(settings.keys)
    channel = channel_for(settings, engine_id, pool.device)
    identity = BeltIdentity(engine_id, settings.role, "tiny", "f1", LAYOUT)
    belt = make_belt(settings, identity, channel, list(pool))
    belt.start()
    answer = msgspec.to_builtins(belt.receiver_address())
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            break
        order = json.loads(line)
        match order["do"]:
            case "send":
                address = msgspec.convert(order["address"], ReceiverAddress)
                handoff = PrefillHandoff(TransferId(order["id"]), address, 60.0)
                sending = belt.send(handoff, BLOCKS * LAYOUT.block_size, lambda: None, lambda outcome: None)
                for layer in range(LAYOUT.num_layers):
                    sending.blocks_written(layer, 0, list(range(BLOCKS)), None)
                sending.computed()
                answer = "sending"
            case "look":
                seen = belt.snapshot()
                answer = {"reserved": seen.bytes_reserved, "quarantined": seen.bytes_quarantined}
    belt.close()


if __name__ == "__main__":
    main()
