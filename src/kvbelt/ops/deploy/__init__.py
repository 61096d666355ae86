"""``kvbelt deploy``: manifests for other machines."""
