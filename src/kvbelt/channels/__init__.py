"""Moves bytes between the registered memory of two processes. Each vendor has one file, which alone imports it.

The channels implement ``transfer.ports.Channel`` and import no other room.
"""
