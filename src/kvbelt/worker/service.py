"""The parts of one worker process, and its answers about itself."""

import os
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import msgspec

from kvbelt.about import of_this_process, on_this_host
from kvbelt.belt_metrics import belt_families, link_families, transport_families
from kvbelt.engine.engine import Engine
from kvbelt.errors import RequestError, context_exceeded
from kvbelt.limits import DEFAULTS, Limits
from kvbelt.metrics import gauge, process_families, render
from kvbelt.transfer.belt import Belt
from kvbelt.turns import Turns
from kvbelt.wire.about import About
from kvbelt.wire.health import Role, WorkerHealth
from kvbelt.wire.ids import EngineId
from kvbelt.wire.load import Load
from kvbelt.worker.metrics import Times, engine_families
from kvbelt.worker.prompts import Prompts
from kvbelt.worker.steps import steps_of


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Service:
    """The parts of a worker. It has engine, prompts and belt once it is ready."""

    def __init__(
        self,
        *,
        role: Role,
        engine_id: EngineId,
        model_name: str,
        aliases: tuple[str, ...] = (),
        limits: Limits = DEFAULTS,
    ) -> None:
        self.role = role
        self.engine_id = engine_id
        self.model_name = model_name
        self.limits = limits
        self.turns = Turns()  #: of large bodies
        self._names = {"", model_name, *aliases}
        self.state = State.LOADING
        self._started = int(time.time())
        self._engine: Engine | None = None
        self._prompts: Prompts | None = None
        self._about: Callable[[str], About] | None = None
        self.belt: Belt | None = None
        self.times = Times()
        self._device = ""

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    @property
    def prompts(self) -> Prompts:
        assert self._prompts is not None
        return self._prompts

    def become_ready(
        self, engine: Engine, prompts: Prompts, belt: Belt | None, about: Callable[[str], About] | None = None
    ) -> None:
        """Take requests from now on. ``about``: the body of ``/kvbelt/about`` for a role."""
        self._engine, self._prompts, self.belt, self._about = engine, prompts, belt, about
        self._device = on_this_host(str(engine.pool.storage.device), os.environ.get("CUDA_VISIBLE_DEVICES"))
        self.state = State.READY

    def require_ready(self) -> None:
        """Raises RequestError 503 unless the worker takes requests."""
        if self.state is not State.READY:
            raise RequestError(f"the worker is {self.state}; try again", status=503, kind="unavailable")

    def require_model(self, name: str | None) -> None:
        """Raises RequestError 404 unless this is the model that is served."""
        if (name or "") not in self._names:
            raise RequestError(
                f"the model {name!r} does not exist here; this server has {self.model_name!r}",
                status=404,
                kind="not_found_error",
                param="model",
                code="model_not_found",
            )

    def require_room(self, prompt_tokens: int, max_tokens: int | None) -> None:
        """Raises RequestError 400 if an answer of ``max_tokens``, or any answer, does not fit behind the prompt."""
        context = self.engine.max_model_len
        if prompt_tokens >= context:
            raise context_exceeded(context, prompt_tokens)
        if max_tokens is not None and prompt_tokens + max_tokens > context:
            raise context_exceeded(context, prompt_tokens, max_tokens)

    def busy(self) -> bool:
        if self._engine is None:
            return False
        load = self._engine.load()
        return load.running + load.waiting > 0

    def health(self) -> WorkerHealth:
        engine, belt = self._engine, self.belt
        return WorkerHealth(
            status="ok" if self.state is State.READY else "unavailable",
            state=self.state,
            role=self.role,
            model=self.model_name,
            engine_id=self.engine_id,
            engine="embedded",
            hash_seed=os.environ.get("PYTHONHASHSEED", "random"),
            receiver=belt.receiver_address() if belt is not None else None,
            max_model_len=engine.max_model_len if engine is not None else None,
            load=msgspec.convert(engine.load(), Load, from_attributes=True) if engine is not None else None,
            belt=belt.snapshot() if belt is not None else None,
            steps=steps_of(engine) if engine is not None else None,
            device=self._device,
        )

    def about(self) -> About:
        return self._about(self.role) if self._about is not None else of_this_process(self.role, "embedded")

    def models(self) -> dict[str, Any]:
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
        names: tuple[str, ...] = (self.role, self.engine_id, self.model_name)
        families = [*process_families(), gauge("kvbelt_worker_info", {names: 1.0}), *self.times.families()]
        if self._engine is not None:
            families += engine_families(self._engine.load())
        if self.belt is not None:
            about = self.about()
            families += belt_families(self.belt.snapshot())
            families += [*link_families(about.links), *transport_families(about.transports)]
        return render(families)
