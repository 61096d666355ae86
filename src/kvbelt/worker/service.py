"""What one worker process is made of, and what it says of itself."""

import os
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import msgspec

from kvbelt.about import of_this_process
from kvbelt.engine.engine import Engine
from kvbelt.errors import RequestError
from kvbelt.transfer.belt import Belt
from kvbelt.wire.about import About
from kvbelt.wire.ids import EngineId
from kvbelt.worker.metrics import Times, render_metrics
from kvbelt.worker.prompts import Prompts


class State(StrEnum):
    """Where in its life a worker is."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Service:
    """The parts of a worker. Engine, prompts and belt are there once it is ready."""

    def __init__(self, *, role: str, engine_id: EngineId, model_name: str, aliases: tuple[str, ...] = ()) -> None:
        self.role = role
        self.engine_id = engine_id
        self.model_name = model_name
        self._names = {"", model_name, *aliases}
        self.state = State.LOADING
        self._started = int(time.time())
        self._engine: Engine | None = None
        self._prompts: Prompts | None = None
        self._facts: Callable[[str], About] | None = None
        self.belt: Belt | None = None
        self.times = Times()

    @property
    def engine(self) -> Engine:
        """The engine of a ready worker."""
        assert self._engine is not None
        return self._engine

    @property
    def prompts(self) -> Prompts:
        """The tokenizing thread of a ready worker."""
        assert self._prompts is not None
        return self._prompts

    def become_ready(
        self, engine: Engine, prompts: Prompts, belt: Belt | None, facts: Callable[[str], About] | None = None
    ) -> None:
        """From now on requests are taken. ``facts`` tells of a role's worker more than any process knows of itself."""
        self._engine, self._prompts, self.belt, self._facts = engine, prompts, belt, facts
        self.state = State.READY

    def require_ready(self) -> None:
        """Raises RequestError 503 unless requests are taken."""
        if self.state is not State.READY:
            raise RequestError(f"the worker is {self.state}; try again", status=503, kind="unavailable")

    def require_model(self, name: str | None) -> None:
        """Raises RequestError 404 unless the named model is the one served."""
        if (name or "") not in self._names:
            raise RequestError(
                f"the model {name!r} does not exist here; this server has {self.model_name!r}",
                status=404,
                kind="not_found_error",
                param="model",
            )

    def require_room(self, prompt_tokens: int, max_tokens: int | None) -> None:
        """Raises RequestError 400 if an answer of ``max_tokens`` does not fit behind the prompt.

        A prompt that is too long by itself is the engine's to refuse.
        """
        room = self.engine.max_model_len - prompt_tokens
        if max_tokens is not None and max_tokens > room > 0:
            raise RequestError(
                f"max_tokens is {max_tokens}, but the prompt's {prompt_tokens} tokens leave room for {room} of the "
                f"model's {self.engine.max_model_len}; ask for fewer or send less",
                param="max_tokens",
            )

    def busy(self) -> bool:
        """Whether there are requests."""
        if self._engine is None:
            return False
        load = self._engine.load()
        return load.running + load.waiting > 0

    def health(self) -> tuple[int, dict[str, Any]]:
        """HTTP status and body of ``/health``."""
        body: dict[str, Any] = {
            "status": "ok" if self.state is State.READY else "unavailable",
            "state": self.state,
            "role": self.role,
            "model": self.model_name,
            "engine_id": self.engine_id,
            "engine": "embedded",
            "hash_seed": os.environ.get("PYTHONHASHSEED", "random"),
            "receiver": None,
        }
        if self._engine is not None:
            load = self._engine.load()
            body["max_model_len"] = self._engine.max_model_len
            body["load"] = {
                "running": load.running,
                "waiting": load.waiting,
                "blocks_total": load.blocks_total,
                "blocks_free": load.blocks_free,
                "blocks_cached": load.blocks_cached,
            }
        if self.belt is not None:
            body["receiver"] = msgspec.to_builtins(self.belt.receiver_address())
            body["belt"] = msgspec.to_builtins(self.belt.snapshot())
        return (200 if self.state is State.READY else 503), body

    def about(self) -> About:
        """The body of ``/kvbelt/about``."""
        return self._facts(self.role) if self._facts is not None else of_this_process(self.role, "embedded")

    def models(self) -> dict[str, Any]:
        """The body of ``/v1/models``."""
        card: dict[str, Any] = {
            "id": self.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "kvbelt",
        }
        if self._engine is not None:
            card["max_model_len"] = self._engine.max_model_len
        return {"object": "list", "data": [card]}

    def metrics(self) -> bytes:
        """Prometheus text."""
        return render_metrics(
            self._engine.load() if self._engine is not None else None,
            self.belt.snapshot() if self.belt is not None else None,
            self.times,
            {(self.role, self.engine_id, self.model_name): 1.0},
            self.about(),
        )
