"""The socket of a running ``kvbelt up``, by which ``kvbelt workers restart`` has it start a process again.

It lies in the deployment's own folder, which only its user may enter. One JSON line asks, one answers.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from kvbelt.errors import KVBeltError
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.running import RunningDeployment, RunningWorker, announced
from kvbelt.ops.terminal import Terminal

_SOCKET = "control"
_MAX_LINE = 4096


class Restart(msgspec.Struct, frozen=True):
    name: str  #: of a process


class Answer(msgspec.Struct, frozen=True):
    problem: str  #: empty: it is ready


@contextlib.asynccontextmanager
async def controlled(deployment: Deployment, terminal: Terminal, model: str, launcher: int) -> AsyncIterator[None]:
    """Let commands of this user find a deployment that is ready, and restart its processes.

    Args:
        deployment: what runs.
        terminal: shows each restart.
        model: its name in requests.
        launcher: the pid of this process.
    """
    one_at_a_time = asyncio.Lock()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = msgspec.json.decode(await reader.readline(), type=Restart)
            async with one_at_a_time:
                problem = await _restart(deployment, terminal, asked.name)
            writer.write(msgspec.json.encode(Answer(problem)) + b"\n")
            await writer.drain()
        except (OSError, ValueError, msgspec.MsgspecError):
            pass  # the client has left, or is not ours
        finally:
            writer.close()

    path = deployment.folder / _SOCKET
    server = await asyncio.start_unix_server(handle, path, limit=_MAX_LINE)
    running = RunningDeployment(
        pid=launcher,
        url=deployment.url,
        topology=str(deployment.spec.topology),
        model=model,
        started=time.time(),
        admin_key_file=str(deployment.admin_key_file),
        control=str(path),
        processes=tuple(RunningWorker(p.name, p.role, f"{p.host}:{p.port}") for p in deployment.processes),
    )
    try:
        with announced(running):
            yield
    finally:
        server.close()


async def _restart(deployment: Deployment, terminal: Terminal, name: str) -> str:
    """Returns why it is not ready; empty: it is."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        terminal.info(f"restarting {name}")
        await deployment.restart(name)
    except KeyError:
        return f"there is no {name!r}; there are {', '.join(p.name for p in deployment.processes)}"
    except KVBeltError as error:
        terminal.error(str(error))
        return str(error)
    terminal.info(f"{name} ready after {loop.time() - began:.1f} s")
    return ""


def restart(deployment: RunningDeployment, name: str, seconds: float) -> None:
    """Have a deployment's launcher restart a process; returns when it is ready.

    Raises:
        KVBeltError: it did not become ready, or the launcher does not answer within ``seconds``.
    """
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(seconds)
            client.connect(str(Path(deployment.control)))
            client.sendall(msgspec.json.encode(Restart(name)) + b"\n")
            with client.makefile("rb") as said:
                answer = msgspec.json.decode(said.readline(), type=Answer)
    except (OSError, msgspec.MsgspecError) as error:
        raise KVBeltError(
            f"kvbelt up (process {deployment.pid}) did not restart {name}: {error or 'no answer'}; see its terminal"
        ) from None
    if answer.problem:
        raise KVBeltError(answer.problem)
