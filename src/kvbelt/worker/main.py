"""The life of one worker process: listen, load, serve, drain, end.

The HTTP port is taken first, so that a busy port is an error within a moment and not after the model has loaded,
and so that ``/health`` can say ``loading``. The model loads off the event loop.
"""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
import uvloop

from kvbelt.engine.api import ModelError
from kvbelt.engine.engine import Engine
from kvbelt.engine.settings import EngineSettings
from kvbelt.errors import SettingsError, StartError
from kvbelt.security.keys import new_engine_id
from kvbelt.settings import WorkerSettings, keys_of
from kvbelt.telemetry import configure_logging, get_logger
from kvbelt.transfer.belt import Belt
from kvbelt.worker.about import WorkerFacts
from kvbelt.worker.app import make_app
from kvbelt.worker.belt_setup import channel_for, make_belt
from kvbelt.worker.prompts import Prompts
from kvbelt.worker.service import Service, State

log = get_logger(__name__)

#: Requests under way get this long to end when the process is told to stop.
DRAIN_SECONDS = 2


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
    """What the engine is built with.

    Raises:
        SettingsError: a value is out of range, or two of them do not fit together.
    """
    given: dict[str, Any] = {
        "kv_bytes": None if settings.kv_gb is None else int(settings.kv_gb * 1e9),
        "max_batch_tokens": settings.max_batch_tokens,
        "max_running": settings.max_running,
    }
    try:
        return EngineSettings(
            model_dir=settings.model_dir,
            device=settings.device,
            dtype=settings.dtype,
            block_size=settings.block_size,
            max_model_len=settings.max_model_len,
            threads=settings.threads,
            prefix_caching=settings.prefix_caching,
            **{name: value for name, value in given.items() if value is not None},
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _on_daemon_thread(work: Callable[[], None]) -> "asyncio.Future[None]":
    """Run on a thread that ends with the process: loading a model cannot be interrupted, and must not be waited for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            work()
        except BaseException as raised:  # noqa: BLE001 -- raised again where it is awaited
            error = raised
        with suppress(RuntimeError):  # the loop has closed: the process is ending
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return done


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the worker decides when to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


class Worker:
    """One worker process, from its settings."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._engine_settings = _engine_settings(settings)
        self._engine: Engine | None = None
        self._belt: Belt | None = None
        self._facts: WorkerFacts | None = None
        self._prompts: Prompts | None = None
        self._keys = keys_of(settings.belt, "the belt's settings") if settings.belt is not None else None
        self._service = Service(
            role=settings.role,
            engine_id=new_engine_id(self._keys),
            model_name=settings.served_model_name or settings.model_dir.name,
            aliases=(str(settings.model_dir), settings.model_dir.name),
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            StartError: a port is taken or the model cannot be served.
        """
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
        try:
            first: set[asyncio.Future[Any]] = {loading, stopping, serving}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                await loading
                self._become_ready()
                await asyncio.wait(first - {loading}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._service.state = State.DRAINING
            stopping.cancel()
            server.should_exit = True
            await serving
            listener.close()
            self._close()

    def _load(self) -> None:
        settings = self._settings
        log.info("loading", model=str(settings.model_dir), role=settings.role)
        try:
            engine = Engine(self._engine_settings)
        except ModelError as error:
            raise StartError(str(error)) from error
        self._engine = engine
        channel = None
        if settings.belt is not None:
            engine_id = self._service.engine_id
            channel = channel_for(settings, settings.belt, engine_id)
            self._belt = make_belt(
                settings, settings.belt, self._keys, engine, channel, engine_id, self._service.model_name
            )
            self._belt.start()
        self._facts = WorkerFacts(engine, self._belt, channel, settings.belt)
        engine.start()

    def _become_ready(self) -> None:
        assert self._engine is not None
        assert self._facts is not None
        self._prompts = Prompts(self._engine.tokenizer, self._engine.layout.block_size)
        self._service.become_ready(self._engine, self._prompts, self._belt, self._facts.about)
        log.info(
            "ready",
            role=self._settings.role,
            port=self._settings.port,
            engine_id=self._service.engine_id,
            max_model_len=self._engine.max_model_len,
            blocks=self._engine.load().blocks_total,
        )

    def _close(self) -> None:
        # The engine first: its thread may be inside a forward pass that hands blocks to the belt.
        for part in (self._prompts, self._engine, self._belt):
            if part is not None:
                part.close()


def run_worker(settings: WorkerSettings) -> None:
    """Run one worker until it is told to stop. Its process may not end well by itself: see ``cli.py``.

    Raises:
        StartError: a port is taken or the model cannot be served.
    """
    configure_logging(json=settings.log_json)
    uvloop.run(Worker(settings).run())
