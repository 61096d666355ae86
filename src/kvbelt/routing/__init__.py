"""Which worker, and which road: pure choices. No I/O, no clock.

``endpoint`` says what is known of a worker, ``policy`` picks one (filters, then scorers, then a picker),
``decider`` chooses between disaggregation and one worker, ``exactness`` whether the first token may be the
prefill worker's.
"""
