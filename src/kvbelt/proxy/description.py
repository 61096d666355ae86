"""Who a vLLM server is. Its ``/health`` has no body, so it is asked by a request of one token.

The connector inside it answers in ``kv_transfer_params``. A server that answers without them has no connector: it is
used as it is, and computes its prompts itself.
"""

from typing import Literal

import msgspec

from kvbelt.wire.handoff import ReceiverAddress

PATH = "/v1/completions"
BODY = b'{"prompt":[0],"max_tokens":1,"temperature":0,"kv_transfer_params":{"kvbelt":"describe"}}'
MAX_BYTES = 64 * 1024


class Description(msgspec.Struct, frozen=True):
    """What a vLLM server says of itself. Of one life of it."""

    role: Literal["prefill", "decode", "both"] | None = None
    model: str = ""
    engine_id: str | None = None
    max_model_len: int | None = None
    receiver: ReceiverAddress | None = None


class _Answer(msgspec.Struct, frozen=True):
    kv_transfer_params: Description | None = None


_decoder = msgspec.json.Decoder(_Answer)


def description_of(status: int, body: bytes) -> Description | None:
    """What a server's answer says; None if it says nothing of use."""
    if status != 200:
        return None
    try:
        return _decoder.decode(body).kv_transfer_params or Description()
    except ValueError:
        return None
