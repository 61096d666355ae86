"""The belt inside a vLLM server: the only package that imports vllm.

Rules:

1. ``connector`` translates vLLM's hooks and does nothing else. ``scheduler_side`` decides what to send and what to
   load, ``worker_side`` does it, and both know vLLM by plain values only.
2. The two sides run in two processes. Each step takes a ``StepCommands`` to the worker, and its output brings a
   ``StepReport`` back.
3. Whole blocks travel, never single tokens. The layout inside a block is the attention backend's.
4. vLLM does not get a block back while the belt may read it, and does not read a block while the belt may write it.

To load it: ``"kv_connector": "KVBeltConnector", "kv_connector_module_path": "kvbelt.vllm"``. Where kvbelt is installed,
the plugin (``plugin.py``) makes the module path unnecessary.
"""

from typing import Any

from kvbelt.vllm.versions import load_connector

__all__ = ["KVBeltConnector"]


def __getattr__(name: str) -> Any:
    if name == "KVBeltConnector":
        return load_connector()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
