"""The load: requests that come when they come, whether or not the ones before have been answered.

Every request is a task of the load's own group and ends by itself two seconds after its deadline at the latest.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from kvbelt.ops.chaos.client import Address, ask
from kvbelt.ops.chaos.questions import Asking, Manners, Question
from kvbelt.ops.chaos.verdict import Seen

#: Requests under way at once, at most: what comes beyond that is not sent, and counted. (Clients have ends, too.)
MOST_AT_ONCE = 96

OnSeen = Callable[[Asking, Seen], Awaitable[None]]


class Load:
    """One source of requests. ``run`` it; ``stop`` lets it end once everything is answered."""

    def __init__(
        self,
        proxy: Address,
        questions: Sequence[Question],
        rate: float,
        seed: int,
        *,
        manners: Manners,
        on_seen: OnSeen,
    ) -> None:
        self._proxy = proxy
        self._questions = questions
        self._long = [question for question in questions if question.long] or list(questions)
        self._rate = rate
        self._chance = random.Random(seed)
        self._manners = manners
        self._on_seen = on_seen
        self._group: asyncio.TaskGroup | None = None
        self._stopped = asyncio.Event()
        self._count = 0
        self._leaving = 0  # faults that make clients leave, now
        self.under_way = 0
        self.not_sent = 0

    async def run(self) -> None:
        """Send until stopped, then wait for what is under way."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        async with asyncio.TaskGroup() as self._group:
            while not self._stopped.is_set():
                due += self._chance.expovariate(self._rate)
                # A loop that was late sends what is due, but does not save up for more than a second.
                due = max(due, loop.time() - 1.0)
                if await self._sleep(due - loop.time()):
                    break
                self._send(self._chance.choice(self._questions))
        self._group = None

    def stop(self) -> None:
        """Send nothing more."""
        self._stopped.set()

    async def burst(self, count: int) -> None:
        """So many long prompts at once; returns when all have ended."""
        tasks = [self._send(self._chance.choice(self._long)) for _ in range(count)]
        if sent := [task for task in tasks if task is not None]:
            await asyncio.wait(sent)

    async def leaving(self, seconds: float) -> None:
        """For so long, half of the clients that come hang up."""
        self._leaving += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._leaving -= 1

    async def _sleep(self, seconds: float) -> bool:
        """Whether the load was stopped meanwhile."""
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
        asking = self._manners.ask(self._chance, question, f"chaos-{self._count}", leaving=self._leaving > 0)
        self.under_way += 1
        return self._group.create_task(self._one(asking), name=asking.request_id)

    async def _one(self, asking: Asking) -> None:
        try:
            seen = await ask(self._proxy, asking)
        finally:
            self.under_way -= 1
        await self._on_seen(asking, seen)
