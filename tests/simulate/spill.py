"""The rule of the probe that was measured on 2026-11-30, on one prefill and one decode worker."""

from kvbelt.simulate.load import Request
from kvbelt.simulate.world import SimulatedWorker, World


class Spill:
    """A prompt is computed by the decode worker if it would wait too long for the prefill worker.

    Each worker's queue is estimated from its tokens and a fixed speed. The decode worker has at most two such prompts.
    """

    proxied = True
    itl: float | None = None

    def __init__(self, slack: float, decode_speed: float) -> None:
        self._slack = slack  #: seconds that a prompt may wait, its own computation included
        self._speed = (36_000.0, decode_speed)  #: tokens a second
        self._free_at = [0.0, 0.0]
        self._tokens = [0, 0]
        self._at: dict[Request, int] = {}

    def enter(self, world: World) -> None:
        self._world = world

    def leave(self, worker: SimulatedWorker) -> None:
        raise NotImplementedError

    def arrived(self, request: Request, now: float) -> None:
        ends = [
            min(max(0.0, self._free_at[i] - now), self._tokens[i] / self._speed[i]) + request.prompt / self._speed[i]
            for i in range(2)
        ]
        room = self._tokens[1] + request.prompt <= 15_000
        spills = ends[0] > self._slack and ends[1] < ends[0] and room
        chosen = int(spills)
        self._free_at[chosen] = now + ends[chosen]
        self._tokens[chosen] += request.prompt
        self._at[request] = chosen
        prefill, decode = self._world.workers
        self._world.send(request, decode if spills else prefill, decode, now)

    def first_token(self, request: Request, now: float) -> None:
        self._tokens[self._at[request]] -= request.prompt

    def ended(self, request: Request, now: float) -> None:
        pass
