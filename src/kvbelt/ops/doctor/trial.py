"""Sends a short prompt through a pair of workers, so that there is a transfer to observe."""

import asyncio
import random
import time
import uuid
from typing import Any

from kvbelt.ops.doctor.evidence import TrialResult
from kvbelt.ops.http_client import Client, NoAnswerError
from kvbelt.wire.handoff import ReceiverAddress

#: Prompt length: some MB of KV with most models.
TOKENS = 64

#: Token ids that every vocabulary has.
_IDS = range(3, 90)

SECONDS = 6.0

_ROUTE = "/v1/completions"


class _TrialError(Exception):
    """The trial failed; the message says why."""


async def run_trial(
    prefill: Client, decode: Client, receiver: ReceiverAddress, seconds: float = SECONDS
) -> TrialResult:
    """Transfer one prompt's KV and decode one token from it. Never raises."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            await _through(prefill, decode, receiver, seconds)
    except TimeoutError:
        return TrialResult(ok=False, detail=f"it took more than {seconds:g} s", seconds=time.monotonic() - began)
    except (_TrialError, NoAnswerError) as error:
        return TrialResult(ok=False, detail=str(error), seconds=time.monotonic() - began)
    return TrialResult(ok=True, detail="received", seconds=time.monotonic() - began)


async def _through(prefill: Client, decode: Client, receiver: ReceiverAddress, seconds: float) -> None:
    name = f"doctor-{uuid.uuid4().hex[:12]}"
    chance = random.Random()  # noqa: S311 -- a prompt that nobody has cached
    prompt = [chance.choice(_IDS) for _ in range(TOKENS)]
    common = {"max_tokens": 1, "temperature": 0, "ignore_eos": True, "cache_salt": name, "return_token_ids": True}
    handoff = {"transfer_id": name, "deadline_seconds": seconds}
    body = {**common, "prompt": prompt, "kv_transfer_params": {**handoff, "receiver": receiver}}
    reply = await prefill.post(_ROUTE, body, seconds)
    if reply.status != 200:
        raise _TrialError(f"the prefill worker answered {reply.status}: {_said(reply.json)}")
    state = reply.json.get("kv_transfer_params") or {}
    if state.get("state") == "failed":
        raise _TrialError(f"the transfer failed: {state.get('reason')}")
    try:
        token = reply.json["choices"][0]["token_ids"][0]
    except (KeyError, IndexError, TypeError):
        raise _TrialError("the prefill worker's answer is not a completion") from None
    reply = await decode.post(_ROUTE, {**common, "prompt": [*prompt, token], "kv_transfer_params": handoff}, seconds)
    if reply.status != 200:
        raise _TrialError(f"the decode worker answered {reply.status}: {_said(reply.json)}")
    fate = reply.headers.get(b"x-kvbelt-kv", b"").decode("latin-1") or _fate(reply.json)
    if fate != "received":
        raise _TrialError(f"the decode worker reports for the KV: {fate or 'nothing'}")


def _said(body: dict[str, Any]) -> str:
    error = body.get("error")
    return str(error.get("message", "")) if isinstance(error, dict) else ""


def _fate(body: dict[str, Any]) -> str:
    """The fate of the KV from a vLLM server's response body."""
    params = body.get("kv_transfer_params")
    if not isinstance(params, dict) or "kv" not in params:
        return ""
    reason = f"; reason={params['reason']}" if params.get("reason") else ""
    return f"{params['kv']}{reason}"
