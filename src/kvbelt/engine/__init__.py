"""The embedded engine: continuous batching over a transformers model. Knows nothing of HTTP or transfers.

``api`` holds the types for other packages, with ``engine.Engine`` and ``settings.EngineSettings``. The other modules,
in the order in which a request meets them: ``validate``; ``scheduler``, which gives each ``sequence`` its ``blocks`` of
the ``pool``, those of the ``prefix_cache`` first; ``loading``; ``model`` with ``attention``, and ``outgoing`` for
KV that leaves; ``sampling``; ``answer`` with ``text``.
"""
