"""The embedded engine: continuous batching over a transformers model. Knows nothing of HTTP or transfers.

``api`` holds the types that cross the room's wall; ``engine.Engine`` and ``settings.EngineSettings`` are the door.
Inside, in the order in which a request meets them: ``validate``; ``scheduler``, which gives each ``sequence`` its
``blocks`` of the ``pool``, those of the ``prefix_cache`` first; ``loading``; ``model`` with ``attention``, and
``announce`` for KV that leaves; ``sampling``; ``answer`` with ``text``; ``holds``.
"""
