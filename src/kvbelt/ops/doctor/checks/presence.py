"""Whether every process answers."""

from collections.abc import Iterator

from kvbelt.ops.doctor.evidence import Evidence, WorkerSeen
from kvbelt.ops.doctor.finding import Finding, Severity

#: The proxy avoids a worker whose ``/health`` takes longer.
LATE_SECONDS = 0.5


def proxy_answers(evidence: Evidence) -> Iterator[Finding]:
    """The proxy, and at least one decode worker."""
    if evidence.proxy_answer:
        yield Finding(
            "no_proxy",
            Severity.ERROR,
            f"no kvbelt proxy answers at {evidence.url}",
            "clients get no answer, and nothing else can be checked without it",
            "start it (kvbelt up 1p1d, or kvbelt proxy …), or give its address with --url http://HOST:9100",
            (evidence.proxy_answer,),
        )
    elif not any(
        worker.state == "ready" and worker.standing == "active"
        for worker in evidence.workers
        if worker.role != "prefill"
    ):
        yield Finding(
            "no_decode_worker",
            Severity.ERROR,
            "no decode worker is ready",
            "requests are answered with 503, or whole by prefill workers",
            "start a decode worker, then: kvbelt workers add decode HOST:PORT (or undrain one that is drained)",
            tuple(
                f"{worker.name}: {worker.state}, {worker.standing} {worker.detail}".rstrip()
                for worker in evidence.of("decode")
            ),
        )


def prefill_there(evidence: Evidence) -> Iterator[Finding]:
    """A prefill worker, where there should be one."""
    workers = list(evidence.of("prefill"))
    if workers and not any(worker.state == "ready" and worker.standing == "active" for worker in workers):
        yield Finding(
            "no_prefill_worker",
            Severity.ERROR,
            "no prefill worker is ready",
            "decode workers compute all prompts themselves, beside their answers",
            "start a prefill worker, then: kvbelt workers add prefill HOST:PORT (or undrain one that is drained)",
            tuple(f"{one.name}: {one.state}, {one.standing} {one.detail}".rstrip() for one in workers),
        )


def workers_alive(evidence: Evidence) -> Iterator[Finding]:
    """Workers that do not answer, or are not ready."""
    for worker in evidence.workers:
        if not worker.answers:
            yield _dead(worker, evidence)
        elif worker.status != 200:
            yield Finding(
                "worker_not_ready",
                Severity.WARNING,
                f"{worker.role} worker {worker.name} answers, but takes no requests",
                "the other workers do its work meanwhile",
                "wait until its model is loaded; if that takes minutes, see its log",
                (worker.detail or f"/health answered {worker.status}",),
            )
        elif worker.state == "unready" and worker.standing == "active":
            yield Finding(
                "worker_unusable",
                Severity.ERROR,
                f"{worker.role} worker {worker.name} answers, but the proxy cannot use it",
                "the proxy sends it no requests",
                worker.detail.rpartition("; ")[2] or "see the proxy's log",
                (worker.detail,),
            )
        elif worker.state not in ("ready", "") and worker.standing == "active":
            yield Finding(
                "worker_out_of_sight",
                Severity.ERROR,
                f"{worker.role} worker {worker.name} answers the doctor, but not the proxy",
                "the proxy sends it no requests: the network between the two is cut, slow or filtered",
                f"on the proxy's host: curl -m 3 http://{worker.name}/health",
                (f"the proxy says: {worker.state}, {worker.detail}",),
            )
        elif worker.warming and worker.standing == "active":
            yield Finding(
                "worker_not_ready",
                Severity.NOTE,
                f"{worker.role} worker {worker.name} is being connected to the other side",
                "others are preferred meanwhile; if it lasts for minutes, the pairs below say why",
                "kvbelt workers list shows the pairs that cannot be connected",
                (worker.detail,) if worker.detail else (),
            )
        elif worker.needs_key:
            yield Finding(
                "key_needed",
                Severity.WARNING,
                f"{worker.role} worker {worker.name} answers no question of the doctor, for want of its key",
                "its model, its carrier and its links are not checked",
                "give the doctor the worker's key as well: --worker-api-key-file FILE",
                (f"/v1/completions of {worker.name} answered 401 or 403",),
            )


def _without(worker: WorkerSeen, evidence: Evidence) -> str:
    """What its loss means."""
    others = [one for one in evidence.workers if one is not worker and one.answers and one.state == "ready"]
    if any(one.role in (worker.role, "both") for one in others):
        return "the other workers do its work, and recompute what it had"
    if not others:
        return "no other worker is left: every request is answered with 503"
    if worker.role == "prefill":
        return "no other prefill worker is left: decode workers compute all prompts, beside their answers"
    return "no other decode worker is left: requests are answered with 503, or whole by prefill workers"


def _dead(worker: WorkerSeen, evidence: Evidence) -> Finding:
    refused = "refused" in worker.answer or "[Errno 111]" in worker.answer
    what = "is dead: nothing listens on its port" if refused else "does not answer: it is stopped, stuck or cut off"
    look = (
        ""
        if refused
        else "check it with: ps -o pid,stat,wchan:20,args -C kvbelt (T: stopped, continue it with kill -CONT PID); "
    )
    port = worker.name.rpartition(":")[2]
    return Finding(
        "dead_worker",
        Severity.ERROR,
        f"{worker.role} worker {worker.name} {what}",
        _without(worker, evidence),
        f"{look}start it again: kvbelt workers restart {worker.name} if kvbelt up runs it, else kvbelt worker --role "
        f"{worker.role} --port {port} …; or remove it: kvbelt workers remove {worker.name}",
        (worker.answer, *([f"the proxy says: {worker.state}, {worker.detail}"] if worker.detail else [])),
    )


def workers_slow(evidence: Evidence) -> Iterator[Finding]:
    """Workers whose ``/health`` is slow."""
    for worker in evidence.workers:
        if worker.answers and worker.seconds is not None and worker.seconds > LATE_SECONDS:
            yield Finding(
                "slow_health",
                Severity.WARNING,
                f"{worker.role} worker {worker.name} takes {worker.seconds:.1f} s to answer /health",
                f"the proxy avoids workers that take more than {LATE_SECONDS:g} s; the process has too little CPU, "
                "or its network is slow",
                "give it more CPU (--threads below its number of cores), or check the network to it",
                (f"median of {len(worker.samples)} answers of /health: {worker.seconds * 1e3:.0f} ms",),
            )
