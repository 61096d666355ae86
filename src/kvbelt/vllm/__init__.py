"""The belt inside a vLLM server: the only room that imports vllm.

Rules:

1. vLLM's hooks are translated, nothing else: what to send and what to load is decided in ``scheduler_side``,
   done in ``worker_side``, and both know vLLM only by plain values. ``connector`` alone speaks to vLLM.
2. The two sides run in two processes. Between them go ``orders`` (with every step, to the worker) and ``news``
   (back with every step's output).
3. Whole blocks travel, never single tokens: what lies inside a block is the attention backend's business.
4. A block that the belt may still read is not given back to vLLM, and a block that the belt may still write is
   not read by vLLM.

Load it with ``"kv_connector": "KVBeltConnector", "kv_connector_module_path": "kvbelt.vllm"``; where kvbelt is
installed, the plugin (``plugin.py``) makes the module path unnecessary.
"""

from typing import Any

__all__ = ["KVBeltConnector"]


def __getattr__(name: str) -> Any:
    """Import vllm only when the connector is asked for."""
    if name == "KVBeltConnector":
        from kvbelt.vllm.connector import KVBeltConnector  # noqa: PLC0415 -- vllm takes seconds, and may not be there

        return KVBeltConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
