"""An open-loop load: requests come at their times, whether or not earlier ones were answered.

Every request is a task of the generator's group and ends at most two seconds after its deadline.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from kvbelt.ops.chaos.client import send_request
from kvbelt.ops.chaos.questions import ClientRequest, Question, RequestMix
from kvbelt.ops.chaos.verdict import Observation
from kvbelt.ops.http_client import Address

#: Limit of requests under way. Further ones are counted and not sent.
MOST_AT_ONCE = 96

OnObservation = Callable[[ClientRequest, Observation], Awaitable[None]]


class LoadGenerator:
    """``run`` sends until ``stop``, then waits for what is under way."""

    def __init__(
        self,
        proxy: Address,
        questions: Sequence[Question],
        rate: float,
        seed: int,
        *,
        mix: RequestMix,
        on_observation: OnObservation,
    ) -> None:
        self._proxy = proxy
        self._questions = questions
        self._long = [question for question in questions if question.long] or list(questions)
        self._rate = rate
        self._chance = random.Random(seed)
        self._mix = mix
        self._on_observation = on_observation
        self._group: asyncio.TaskGroup | None = None
        self._stopped = asyncio.Event()
        self._count = 0
        self._leaving = 0  # number of active faults that make clients disconnect
        self.under_way = 0
        self.not_sent = 0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        async with asyncio.TaskGroup() as self._group:
            while not self._stopped.is_set():
                due += self._chance.expovariate(self._rate)
                # After a delay, catch up on at most one second of requests.
                due = max(due, loop.time() - 1.0)
                if await self._sleep(due - loop.time()):
                    break
                self._send(self._chance.choice(self._questions))
        self._group = None

    def stop(self) -> None:
        self._stopped.set()

    async def burst(self, count: int) -> None:
        """Send ``count`` long prompts at once; returns when all have ended."""
        tasks = [self._send(self._chance.choice(self._long)) for _ in range(count)]
        if sent := [task for task in tasks if task is not None]:
            await asyncio.wait(sent)

    async def leaving(self, seconds: float) -> None:
        """Let half of the new clients disconnect, for ``seconds``."""
        self._leaving += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._leaving -= 1

    async def _sleep(self, seconds: float) -> bool:
        """Whether the load was stopped during the sleep."""
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._stopped.wait()
        except TimeoutError:
            return False
        return True

    def _send(self, question: Question) -> asyncio.Task[None] | None:
        if self._group is None or self._stopped.is_set():
            return None
        if self.under_way >= MOST_AT_ONCE:
            self.not_sent += 1
            return None
        self._count += 1
        request = self._mix.request(self._chance, question, f"chaos-{self._count}", leaving=self._leaving > 0)
        self.under_way += 1
        return self._group.create_task(self._one(request), name=request.request_id)

    async def _one(self, request: ClientRequest) -> None:
        try:
            seen = await send_request(self._proxy, request)
        finally:
            self.under_way -= 1
        await self._on_observation(request, seen)
