"""A worker service without an engine."""

from kvbelt.wire.health import Role
from kvbelt.wire.ids import EngineId
from kvbelt.worker.service import Service, State


def service(belt):
    """A worker with this belt and no engine, which its tests do not use."""
    made = Service(role=Role.PREFILL, engine_id=EngineId("p"), model_name="m")
    made.belt, made.state = belt, State.READY
    return made
