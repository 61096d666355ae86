"""``kv_transfer_params`` of one request, parsed once.

vLLM hands them through unread, so this is the wall: what is not one of the messages below is a refusal, which
goes back in the answer, and the request is computed as if there were no transfer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff, ReceiverAddress, prompt_transfer_id

#: The key of a request to the server itself; its value is what is asked.
QUESTION_KEY = "kvbelt"

#: vLLM names the prompts of one completions request ``cmpl-<id>-<index>``, adds 8 random digits, and puts
#: ``<choice>_`` in front where n > 1.
_COMPLETION_ID = re.compile(r"^(?:\d+_)?cmpl-.*-(\d+)-[0-9a-f]{8}$")


@dataclass(frozen=True, slots=True)
class Describe:
    """The proxy asks who this server is."""


@dataclass(frozen=True, slots=True)
class BadHandoff:
    """Not a message of this protocol; ``detail`` says what is wrong with it."""

    detail: str


class Warm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The proxy says which decode servers there are, before the first request names one."""

    receivers: tuple[ReceiverAddress, ...]


Handoff = PrefillHandoff | DecodeHandoff | Describe | Warm | BadHandoff


def parse(params: Mapping[str, Any], request_id: str) -> Handoff:
    """What a request's parameters mean. Never raises."""
    question = params.get(QUESTION_KEY)
    if question == "describe":
        return Describe()
    if question == "warm":
        try:
            return msgspec.convert({key: params[key] for key in params if key != QUESTION_KEY}, Warm)
        except msgspec.ValidationError as error:
            return BadHandoff(f"kv_transfer_params: {error}")
    kind: type[PrefillHandoff | DecodeHandoff] = PrefillHandoff if "receiver" in params else DecodeHandoff
    try:
        handoff = msgspec.convert(dict(params), kind)
    except msgspec.ValidationError as error:
        return BadHandoff(f"kv_transfer_params: {error}")
    own = prompt_transfer_id(handoff.transfer_id, prompt_index(request_id))
    return msgspec.structs.replace(handoff, transfer_id=own)


def prompt_index(request_id: str) -> int:
    """Which of a request's prompts vLLM has made this request from."""
    found = _COMPLETION_ID.match(request_id)
    return int(found.group(1)) if found else 0
