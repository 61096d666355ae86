"""Asks a running proxy, over HTTP, for JSON."""

import argparse
import http.client
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvbelt.errors import KVBeltError, SettingsError
from kvbelt.security.admin_key import load_admin_key

DEFAULT_URL = "http://127.0.0.1:9100"
KEY_VARIABLE = "KVBELT_ADMIN_KEY_FILE"


class ProxyRefusedError(KVBeltError):
    """The proxy has not done what it was asked for. The message is its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def add_arguments(parser: argparse.ArgumentParser, flag: str = "--url") -> None:
    """Which proxy, and the key that it may ask for."""
    parser.add_argument(flag, dest="url", default=DEFAULT_URL, metavar="URL", help="the proxy (default: %(default)s)")
    add_key_argument(parser)


def add_key_argument(parser: argparse.ArgumentParser) -> None:
    """The key that a proxy may ask for."""
    parser.add_argument("--admin-key-file", type=Path, metavar="FILE", help=f"the proxy's; default: ${KEY_VARIABLE}")


def key_of(args: argparse.Namespace) -> str | None:
    """The key that was given, if one was.

    Raises:
        SettingsError: it is none.
    """
    file = args.admin_key_file or os.environ.get(KEY_VARIABLE)
    return load_admin_key(Path(file)) if file else None


def client_of(args: argparse.Namespace) -> "ProxyClient":
    """The client that the arguments ask for.

    Raises:
        SettingsError: the key is none.
    """
    return ProxyClient(args.url, key_of(args))


@dataclass(frozen=True, slots=True)
class ProxyClient:
    """One proxy."""

    url: str
    key: str | None = None
    answer_seconds: float = 15.0

    def get(self, path: str) -> dict[str, Any]:
        """Ask for something.

        Raises:
            KVBeltError: refused, or no answer.
        """
        return self.ask("GET", path)

    def ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Send a request; its answer's object.

        Raises:
            KVBeltError: refused, or no answer.
        """
        there = urlsplit(self.url)
        if there.scheme not in ("http", "https") or there.hostname is None:
            raise SettingsError(f"{self.url} is not a URL of a proxy; say for example {DEFAULT_URL}")
        make = http.client.HTTPSConnection if there.scheme == "https" else http.client.HTTPConnection
        headers = {"content-type": "application/json"}
        if self.key is not None:
            headers["authorization"] = f"Bearer {self.key}"
        connection = make(there.hostname, there.port, timeout=self.answer_seconds)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, there.path.rstrip("/") + path, sent, headers)
            reply = connection.getresponse()
            answer = json.loads(reply.read() or b"{}")
        except (OSError, http.client.HTTPException) as error:
            raise KVBeltError(f"no answer from the proxy at {self.url}: {error or type(error).__name__}") from None
        except ValueError:
            raise KVBeltError(f"{self.url} did not answer as a proxy of kvbelt does") from None
        finally:
            connection.close()
        if reply.status >= 400:
            message = answer.get("error", {}).get("message") if isinstance(answer, dict) else None
            raise ProxyRefusedError(reply.status, str(message or f"the proxy answered {reply.status}"))
        if not isinstance(answer, dict):
            raise KVBeltError(f"{self.url} did not answer as a proxy of kvbelt does")
        return answer
