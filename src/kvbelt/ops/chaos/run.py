"""One run from start to end: reference answers, deployment, phases, result."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from kvbelt.errors import KVBeltError, StartError
from kvbelt.ops.chaos.config import GUEST, ChaosConfig, aggregated_spec, bytes_per_token, chaos_spec
from kvbelt.ops.chaos.endpoints import discover_endpoints, endpoints_of
from kvbelt.ops.chaos.experiment import Experiment
from kvbelt.ops.chaos.faults import Requirement
from kvbelt.ops.chaos.reference import Reference, collect_reference
from kvbelt.ops.chaos.result import Result
from kvbelt.ops.chaos.rubbish_sender import RubbishSender
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.http_client import Address, get
from kvbelt.ops.network import Network, NetworkRefusedError
from kvbelt.ops.ports import WORKER_HOST
from kvbelt.ops.processes import DeploymentSpec
from kvbelt.ops.terminal import Terminal
from kvbelt.security.keys import Keys, load_keys
from kvbelt.wire.health import WORKER_HEALTH

T = TypeVar("T")

Log = Callable[[str], None]

_BLOCK_SIZE = 16  # the embedded engine's default


class StoppedError(KVBeltError):
    """The run was ended before there was anything to report."""


async def run(config: ChaosConfig, terminal: Terminal, log: Log, stop: asyncio.Event) -> Result:
    """Run and return the result. ``stop`` ends the load early.

    Raises:
        StartError: something could not be started, or no proxy answers.
        StoppedError: stopped before the load began.
    """
    if config.topology is None:
        assert config.url is not None
        return await _against_running(config, config.url, log, stop)
    return await _against_own(config, terminal, log, stop)


async def _against_running(config: ChaosConfig, url: Address, log: Log, stop: asyncio.Event) -> Result:
    endpoints = await discover_endpoints(url, config.admin_key)
    server, by = config.reference_url, f"the server at http://{config.reference_url}"
    if server is None:
        # A decode worker that is asked directly gets no KV and computes every prompt itself.
        name, server = next((n, a) for n, a in endpoints.workers.items() if not n.startswith("prefill"))
        by = f"{name}, asked directly,"
    reference = await _collect_reference(config, by, server, log, stop)
    return await Experiment(config, endpoints, reference, log=log, stop=stop).run()


async def _against_own(config: ChaosConfig, terminal: Terminal, log: Log, stop: asyncio.Event) -> Result:
    log("starting the aggregated server for the reference answers")
    async with _started(aggregated_spec(config), terminal, stop) as aggregated:
        worker = aggregated.workers[0]
        token_bytes = bytes_per_token(await _blocks(Address(worker.host, worker.port)), _BLOCK_SIZE)
        reference = await _collect_reference(
            config, "0p1d of the same model", endpoints_of(aggregated).proxy, log, stop
        )
    with contextlib.ExitStack() as stack:
        network, refused = None, "not asked for"
        if config.namespaces and any(kind.needs is Requirement.NETWORK for kind in config.kinds):
            try:
                network = stack.enter_context(Network(config.workers))
            except NetworkRefusedError as error:
                refused = str(error)
                log(f"the workers get no network namespaces: {error}")
        places = network.places if network is not None else {}
        spec = chaos_spec(config, token_bytes, places, network.gateway if network is not None else WORKER_HOST)
        log(f"starting {config.name}" + (f" in network namespaces (slow by {network.slows_by})" if network else ""))
        async with _started(spec, terminal, stop) as deployment:
            attack = Experiment(
                config,
                endpoints_of(deployment),
                reference,
                log=log,
                stop=stop,
                deployment=deployment,
                network=network,
                rubbish=RubbishSender(_guest(deployment)),
                no_network=refused,
            )
            return await attack.run()


async def _collect_reference(config: ChaosConfig, by: str, server: Address, log: Log, stop: asyncio.Event) -> Reference:
    log(f"asking {by} {config.questions} questions, twice each")
    learning = collect_reference(by, server, seed=config.seed, count=config.questions, longest=config.longest)
    return await _unless(stop, learning)


@contextlib.asynccontextmanager
async def _started(spec: DeploymentSpec, terminal: Terminal, stop: asyncio.Event) -> AsyncIterator[Deployment]:
    deployment = Deployment(spec, terminal)
    try:
        await _unless(stop, deployment.start())
        yield deployment
    finally:
        await deployment.stop()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` returns, or cancel it and raise StoppedError if ``stop`` comes first."""
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
    reply = await get(worker, "/health")
    if reply is None:
        raise StartError(f"no answer to /health from the aggregated server at http://{worker}")
    load = reply.read(WORKER_HEALTH, "the aggregated server").load
    assert load is not None  # a ready worker has it
    return load.blocks_total


def _guest(deployment: Deployment) -> Keys | None:
    keys = deployment.keys
    return load_keys(keys.secret(GUEST), keys.trusted) if keys is not None else None
