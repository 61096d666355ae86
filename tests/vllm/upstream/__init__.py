"""vLLM's own tests, taken from its source distribution and asked of servers that run."""
