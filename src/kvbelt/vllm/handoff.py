"""``kv_transfer_params`` of one request, parsed once. vLLM hands them through unread, so this is the wall."""

import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from kvbelt.wire.handoff import Describe, Handoff, Warm, handoff_of, prompt_transfer_id

#: vLLM names the prompts of one completions request ``cmpl-<id>-<index>``, adds 8 random digits, and puts
#: ``<choice>_`` in front where n > 1.
_COMPLETION_ID = re.compile(r"^(?:\d+_)?cmpl-.*-(\d+)-[0-9a-f]{8}$")


class BadHandoff(msgspec.Struct, frozen=True):
    """The parameters are no message of this protocol. The request's answer says so, and its prompt is computed here."""

    detail: str
    state: Literal["failed"] = "failed"
    reason: Literal["bad_handoff"] = "bad_handoff"


def parse(params: Mapping[str, Any], request_id: str) -> Handoff | Describe | Warm | BadHandoff:
    """What a request's parameters mean. Never raises."""
    try:
        if "kvbelt" in params:
            return msgspec.convert(dict(params), Describe | Warm)
        handoff = handoff_of(params)
    except msgspec.ValidationError as error:
        return BadHandoff(f"kv_transfer_params: {error}")
    own = prompt_transfer_id(handoff.transfer_id, prompt_index(request_id))
    return msgspec.structs.replace(handoff, transfer_id=own)


def prompt_index(request_id: str) -> int:
    """Which of a request's prompts vLLM has made this request from."""
    found = _COMPLETION_ID.match(request_id)
    return int(found.group(1)) if found else 0
