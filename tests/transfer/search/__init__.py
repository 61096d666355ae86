"""Every state that small belts can reach: breadth first, over all interleavings.

``explore`` searches, ``snapshots`` copies states and tells equal ones. ``state`` and ``protocol`` are the model of both
machines and the network between them, ``healing`` says what a state of it ends in, ``staging`` is the model of the
sending side's pump and its staging memory. ``runs`` lists the searches.
"""
