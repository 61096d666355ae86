"""Simulates a deployment under a virtual clock: the proxy's placement, models of workers, seeded loads.

Requests arrive (``load``), a policy places them (``policies``), engines compute (``engine``), and ``world`` is the
clock. Nothing here waits, and the same seed gives the same figures.
"""
