"""A synchronous client of a proxy's own API: requests, workers, and adding or removing them."""

import argparse
import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from kvbelt.errors import KVBeltError, SettingsError
from kvbelt.ops.http_client import Address, Client, NoAnswerError, Reply
from kvbelt.ops.ports import PROXY_PORT
from kvbelt.ops.running import deployment_at, running_deployments
from kvbelt.security.admin_key import load_admin_key
from kvbelt.wire.json_body import JsonMessage
from kvbelt.wire.workers import WORKER_LIST, WORKER_ROW, NewWorker, WorkerList, WorkerRow

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:9100"
URL_VARIABLE = "KVBELT_URL"
KEY_VARIABLE = "KVBELT_ADMIN_KEY_FILE"

WORKERS = "/kvbelt/workers"
_POLL_SECONDS = 0.2


class ProxyRefusedError(KVBeltError):
    """The proxy refused a request. The message is the proxy's own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def add_arguments(parser: argparse.ArgumentParser, *, again: bool = False) -> None:
    """``again``: for a command's own commands, so that the options may be given before or after them."""
    default = argparse.SUPPRESS if again else None
    add_url_argument(parser, default=default)
    add_key_argument(parser, default=default)


def add_url_argument(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """``url_of`` reads it. ``--proxy`` is the older name."""
    parser.add_argument(
        "--url", type=argument_of, default=default, metavar="URL",
        help=f"the proxy, as HOST:PORT or a URL (default: ${URL_VARIABLE}, else the deployment that you run, else "
        f"{DEFAULT_URL})",
    )  # fmt: skip
    parser.add_argument("--proxy", dest="url", type=argument_of, default=default, help=argparse.SUPPRESS)


def add_key_argument(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    parser.add_argument(
        "--admin-key-file", type=Path, default=default, metavar="FILE",
        help=f"the proxy's admin key (default: ${KEY_VARIABLE}, else that of the deployment that you run)",
    )  # fmt: skip


def proxy_url(text: str) -> str:
    """One form of all that people write: ``http://HOST:PORT``, without the API's ``/v1``.

    ``text`` may be a host, ``HOST:PORT``, or a URL. The port is 9100 where there is neither a scheme nor a port.

    Raises:
        ValueError: it is none of these.
    """
    bare = "//" not in text
    parts = urlsplit(f"http://{text.strip()}" if bare else text.strip())
    if parts.scheme not in ("http", "https") or parts.query or parts.fragment or " " in text.strip():
        raise ValueError(text)
    host, port = parts.hostname, parts.port  # raises ValueError: the port is no number, or too large
    if not host:
        raise ValueError(text)
    port = port or (PROXY_PORT if bare else 443 if parts.scheme == "https" else 80)
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}:{port}{parts.path.rstrip('/').removesuffix('/v1')}"


def argument_of(text: str) -> str:
    try:
        return proxy_url(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the address of a proxy; say for example 127.0.0.1:9100 or {DEFAULT_URL}"
        ) from None


def url_of(args: argparse.Namespace) -> str:
    """The proxy that the arguments or the environment name, else that of the deployment which this user runs.

    Raises:
        SettingsError: the variable is no address, or several deployments run, none of them at the default address.
    """
    return args.url or url_of_environment() or url_of_running()


def url_of_running() -> str:
    """The proxy of this user's ``kvbelt up`` or ``kvbelt demo``; the default one where none runs.

    Raises:
        SettingsError: several run, none of them at the default address.
    """
    urls = [one.url for one in running_deployments()]
    if not urls or DEFAULT_URL in urls:
        return DEFAULT_URL
    if len(urls) > 1:
        raise SettingsError(f"{len(urls)} deployments run, at {', '.join(urls)}; --url or {URL_VARIABLE} names one")
    return urls[0]


def url_of_environment() -> str | None:
    """As ``url_of``; None: the variable is not set."""
    named = os.environ.get(URL_VARIABLE)
    try:
        return proxy_url(named) if named else None
    except ValueError:
        raise SettingsError(
            f"{URL_VARIABLE}={named} is not the address of a proxy; say for example {DEFAULT_URL}"
        ) from None


def key_of(args: argparse.Namespace) -> str | None:
    """The admin key that the arguments or the environment name, or of the user's ``kvbelt up`` there; None without one.

    Raises:
        SettingsError: the file holds no usable key.
    """
    file = args.admin_key_file or os.environ.get(KEY_VARIABLE)
    if not file and (running := deployment_at(url_of(args))) is not None:
        file = running.admin_key_file
    return load_admin_key(Path(file)) if file else None


@dataclass(frozen=True, slots=True)
class ProxyClient:
    """One proxy. Every method raises KVBeltError if the proxy refuses or does not answer."""

    url: str
    key: str | None = None
    answer_seconds: float = 15.0

    @classmethod
    def of(cls, args: argparse.Namespace) -> "ProxyClient":
        return cls(url_of(args), key_of(args))

    def request(self, method: str, path: str, body: object = None) -> Reply:
        """Send ``body`` as JSON.

        Raises:
            ProxyRefusedError: the proxy answered with an error status.
            KVBeltError: no response.
        """
        address = Address.of_url(self.url)
        path = urlsplit(self.url).path.rstrip("/") + path
        try:
            reply = asyncio.run(self._send(address, method, path, body))
        except NoAnswerError as error:
            raise KVBeltError(
                f"no answer from the proxy at {self.url}: {error}; --url or {URL_VARIABLE} names another"
            ) from None
        if reply.status >= 400:
            said = reply.json.get("error")
            message = said.get("message") if isinstance(said, dict) else None
            if reply.status == 401 and message:
                message = f"the proxy at {self.url} wants its admin key: --admin-key-file FILE, or ${KEY_VARIABLE}"
            raise ProxyRefusedError(reply.status, str(message or f"the proxy answered {reply.status}"))
        return reply

    async def _send(self, address: Address, method: str, path: str, body: object) -> Reply:
        with Client(address, self.key) as client:
            return await client.request(method, path, body, self.answer_seconds)

    def get(self, path: str, message: JsonMessage[T]) -> T:
        return self.request("GET", path).read(message, self.url)

    def pretty(self, path: str) -> str:
        """The JSON that the proxy answers, indented; fields that this version does not know are kept."""
        try:
            return msgspec.json.format(self.request("GET", path).body, indent=2).decode()
        except ValueError:
            raise KVBeltError(f"{self.url} did not answer with JSON; is it a kvbelt proxy?") from None

    # Workers

    def workers(self) -> WorkerList:
        return self.get(WORKERS, WORKER_LIST)

    def worker(self, name: str, role: str | None = None) -> WorkerRow | None:
        """One worker; None if the proxy has none of this name."""
        try:
            return self.get(_path(name, role), WORKER_ROW)
        except ProxyRefusedError as refused:
            if refused.status == 404:
                return None
            raise

    def add(self, worker: NewWorker) -> WorkerRow:
        return self.request("POST", WORKERS, worker).read(WORKER_ROW, self.url)

    def remove(self, name: str, role: str | None = None) -> None:
        """Remove a worker as soon as no request needs it."""
        self.request("DELETE", _path(name, role))

    def drain(self, name: str, role: str | None = None) -> None:
        """Give a worker no new request."""
        self.request("POST", _path(name, role, "/drain"))

    def undrain(self, name: str, role: str | None = None) -> None:
        self.request("POST", _path(name, role, "/undrain"))

    def wait_until_idle(self, name: str, role: str | None, seconds: float) -> None:
        """Wait until no request needs a worker, or the worker is removed.

        Raises:
            KVBeltError: after ``seconds`` requests still need it.
        """
        deadline = time.monotonic() + seconds
        while (found := self.worker(name, role)) is not None and found.in_flight:
            if time.monotonic() > deadline:
                raise KVBeltError(f"{found.in_flight} requests need {name} after {seconds:g} s; wait on, or stop it")
            time.sleep(_POLL_SECONDS)


def _path(name: str, role: str | None, verb: str = "") -> str:
    name = name.replace("[", "").replace("]", "")  # the proxy names IPv6 workers without brackets
    return f"{WORKERS}/{quote(name)}{verb}" + (f"?role={role}" if role else "")
