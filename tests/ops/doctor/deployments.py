"""Evidence of healthy deployments, for tests to change."""

from dataclasses import replace

from kvbelt.ops.doctor.checks import diagnose
from kvbelt.ops.doctor.evidence import Evidence, PairSeen, Sample, TrialResult, WorkerSeen
from kvbelt.ops.doctor.finding import Severity
from kvbelt.wire.about import About, LinkTotals, Machine, TransportChoice
from kvbelt.wire.handshake import Compatibility
from kvbelt.wire.layout import KVLayout

LAYOUT = KVLayout(30, 3, 64, 16, "float32", "T2HD", 24576)
FITS = Compatibility(2, "demo", "abc", LAYOUT, 1, 0, "xxh3", "nixl", 3)
HERE = Machine("host", "boot", "net:[1]", 1)
IDLE = Sample(running=1, waiting=0, blocks_total=1000, blocks_free=900, receive_bytes=1 << 29)


def about(role: str, **changes) -> About:
    """A worker on a CPU."""
    given = {
        "role": role,
        "engine": "embedded",
        "kvbelt": "0.2.0",
        "python": "3.11.2",
        "packages": {"nixl": "1.5.1", "torch": "2.13.0"},
        "env": {},
        "machine": HERE,
        "unix_time": 0.0,
        "device": "cpu",
        "buffer_device": "cpu",
        "buffer_bytes": 1 << 29,
        "bytes_per_token": LAYOUT.slot_bytes(1) // 16,
        "max_model_len": 2048,
        "compatibility": FITS,
        "transports": [TransportChoice("intra-node", "write", "host", "cma/memory")] if role == "prefill" else [],
    }
    return About(**(given | changes))


def worker(name: str, role: str, *, samples: tuple[Sample, ...] = (IDLE,) * 4, **changes) -> WorkerSeen:
    """A healthy worker. ``about`` has changes of its description."""
    said = about(role, **changes.pop("about", {}))
    well = WorkerSeen(name, role, "ready", model="demo", answer="", seconds=0.01, status=200, engine_id=f"e-{name}",
                      about=said, samples=samples, skew_seconds=0.0, skew_within=0.005)  # fmt: skip
    return replace(well, **changes)


def pair(prefill: WorkerSeen, decode: WorkerSeen, **changes) -> PairSeen:
    """A pair that carried a trial prompt."""
    link = LinkTotals(decode.engine_id, 6, 3_000_000, 0.003)
    well = PairSeen(prefill.name, decode.name, "warm", link=link, recent=True, trial=TrialResult(True, "received", 0.2))
    return replace(well, **changes)


def deployment(prefill: list[WorkerSeen] | None = None, decode: list[WorkerSeen] | None = None, **changes) -> Evidence:
    """A healthy 1p1d with changes."""
    senders = [worker("p:7100", "prefill")] if prefill is None else prefill
    receivers = [worker("d:7200", "decode")] if decode is None else decode
    pairs = tuple(pair(p, d) for p in senders for d in receivers)
    given = {"workers": (*senders, *receivers), "pairs": pairs, "seconds": 3.0}
    return Evidence("http://127.0.0.1:9100", **(given | changes))


def names(evidence: Evidence) -> list[str]:
    """Names of findings that are not notes, in order."""
    return [finding.name for finding in diagnose(evidence) if finding.severity is not Severity.NOTE]


def finding(evidence: Evidence, name: str):
    """The finding of this name; the test fails without one."""
    found = diagnose(evidence)
    return next(one for one in found if one.name == name)
