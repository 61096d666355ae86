"""The embedded engine: continuous batching over a transformers model. Knows nothing of HTTP or transfers."""
