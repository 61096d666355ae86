"""Pure choices: which workers, when, and which response mode. No I/O, no clock.

``endpoint`` holds what is known about a worker. ``placement`` chooses workers by the work booked on them. ``decider``
says whether a request can be split, and ``exactness`` whether the client may have the prefill worker's first token.
"""
