"""What a state of the model of both machines ends in when the world is well from now on."""

from tests.transfer.search.protocol import Belts
from tests.transfer.search.state import BEAT

#: Beats in which everything must be over: the deadline, leases, end messages.
_ROUNDS = 400

#: What a well world does by itself.
_BY_ITSELF = frozenset({"begin", "post", "land", "read", "release", "check", "sender forgets", "claim"})


def heal(state: Belts) -> None:
    """All that is under way is lost, stopped workers wake up, and from then on nothing bad happens any more.

    Raises:
        AssertionError: something is left over for ever.
    """
    world = state.copy()
    world.to_incoming.clear()
    world.to_sides.clear()
    for number, side in enumerate(world.sides):
        if side.life == "stopped":
            world.do(("wake", number))
    for _ in range(_ROUNDS):
        _without_time(world)
        if world.all_over():
            return
        world.now += BEAT
        world.tick()
    states = [side.session.state for side in world.sides if side.session is not None]
    raise AssertionError(f"left over: {dict(world.incoming.states())} and {states}")


def _without_time(world: Belts) -> None:
    """Do all that needs no time. Each message arrives once."""
    while True:
        for message in sorted(world.to_incoming, key=repr):
            world.to_incoming.discard(message)
            world.do(("incoming hears", message))
        for number, message in sorted(world.to_sides, key=repr):
            world.to_sides.discard((number, message))
            if world.sides[number].life == "running":
                world.do(("sender hears", number, message))
        action = next((action for action in world.actions() if action[0] in _BY_ITSELF), None)
        if action is not None:
            world.do(action)
        elif not world.to_incoming and not world.to_sides:
            return
