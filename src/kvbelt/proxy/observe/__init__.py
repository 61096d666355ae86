"""Records, metrics, logs and traces of requests."""
