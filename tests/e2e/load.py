"""Requests without pause from several threads, and what became of each."""

import threading
import time
import uuid
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from tests.e2e.asking import events


@dataclass(frozen=True)
class Outcome:
    """One request. Moments are of ``time.monotonic()``."""

    began: float
    ended: float
    status: int
    token_ids: tuple[int, ...]
    path: str
    said: str = ""  #: an error's words


@dataclass
class Load:
    """Asks for the same again and again, until the ``with`` ends; ``outcomes`` are complete then.

    An exception of the client (no answer in time, a connection that breaks) is an outcome with status 0.
    """

    url: str
    body: dict[str, Any]
    at_once: int = 3
    stream: bool = False
    timeout: float = 60.0
    salted: bool = False  #: no request finds anything of another in a prefix cache
    outcomes: list[Outcome] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Begin."""
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(self.at_once)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for each thread's last request."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def answers_since(self, moment: float) -> int:
        """The number of right answers to requests that began after a moment."""
        return sum(one.status == 200 and one.began >= moment for one in list(self.outcomes))

    def _run(self) -> None:
        with httpx.Client(timeout=self.timeout) as client:
            while not self._stop.is_set():
                self.outcomes.append(self._ask(client))

    def _ask(self, client: httpx.Client) -> Outcome:
        began = time.monotonic()
        body = {**self.body, "return_token_ids": True, "stream": self.stream}
        if self.salted:
            body["cache_salt"] = uuid.uuid4().hex
        ids: list[int] = []
        said = ""
        try:
            with client.stream("POST", self.url + "/v1/completions", json=body) as reply:
                path = reply.headers.get("x-kvbelt-path", "")
                if reply.status_code != 200:
                    said = reply.read().decode()
                elif self.stream:
                    for event in events(reply):
                        if event != "[DONE]":
                            said += str(event.get("error", ""))
                            ids += [token for choice in event.get("choices", ()) for token in choice["token_ids"]]
                else:
                    reply.read()
                    ids = reply.json()["choices"][0]["token_ids"]
            return Outcome(began, time.monotonic(), reply.status_code, tuple(ids), path, said)
        except httpx.HTTPError as error:
            return Outcome(began, time.monotonic(), 0, tuple(ids), "", repr(error))
