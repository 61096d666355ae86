"""A world in which the belt's real drivers live, and in which everything else is decided by a schedule.

Real are ``Dispatch``, ``Peers``, ``SenderSession`` and ``Pump`` of every prefill worker, ``Reception``, ``Desk`` and
``Checks`` of every decode worker, and the codecs between. Made up are the network (``lines``), memory, copies and
writes (``memory``), the processes' lives and clocks (``lives``), engines, readers and time (``world``). ``walk``
chooses at random what happens next; ``invariants`` says what must hold after each event.
"""
