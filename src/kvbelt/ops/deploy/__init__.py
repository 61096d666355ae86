"""``kvbelt deploy``: manifests for somewhere else than this machine."""
