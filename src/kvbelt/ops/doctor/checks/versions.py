"""Versions and clocks of the processes."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from kvbelt.ops.doctor.evidence import Evidence
from kvbelt.ops.doctor.finding import Finding, Severity
from kvbelt.wire.about import About

#: With a larger difference, the logs of two hosts do not line up.
SKEW_SECONDS = 1.0

#: Channels whose versions may not work together.
_CARRIERS = ("nixl", "mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda")


def _by_value(evidence: Evidence, value_of: Callable[[About], str], *, proxy: bool = False) -> dict[str, list[str]]:
    """The processes with each value. Those that do not describe themselves are left out."""
    found: dict[str, list[str]] = defaultdict(list)
    if proxy and evidence.proxy_about is not None:
        found[value_of(evidence.proxy_about)].append("the proxy")
    for worker in evidence.workers:
        if worker.about is not None:
            found[value_of(worker.about)].append(f"{worker.role} {worker.name}")
    return found


def _version(package: str, about: About) -> str:
    return about.packages.get(package, "")


def _lines(found: Mapping[str, list[str]]) -> tuple[str, ...]:
    return tuple(f"{value or 'unset'}: {', '.join(who)}" for value, who in sorted(found.items()))


def _several(
    finding: str, severity: Severity, package: str, found: Mapping[str, list[str]], *, why: str, change: str = ""
) -> Iterator[Finding]:
    """A finding if there are several versions of a package."""
    if len(found) > 1:
        what = f"{len(found)} versions of {package} run in this deployment"
        yield Finding(finding, severity, what, why, change, _lines(found))


def kvbelt_equal(evidence: Evidence) -> Iterator[Finding]:
    found = _by_value(evidence, lambda about: about.kvbelt, proxy=True)
    why = "workers with different protocols refuse each other; others are not tested together"
    change = f"pip install the same version everywhere: pip install kvbelt=={max(found, default='')}"
    yield from _several("kvbelt_versions", Severity.WARNING, "kvbelt", found, why=why, change=change)


def messages_readable(evidence: Evidence) -> Iterator[Finding]:
    """Messages without a field of their contract."""
    if evidence.unreadable:
        yield Finding(
            "unreadable_message",
            Severity.WARNING,
            "some processes answer with messages that this kvbelt cannot read",
            "they run another version of kvbelt, and this diagnosis leaves out what those messages say",
            "install one version of kvbelt everywhere, here too",
            evidence.unreadable,
        )


def carriers_equal(evidence: Evidence) -> Iterator[Finding]:
    """Versions of the channel; other packages as notes."""
    for name in _CARRIERS:
        found = _by_value(evidence, partial(_version, name))
        change = f"pip install the same version everywhere: pip install {name}=={max(found, default='')}"
        why = "its wire format may differ between versions"
        yield from _several("carrier_versions", Severity.WARNING, name, found, why=why, change=change)
    for name in ("torch", "transformers", "vllm"):
        found = _by_value(evidence, partial(_version, name))
        why = "the handshake compares model and layout, not numerical differences between versions"
        change = f"pip install the same {name} everywhere"
        yield from _several("package_versions", Severity.NOTE, name, found, why=why, change=change)
    found = _by_value(evidence, lambda about: ".".join(about.python.split(".")[:2]))
    yield from _several("python_versions", Severity.NOTE, "Python", found, why="it does not affect transfers")


def hash_seeds(evidence: Evidence) -> Iterator[Finding]:
    """PYTHONHASHSEED (the seed's anti-pattern 2)."""
    found = _by_value(evidence, lambda about: about.env.get("PYTHONHASHSEED", ""))
    if len(found) < 2:
        return
    why = "kvbelt's own block hashes do not depend on it, so no KV is missed"
    vllm = any(worker.about is not None and worker.about.engine == "vllm" for worker in evidence.workers)
    if vllm:
        why += "; vLLM's block hashes do: a router or KV store that compares them between servers finds no matches"
    yield Finding(
        "hash_seeds",
        Severity.WARNING if vllm else Severity.NOTE,
        "PYTHONHASHSEED differs between the workers",
        why,
        "export PYTHONHASHSEED=0 before every worker's start",
        _lines(found),
    )


def clocks(evidence: Evidence) -> Iterator[Finding]:
    """Clocks that differ."""
    for worker in evidence.workers:
        if worker.skew_seconds is None or abs(worker.skew_seconds) - worker.skew_within <= SKEW_SECONDS:
            continue
        ahead = "ahead of" if worker.skew_seconds > 0 else "behind"
        yield Finding(
            "clock_skew",
            Severity.WARNING,
            f"the clock of {worker.role} worker {worker.name} is {abs(worker.skew_seconds):.1f} s {ahead} this host's",
            "requests are not affected, because deadlines are sent as remaining time; but logs, traces and metrics of "
            "the two hosts do not line up",
            "on that host: timedatectl set-ntp true (or start chronyd)",
            (f"{worker.skew_seconds:+.2f} s, ± {worker.skew_within:.2f} s",),
        )
