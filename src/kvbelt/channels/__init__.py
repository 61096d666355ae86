"""Moves bytes between registered memory of two processes: one file a vendor, each the sole importer of its own.

Every class here has the shape of ``transfer.ports.Channel`` and imports none of our rooms.
"""
