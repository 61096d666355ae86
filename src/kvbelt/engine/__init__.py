"""The embedded engine: continuous batching over a transformers model. Knows nothing of HTTP or transfers.

``api`` holds the types that cross the room's wall; ``engine.Engine`` and ``settings.EngineSettings`` are the door.
Inside, in the order in which a request meets them: ``validate``, ``scheduler``, ``pool``, ``model`` with ``attention``,
``sampling``, ``answer`` with ``text``.
"""
