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
from kvbelt.security.admin_key import load_admin_key
from kvbelt.wire.json_body import JsonMessage
from kvbelt.wire.workers import WORKER_LIST, WORKER_ROW, NewWorker, WorkerList, WorkerRow

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:9100"
KEY_VARIABLE = "KVBELT_ADMIN_KEY_FILE"

WORKERS = "/kvbelt/workers"
_POLL_SECONDS = 0.2


class ProxyRefusedError(KVBeltError):
    """The proxy refused a request. The message is the proxy's own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def add_arguments(parser: argparse.ArgumentParser, flag: str = "--url") -> None:
    parser.add_argument(flag, dest="url", default=DEFAULT_URL, metavar="URL", help="the proxy (default: %(default)s)")
    add_key_argument(parser)


def add_key_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--admin-key-file", type=Path, metavar="FILE", help=f"the proxy's admin key (default: ${KEY_VARIABLE})"
    )


def key_of(args: argparse.Namespace) -> str | None:
    """The admin key that the arguments or the environment name; None without one.

    Raises:
        SettingsError: the file holds no usable key.
    """
    file = args.admin_key_file or os.environ.get(KEY_VARIABLE)
    return load_admin_key(Path(file)) if file else None


@dataclass(frozen=True, slots=True)
class ProxyClient:
    """One proxy. Every method raises KVBeltError if the proxy refuses or does not answer."""

    url: str
    key: str | None = None
    answer_seconds: float = 15.0

    @classmethod
    def of(cls, args: argparse.Namespace) -> "ProxyClient":
        return cls(args.url, key_of(args))

    def request(self, method: str, path: str, body: object = None) -> Reply:
        """Send ``body`` as JSON.

        Raises:
            ProxyRefusedError: the proxy answered with an error status.
            KVBeltError: no response.
        """
        try:
            address = Address.of_url(self.url)
        except ValueError:
            raise SettingsError(f"{self.url} is not a URL of a proxy; say for example {DEFAULT_URL}") from None
        path = urlsplit(self.url).path.rstrip("/") + path
        try:
            reply = asyncio.run(self._send(address, method, path, body))
        except NoAnswerError as error:
            raise KVBeltError(f"no answer from the proxy at {self.url}: {error}") from None
        if reply.status >= 400:
            said = reply.json.get("error")
            message = said.get("message") if isinstance(said, dict) else None
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
