"""One run from start to end: who is right, the deployment, the phases, what is left at the end."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from kvbelt.errors import KVBeltError, StartError
from kvbelt.ops.chaos.attack import Attack
from kvbelt.ops.chaos.client import Address, get
from kvbelt.ops.chaos.faults import Need
from kvbelt.ops.chaos.plan import GUEST, Plan, aggregated_spec, bytes_per_token, chaos_spec
from kvbelt.ops.chaos.reference import Reference, learn
from kvbelt.ops.chaos.result import Result
from kvbelt.ops.chaos.rubbish_io import Thrower
from kvbelt.ops.chaos.site import site_at, site_of
from kvbelt.ops.console import Console
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.network import Network, NetworkRefusedError
from kvbelt.ops.ports import WORKER_HOST
from kvbelt.ops.processes import DeploymentSpec
from kvbelt.security.keys import Keys, load_keys

T = TypeVar("T")

Say = Callable[[str], None]

_BLOCK_SIZE = 16  # of the embedded engine, unless it is told another


class StoppedError(KVBeltError):
    """Somebody ended the run before there was anything to report."""


async def run(plan: Plan, console: Console, say: Say, stop: asyncio.Event) -> Result:
    """Run, and tell what was found. ``stop`` ends the load early.

    Raises:
        StartError: something could not be started, or nobody is there.
        StoppedError: stopped before the load began.
    """
    if plan.topology is None:
        assert plan.url is not None
        return await _against_running(plan, plan.url, say, stop)
    return await _against_own(plan, console, say, stop)


async def _against_running(plan: Plan, url: Address, say: Say, stop: asyncio.Event) -> Result:
    site = await site_at(url, plan.admin_key)
    server, by = plan.reference_url, f"the server at http://{plan.reference_url}"
    if server is None:
        # A decode worker that is asked directly is given no KV: it computes every prompt itself.
        name, server = next((n, a) for n, a in site.workers.items() if not n.startswith("prefill"))
        by = f"{name}, asked directly,"
    reference = await _learn(plan, by, server, say, stop)
    return await Attack(plan, site, reference, say=say, stop=stop).run()


async def _against_own(plan: Plan, console: Console, say: Say, stop: asyncio.Event) -> Result:
    say("starting the aggregated server that says what is right")
    async with _started(aggregated_spec(plan), console, stop) as aggregated:
        worker = aggregated.workers[0]
        token_bytes = bytes_per_token(await _blocks(Address(worker.host, worker.port)), _BLOCK_SIZE)
        reference = await _learn(plan, "0p1d of the same model", site_of(aggregated).proxy, say, stop)
    with contextlib.ExitStack() as stack:
        network, refused = None, "not asked for"
        if plan.namespaces and any(kind.needs is Need.NETWORK for kind in plan.kinds):
            try:
                network = stack.enter_context(Network(plan.workers))
            except NetworkRefusedError as error:
                refused = str(error)
                say(f"the workers get no hosts of their own: {error}")
        places = network.places if network is not None else {}
        spec = chaos_spec(plan, token_bytes, places, network.gateway if network is not None else WORKER_HOST)
        say(f"starting {plan.name}" + (f" in network namespaces (slow by {network.slows_by})" if network else ""))
        async with _started(spec, console, stop) as deployment:
            attack = Attack(
                plan,
                site_of(deployment),
                reference,
                say=say,
                stop=stop,
                deployment=deployment,
                network=network,
                thrower=Thrower(_guest(deployment)),
                no_network=refused,
            )
            return await attack.run()


async def _learn(plan: Plan, by: str, server: Address, say: Say, stop: asyncio.Event) -> Reference:
    say(f"asking {by} {plan.questions} questions, twice each")
    learning = learn(by, server, seed=plan.seed, count=plan.questions, longest=plan.longest)
    return await _unless(stop, learning)


@contextlib.asynccontextmanager
async def _started(spec: DeploymentSpec, console: Console, stop: asyncio.Event) -> AsyncIterator[Deployment]:
    deployment = Deployment(spec, console)
    try:
        await _unless(stop, deployment.start())
        yield deployment
    finally:
        await deployment.stop()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns; StoppedError, and the work is cancelled, if ``stop`` comes first."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise StoppedError("stopped before the load began")
        return task.result()
    finally:
        for one in (task, stopped):
            one.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


async def _blocks(worker: Address) -> int:
    try:
        return int(json.loads(await get(worker, "/health") or b"")["load"]["blocks_total"])
    except (ValueError, KeyError, TypeError):
        raise StartError(f"the aggregated server at http://{worker} does not tell its KV blocks") from None


def _guest(deployment: Deployment) -> Keys | None:
    keys = deployment.keys
    return load_keys(keys.secret(GUEST), keys.trusted) if keys is not None else None
