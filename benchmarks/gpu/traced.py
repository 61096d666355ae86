"""KVBeltConnector with a trace: each hook's time and request, one JSON line each, into ``$KVBELT_TRACE``.

``$KVBELT_BESIDE`` has every prompt's KV loaded beside the running batch, also what is at hand when it is scheduled;
``$KVBELT_SWITCH_MS`` is how long a thread of the server may keep Python's interpreter from others (usually 5). Both are
for comparing.

Loaded by ``serving.py --trace`` through ``kv_connector_module_path``. Moments are ``time.monotonic()`` in milliseconds;
both halves of a connector write into one file, because with one GPU they live in one process.
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kvbelt.transfer.ports import Lost, ReceivedKV
from kvbelt.vllm import KVBeltConnector as _Plain
from kvbelt.vllm.step_messages import Load

if _switch := os.environ.get("KVBELT_SWITCH_MS"):
    sys.setswitchinterval(float(_switch) / 1000)

_FILE = Path(os.environ["KVBELT_TRACE"]).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115 -- of the process's life

_SCHEDULED: Counter[str] = Counter()


def note(what: str, request_id: str, **more: Any) -> None:
    """Write one line."""
    _FILE.write(json.dumps({"ms": time.monotonic() * 1000, "what": what, "request": request_id} | more) + "\n")


class KVBeltConnector(_Plain):  # type: ignore[misc] # vllm has no types here
    """The connector, with a trace."""

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Trace the loader, too."""
        super().register_kv_caches(kv_caches)
        assert self._rank is not None
        loading = self._rank.worker.loading
        plain_arrival, plain_fill = loading._on_arrival, loading._fill  # noqa: SLF001

        def on_arrival(request_id: str, incoming: Any, arrival: ReceivedKV | Lost) -> None:
            note("arrival", request_id, kind=type(arrival).__name__)
            plain_arrival(request_id, incoming, arrival)

        def fill(request_id: str, received: ReceivedKV, load: Load) -> str:
            note("fill", request_id)
            reason: str = plain_fill(request_id, received, load)
            note("filled", request_id, reason=reason)
            return reason

        loading._on_arrival = on_arrival  # noqa: SLF001
        loading._fill = fill  # noqa: SLF001

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """For comparison, load everything beside the running batch."""
        super().set_xfer_handshake_metadata(metadata)
        if "KVBELT_BESIDE" in os.environ:
            self._local = None

    def on_new_request(self, request: Any) -> None:
        note("new", request.request_id)
        super().on_new_request(request)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        note("allocated", request.request_id, tokens=num_external_tokens)
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        for request_id in scheduler_output.num_scheduled_tokens:
            # Each further token is no news, and noting it would take the time that is measured.
            _SCHEDULED[request_id] += 1
            if _SCHEDULED[request_id] <= 2:
                note("scheduled", request_id)
        return super().build_connector_meta(scheduler_output)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        commands = connector_metadata.commands
        for command in (*commands.claims, *commands.loads, *commands.sends):
            now = isinstance(command, Load) and command.now
            note("load now" if now else type(command).__name__.lower(), command.request_id)
        super().bind_connector_metadata(connector_metadata)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        sent, loaded = super().get_finished(finished_req_ids)
        for request_id in loaded or ():
            note("reported", request_id)
        return sent, loaded

    def update_connector_output(self, connector_output: Any) -> None:
        for request_id in connector_output.finished_recving or ():
            note("heard", request_id)
        super().update_connector_output(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        note("finished", request.request_id)
        outcome: tuple[bool, dict[str, Any] | None] = super().request_finished(request, block_ids)
        return outcome
