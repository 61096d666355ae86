"""One worker process: listen, load, serve, drain, end.

The HTTP port is taken first, so that a busy port is an error at once and not after the model has loaded, and so that
``/health`` can say ``loading``. The model loads off the event loop.
"""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import uvicorn
import uvloop

from kvbelt.belt_setup import channel_for, make_belt, options_of
from kvbelt.engine.api import ModelError
from kvbelt.engine.engine import Engine
from kvbelt.engine.settings import EngineSettings
from kvbelt.errors import SettingsError, StartError
from kvbelt.security.keys import new_engine_id
from kvbelt.settings import WorkerSettings, keys_of
from kvbelt.telemetry import configure_logging, get_logger
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.settings import BeltIdentity
from kvbelt.wire.about import About
from kvbelt.worker.about import about_worker, wire_layout
from kvbelt.worker.app import make_app
from kvbelt.worker.prompts import Prompts
from kvbelt.worker.service import Service, State
from kvbelt.worker.steps import steps_of, tell_changes

log = get_logger(__name__)

T = TypeVar("T")

DRAIN_SECONDS = 2  #: for requests under way when the process is told to stop


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    return listener


def _engine_settings(settings: WorkerSettings) -> EngineSettings:
    names = (
        "model_dir", "device", "dtype", "block_size", "max_model_len", "threads", "prefix_caching", "max_batch_tokens",
        "max_running",
    )  # fmt: skip
    given: dict[str, Any] = {name: value for name in names if (value := getattr(settings, name)) is not None}
    if settings.kv_gb is not None:
        given["kv_bytes"] = int(settings.kv_gb * 1e9)
    if settings.slo_itl_ms is not None:
        given["itl_seconds"] = settings.slo_itl_ms / 1e3
    try:
        return EngineSettings(**given)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _on_daemon_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """Run on a thread that ends with the process, because loading a model cannot be interrupted."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 -- raised again where it is awaited
            done.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return asyncio.wrap_future(done)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the worker decides when to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Worker:
    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._engine_settings = _engine_settings(settings)
        self._loaded: list[Engine | Belt | Prompts] = []  # in the order in which they are closed
        self._keys = keys_of(settings.belt, "the belt's settings") if settings.belt is not None else None
        self._service = Service(
            role=settings.role,
            engine_id=new_engine_id(self._keys),
            model_name=settings.served_model_name or settings.model_dir.name,
            aliases=(str(settings.model_dir), settings.model_dir.name),
            limits=settings.limits,
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        settings = self._settings
        listener = _listen(settings.host, settings.port)
        server = _Server(
            uvicorn.Config(
                make_app(self._service),
                log_config=None,
                access_log=False,
                lifespan="off",
                http="httptools",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=DRAIN_SECONDS,
                h11_max_incomplete_event_size=None,
            )
        )
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        loading = _on_daemon_thread(self._load)
        stopping = asyncio.create_task(stop.wait())
        telling: asyncio.Task[None] | None = None
        try:
            first: set[asyncio.Future[Any]] = {loading, stopping, serving}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                engine, belt, about = await loading
                self._become_ready(engine, belt, about)
                if belt is not None:
                    telling = asyncio.create_task(tell_changes(partial(steps_of, engine), belt.tell))
                await asyncio.wait(first - {loading}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._service.state = State.DRAINING
            stopping.cancel()
            if telling is not None:
                telling.cancel()
            server.should_exit = True
            await serving
            listener.close()
            for part in self._loaded:
                part.close()

    def _load(self) -> tuple[Engine, Belt | None, Callable[[str], About]]:
        settings = self._settings
        log.info("loading", model=str(settings.model_dir), role=settings.role)
        try:
            engine = Engine(self._engine_settings)
        except ModelError as error:
            raise StartError(str(error)) from error
        # The engine is closed first: its thread may be in a forward pass that hands blocks to the belt.
        self._loaded.append(engine)
        preparing = threading.Thread(target=engine.grammars.prepare, name="grammars", daemon=True)
        preparing.start()
        channel, belt = None, None
        if settings.belt is not None:
            engine_id = self._service.engine_id
            options = options_of(settings.belt, settings.role, settings.host, self._keys)
            channel = channel_for(options, engine_id, engine.pool.storage.device)
            identity = BeltIdentity(
                engine_id, options.role, self._service.model_name, engine.fingerprint, wire_layout(engine)
            )
            prefix = engine if settings.prefix_caching and options.receives else None
            belt = make_belt(options, identity, channel, engine.pool.layers, prefix)
            self._loaded.append(belt)
            belt.start()
        engine.start()
        preparing.join()  # else the first requests would stand still with it
        return engine, belt, partial(about_worker, engine, belt, channel, settings.belt)

    def _become_ready(self, engine: Engine, belt: Belt | None, about: Callable[[str], About]) -> None:
        prompts = Prompts(
            engine.tokenizer,
            engine.layout.block_size,
            engine.max_model_len,
            trusts_templates=self._settings.trust_request_chat_template,
        )
        self._loaded.append(prompts)
        self._service.become_ready(engine, prompts, belt, about)
        log.info(
            "ready",
            role=self._settings.role,
            port=self._settings.port,
            engine_id=self._service.engine_id,
            max_model_len=engine.max_model_len,
            blocks=engine.load().blocks_total,
        )


def run_worker(settings: WorkerSettings) -> None:
    """Run one worker until it is told to stop. Raises StartError: a port is taken or the model cannot be served."""
    configure_logging(json=settings.log_json)
    uvloop.run(Worker(settings).run())
