"""The pure parts of ``kvbelt chaos``; the whole of it is in ``tests/e2e/test_chaos.py``."""
