"""Is it the same software everywhere, and the same time?"""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from kvbelt.ops.doctor.evidence import Evidence
from kvbelt.ops.doctor.finding import Finding, Severity
from kvbelt.wire.about import About

#: Clocks further apart make logs of two hosts hard to put side by side.
SKEW_SECONDS = 1.0

#: Of these a difference between two workers is known to matter, or not promised not to.
_CARRIERS = ("nixl", "mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda")


def _abouts(evidence: Evidence) -> Iterator[tuple[str, About]]:
    if evidence.proxy_about is not None:
        yield "the proxy", evidence.proxy_about
    for worker in evidence.workers:
        if worker.about is not None:
            yield f"{worker.role} {worker.name}", worker.about


def _by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for who, value in values.items():
        found[value].append(who)
    return found


def _lines(found: Mapping[str, list[str]]) -> tuple[str, ...]:
    return tuple(f"{value or 'unset'}: {', '.join(who)}" for value, who in sorted(found.items()))


def kvbelt_equal(evidence: Evidence) -> Iterator[Finding]:
    """One kvbelt."""
    found = _by_value({who: about.kvbelt for who, about in _abouts(evidence)})
    if len(found) > 1:
        yield Finding(
            "kvbelt_versions",
            Severity.WARNING,
            f"{len(found)} versions of kvbelt meet in this deployment",
            "two of another protocol refuse each other; others work, and were not tested together",
            "pip install the same version everywhere: pip install kvbelt==" + max(found),
            _lines(found),
        )


def carriers_equal(evidence: Evidence) -> Iterator[Finding]:
    """One carrier, of one version; and what else differs, for whoever looks for a difference."""
    workers = [(who, about) for who, about in _abouts(evidence) if about.role != "proxy"]
    for name in _CARRIERS:
        found = _by_value({who: about.packages.get(name, "") for who, about in workers})
        if len(found) > 1:
            yield Finding(
                "carrier_versions",
                Severity.WARNING,
                f"{len(found)} versions of {name} meet in this deployment",
                "what it says on the wire is not promised to fit between versions",
                f"pip install the same version everywhere: pip install {name}==" + max(found),
                _lines(found),
            )
    for name in ("torch", "transformers", "vllm"):
        found = _by_value({who: about.packages.get(name, "") for who, about in workers})
        if len(found) > 1:
            yield Finding(
                "package_versions",
                Severity.NOTE,
                f"{len(found)} versions of {name} meet in this deployment",
                "KV is compared by model and layout; small differences of numbers between versions are not noticed",
                f"pip install the same {name} everywhere",
                _lines(found),
            )
    pythons = _by_value({who: ".".join(about.python.split(".")[:2]) for who, about in workers})
    if len(pythons) > 1:
        yield Finding(
            "python_versions",
            Severity.NOTE,
            f"{len(pythons)} versions of Python meet",
            "nothing of it travels",
            "",
            _lines(pythons),
        )


def hash_seeds(evidence: Evidence) -> Iterator[Finding]:
    """PYTHONHASHSEED (the seed's anti-pattern 2)."""
    workers = [(who, about) for who, about in _abouts(evidence) if about.role != "proxy"]
    found = _by_value({who: about.env.get("PYTHONHASHSEED", "") for who, about in workers})
    if len(found) < 2:
        return
    vllm = any(about.engine == "vllm" for _, about in workers)
    yield Finding(
        "hash_seeds",
        Severity.WARNING if vllm else Severity.NOTE,
        "PYTHONHASHSEED differs between the workers",
        "kvbelt names KV blocks by hashes of its own, which do not depend on it, so no KV is missed"
        + (
            "; vLLM's own block hashes do, and whatever compares those between servers (a router, a KV store) misses"
            if vllm
            else ""
        ),
        "export PYTHONHASHSEED=0 before every worker's start",
        _lines(found),
    )


def clocks(evidence: Evidence) -> Iterator[Finding]:
    """One time."""
    for worker in evidence.workers:
        if worker.skew_seconds is None or abs(worker.skew_seconds) - worker.skew_within <= SKEW_SECONDS:
            continue
        ahead = "ahead of" if worker.skew_seconds > 0 else "behind"
        yield Finding(
            "clock_skew",
            Severity.WARNING,
            f"the clock of {worker.role} worker {worker.name} is {abs(worker.skew_seconds):.1f} s {ahead} this host's",
            "deadlines travel as time that is left, so requests do not suffer; logs, traces and metrics of the two "
            "hosts do not line up",
            "on that host: timedatectl set-ntp true (or start chronyd)",
            (f"{worker.skew_seconds:+.2f} s, give or take {worker.skew_within:.2f}",),
        )
