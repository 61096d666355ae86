"""The next turn of a conversation goes to the worker that holds it, where that pays."""

import asyncio

import msgspec
import pytest

from kvbelt.pacing.costs import StepCosts
from kvbelt.routing.placement import Mode
from kvbelt.wire.steps import StepsNow
from tests.proxy.support import Deployment, async_test, eventually, generated

#: A token takes longer than a test.
SLOW = StepsNow(
    costs=StepCosts(0.1, 0.1, 0.1, 0.0, 0.0, 0.0, samples=9), prompt_tokens=0, decodes=0, kv_tokens=0,
    most_prompt_tokens=8192, most_requests=256,
)  # fmt: skip
SETTINGS = {"prefill": 0, "decode": 2, "placement": Mode.ELASTIC}


class Talk:
    """One conversation, and where its turns were answered."""

    def __init__(self, deployment, subject, *, size=2000, **fields):
        self.deployment, self.fields = deployment, {"max_tokens": 8} | fields
        self.messages = [{"role": "user", "content": subject * size}]
        self.prompt = subject * size

    async def turn(self, *, chat=False, **asked):
        """The number of the worker that got it."""
        body = self.fields | ({"messages": self.messages} if chat else {"prompt": self.prompt})
        got = await self.deployment.ask(body, chat=chat, **asked)
        assert got.status == 200
        self.prompt += got.text + " and more"
        said, asks = {"role": "assistant", "content": got.text}, {"role": "user", "content": "and more"}
        self.messages = [*self.messages, said, asks]
        (number,) = (i for i, one in enumerate(self.deployment.decode) if body in generated(one))
        return number


def slow(**steps):
    deployment = Deployment(**SETTINGS)
    for one in deployment.decode:
        one.more_health["steps"] = msgspec.to_builtins(SLOW) | steps
    return deployment


def held_of(deployment):
    """What workers hold of each request that asks for a place from now on: a list that grows."""
    placement, seen = deployment.proxy.context.dispatcher.placement, []
    arrive = placement.arrive

    def noted(demand, now):
        seen.append(dict(demand.held))
        return arrive(demand, now)

    placement.arrive = noted
    return seen


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@async_test
async def test_turns_stay_with_their_worker(chat, stream):
    async with Deployment(**SETTINGS) as deployment:
        talks = [Talk(deployment, subject, stream=stream) for subject in "ab"]
        first = await asyncio.gather(*(talk.turn(chat=chat, request_id=talk.prompt[:1]) for talk in talks))
        assert sorted(first) == [0, 1]
        for _ in range(3):
            assert [await talk.turn(chat=chat) for talk in talks] == first


@async_test
async def test_a_conversation_that_begins_short_stays_with_its_worker():
    """Where its answer lies, from its second turn on."""
    async with Deployment(**SETTINGS) as deployment:
        talks, seen = [Talk(deployment, subject, size=9) for subject in "abcdef"], held_of(deployment)
        first = await asyncio.gather(*(talk.turn(chat=True) for talk in talks))
        for _ in range(2):
            assert [await talk.turn(chat=True) for talk in talks] == first
        assert [len(held) for held in seen] == [0] * 6 + [1] * 12


@async_test
async def test_a_turn_goes_elsewhere_if_its_worker_is_busy():
    """For longer than the other one computes what it does not hold."""
    async with slow() as deployment:
        body = {"prompt": [5] * 1200, "max_tokens": 2}
        await deployment.ask(body, request_id="r1")
        (holder,) = (one for one in deployment.decode if generated(one))
        hold = holder.script.before_head = asyncio.Event()
        other = asyncio.create_task(deployment.ask({"prompt": [5] * 1200 + [6] * 2800, "max_tokens": 2}))
        await eventually(lambda: len(generated(holder)) == 2)
        for _ in range(2):
            assert (await deployment.ask(body)).status == 200
        assert len(generated(holder)) == 2
        hold.set()
        assert (await other).status == 200


@async_test
async def test_a_restarted_worker_holds_nothing():
    async with Deployment(**SETTINGS) as deployment:
        talk, seen = Talk(deployment, "a"), held_of(deployment)
        holder = deployment.decode[await talk.turn()]
        holder.engine_id = "another life"
        await deployment.worker(holder).check()
        await talk.turn()
        await talk.turn()
        assert [len(held) for held in seen] == [0, 0, 1]


@async_test
async def test_a_worker_that_says_that_it_had_nothing_is_believed():
    async with Deployment(**SETTINGS) as deployment:
        for one in deployment.decode:
            one.script.cached_tokens = 0
        talk, seen = Talk(deployment, "a"), held_of(deployment)
        for _ in range(3):
            await talk.turn()
        assert [len(held) for held in seen] == [0, 1, 0]


@pytest.mark.parametrize(("room", "host", "held"), [(100, 0, 0), (10_000, 0, 1), (100, 9900, 1)])
@async_test
async def test_a_worker_holds_no_more_than_it_has_room_for(room, host, held):
    """In the engine's memory and in host memory."""
    async with slow(most_kv_tokens=room, host_kv_tokens=host) as deployment:
        talk, seen = Talk(deployment, "a"), held_of(deployment)
        for _ in range(2):
            await talk.turn()
        assert [len(one) for one in seen] == [0, held]


@async_test
async def test_salts_keep_conversations_apart():
    async with Deployment(**SETTINGS) as deployment:
        seen = held_of(deployment)
        for salt in ("one", "two", "one"):
            await Talk(deployment, "a", cache_salt=salt).turn()
        assert [len(held) for held in seen] == [0, 0, 1]


@async_test
async def test_requests_that_wait_learn_where_their_beginning_is_held_meanwhile():
    """They arrived when no worker had it."""
    async with slow() as deployment:
        holds = [asyncio.Event(), asyncio.Event()]
        for one, hold in zip(deployment.decode, holds, strict=True):
            one.script.before_head = hold
        asking = [
            asyncio.create_task(deployment.ask({"prompt": prompt, "max_tokens": 2}, request_id=str(number)))
            for number, prompt in enumerate(([6] * 3000, [7] * 3000, [5] * 3000, [5] * 2900 + [8]))
        ]
        dispatcher = deployment.proxy.context.dispatcher
        await eventually(lambda: dispatcher.placement.waiting == 2)
        before, after = dispatcher._waiting
        assert (before.held, after.held) == ({}, {})
        holds[0].set()
        await eventually(lambda: before not in dispatcher._waiting)
        assert [2000 < tokens < 2900 for tokens in after.held.values()] == [True]
        holds[1].set()
        assert [(await one).status for one in asking] == [200] * 4
