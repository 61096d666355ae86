"""The belt: moves the KV of one prompt from a prefill worker's blocks to a decode worker's.

Pure state machines (sessions) decide; one driver thread performs. See ``docs/architecture.md``.
"""
