"""A world in which the belt's real drivers live, and a schedule decides everything else.

Real are the drivers, sessions, write pipeline, slots, checks and codecs of every worker. Made up are the network and
the kernels (``lines``), memory, copies and writes (``memory``), the processes and their clocks (``lives``), engines,
consumers and time (``world``). ``walk`` chooses at random what happens next; ``invariants`` says what must hold after
each event.
"""
