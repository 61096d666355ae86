"""What the proxy shows of its workers, in ``/health`` and ``/kvbelt/workers``."""

from dataclasses import asdict
from typing import Any

from kvbelt.proxy.fleet import Fleet
from kvbelt.proxy.workers import Worker
from kvbelt.routing.endpoint import Role


def worker_json(worker: Worker) -> dict[str, Any]:
    """One worker as it is now."""
    endpoint, report = worker.endpoint, worker.endpoint.report
    return {
        "worker": worker.name,
        "role": endpoint.role,
        "state": report.health,
        "detail": report.detail,
        "standing": endpoint.standing,
        "warming": endpoint.warming,
        "engine_id": report.engine_id,
        "model": report.model,
        "max_model_len": report.max_model_len,
        "load": asdict(report.load),
        "buffers": None if report.buffers is None else asdict(report.buffers),
        "in_flight": worker.in_flight,
    }


def pairs_json(fleet: Fleet) -> list[dict[str, Any]]:
    """Every pair of healthy workers: whether the one can send to the other, and if not, why."""
    found = []
    for prefill in fleet.of(Role.PREFILL):
        for decode in fleet.of(Role.DECODE):
            pair = fleet.pairs.get(prefill.engine_id, decode.engine_id)
            if pair is not None:
                found.append(
                    {
                        "prefill": prefill.name,
                        "decode": decode.name,
                        "state": pair.state,
                        "reason": pair.reason,
                        "detail": pair.detail,
                    }
                )
    return found
