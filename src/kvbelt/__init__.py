"""kvbelt: disaggregated prefill for LLM serving.

Prefill workers read prompts, decode workers write answers, a proxy joins them, and the KV cache
crosses from one to the other while it is still being computed. ``docs/architecture.md`` names the
rooms of this package in the order in which a request walks through them.
"""

__version__ = "0.2.0"
