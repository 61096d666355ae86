"""Is everybody there?"""

from collections.abc import Iterator

from kvbelt.ops.doctor.evidence import Evidence, WorkerSeen
from kvbelt.ops.doctor.finding import Finding, Severity

#: The proxy passes a worker over that takes longer to say how it is.
LATE_SECONDS = 0.5


def proxy_answers(evidence: Evidence) -> Iterator[Finding]:
    """Nothing can be seen without the proxy."""
    if evidence.proxy_answer:
        yield Finding(
            "no_proxy",
            Severity.ERROR,
            f"no proxy of kvbelt answers at {evidence.url}",
            "clients get no answer at all, and nothing else can be looked at from here",
            "start it (kvbelt up 1p1d, or kvbelt proxy …), or give its address with --url http://HOST:9100",
            (evidence.proxy_answer,),
        )
    elif not any(worker.state == "ready" for worker in evidence.of("decode")) and not any(
        worker.state == "ready" for worker in evidence.of("both")
    ):
        yield Finding(
            "no_decode_worker",
            Severity.ERROR,
            "no decode worker is ready",
            "every request is answered with 503",
            "start a decode worker, then: kvbelt workers add decode HOST:PORT (or undrain one that is drained)",
            tuple(
                f"{worker.name}: {worker.state}, {worker.standing} {worker.detail}".rstrip()
                for worker in evidence.of("decode")
            ),
        )


def workers_alive(evidence: Evidence) -> Iterator[Finding]:
    """Each worker answers ``/health`` and says that it is ready."""
    for worker in evidence.workers:
        if not worker.answers:
            yield _dead(worker)
        elif worker.status != 200:
            yield Finding(
                "worker_not_ready",
                Severity.WARNING,
                f"{worker.role} worker {worker.name} is there, and takes no requests",
                "the others do its work meanwhile",
                "wait until its model is loaded; if that takes minutes, look at its log",
                (worker.detail or f"/health answered {worker.status}",),
            )
        elif worker.state not in ("ready", "") and worker.standing == "active":
            yield Finding(
                "worker_out_of_sight",
                Severity.ERROR,
                f"{worker.role} worker {worker.name} answers here, and not to the proxy",
                "the proxy sends it nothing: the network between the two is cut, slow, or filtered",
                f"on the proxy's host: curl -m 3 http://{worker.name}/health",
                (f"the proxy says: {worker.state}, {worker.detail}",),
            )


def _dead(worker: WorkerSeen) -> Finding:
    refused = "refused" in worker.answer or "[Errno 111]" in worker.answer
    what = "is dead: nobody listens on its port" if refused else "does not answer: it is stopped, stuck or cut off"
    look = (
        ""
        if refused
        else "look at it with: ps -o pid,stat,wchan:20,args -C kvbelt (T: stopped, go on with kill -CONT PID); "
    )
    port = worker.name.rpartition(":")[2]
    return Finding(
        "dead_worker",
        Severity.ERROR,
        f"{worker.role} worker {worker.name} {what}",
        "its part of the work falls to the others, and what it had is computed again",
        f"{look}start it again: kvbelt worker --role {worker.role} --port {port} … (kvbelt up --restart does that by "
        f"itself), or take it out: kvbelt workers remove {worker.name}",
        (worker.answer, *([f"the proxy says: {worker.state}, {worker.detail}"] if worker.detail else [])),
    )


def workers_slow(evidence: Evidence) -> Iterator[Finding]:
    """Each answers ``/health`` soon enough to be preferred."""
    for worker in evidence.workers:
        if worker.answers and worker.seconds is not None and worker.seconds > LATE_SECONDS:
            yield Finding(
                "slow_health",
                Severity.WARNING,
                f"{worker.role} worker {worker.name} takes {worker.seconds:.1f} s to say how it is",
                f"the proxy passes over whoever takes more than {LATE_SECONDS:g} s; its process has too little CPU, "
                "or its network is slow",
                "give it more CPU (--threads below the number of cores that it has), or look at the network to it",
                (f"median of {len(worker.samples)} answers of /health: {worker.seconds * 1e3:.0f} ms",),
            )
