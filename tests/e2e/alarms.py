"""Seven faults, each done to a running 2p2d under load, and which alerts fire in a real Prometheus, and resolve again.

    python -m tests.e2e.alarms                             # all of them, a table on standard output
    python -m tests.e2e.alarms --only dead-worker,tcp-only
    python -m tests.e2e.alarms --write docs/metrics.md     # the table between the marks in that page

The rules' durations are divided by 60 (tests/e2e/prometheus.py). The slow link needs root and iproute2.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from kvbelt.ops.network import NetworkRefusedError
from kvbelt.ops.tables import table
from tests.e2e.faults import FAULTS, Fault, Patient, patient
from tests.e2e.prometheus import Prometheus

MARKS = "<!-- written by python -m tests.e2e.alarms -->", "<!-- end of the table of faults -->"

#: Longest wait for an alert, and for its end.
_SECONDS = 45.0

#: How long a fault goes on once its alert fires. It is undone while the alert does.
_LASTS = 6.0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _within(condition: Callable[[], object]) -> float | None:
    """Seconds until a condition holds; None: it did not."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < _SECONDS:
        if condition():
            return passed
        time.sleep(0.1)
    return None


def observe(fault: Fault, hurt: Patient, prometheus: Prometheus) -> list[object]:
    """One row: what fired, when, what else, and whether it resolved."""
    _say(f"{fault.name}: {fault.what}")
    if (calm := _within(lambda: fault.alert not in prometheus.firing())) is None:
        return [fault.what, f"`{fault.alert}`", "fires without the fault", "", ""]
    _say(f"  not firing before ({calm:.0f} s)")
    with fault.hurts(hurt):
        # From here on: what the fault does by being done (workers are started again) is not counted.
        others: set[str] = set()
        fired = _within(lambda: fault.alert in prometheus.firing())
        until = time.monotonic() + _LASTS
        while fired is not None and time.monotonic() < until:
            others |= prometheus.firing() - {fault.alert}
            time.sleep(0.2)
        if fired is not None:
            _within(lambda: fault.alert in prometheus.firing())
        undoing = time.monotonic()
    resolved = None if _within(lambda: fault.alert not in prometheus.firing()) is None else time.monotonic() - undoing
    _say(f"  fired {fired}, resolved {resolved}, with {others}")
    return [
        fault.what,
        f"`{fault.alert}`",
        "NO" if fired is None else f"{fired:.0f} s",
        "NO" if resolved is None else f"{resolved:.0f} s",
        ", ".join(f"`{name}`" for name in sorted(others)),
    ]


def run(faults: Sequence[Fault], *, with_network: bool) -> list[list[object]]:
    """The rows of faults that need the same deployment."""
    if not faults:
        return []
    with TemporaryDirectory() as folder:
        path = Path(folder)
        try:
            with (
                patient(path, with_network=with_network) as hurt,
                Prometheus(hurt.deployment.processes, path) as prometheus,
                hurt.traffic(),
            ):
                return [observe(fault, hurt, prometheus) for fault in faults]
        except NetworkRefusedError as error:
            return [[fault.what, f"`{fault.alert}`", f"not tried: {error}", "", ""] for fault in faults]


def main() -> int:
    """Each fault in turn. Status 1 if its alert did not fire, or did not resolve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(fault.name for fault in FAULTS))
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    wanted = [fault for fault in FAULTS if fault.name in arguments.only.split(",")]
    rows = run([fault for fault in wanted if fault.needs_network], with_network=True)
    rows += run([fault for fault in wanted if not fault.needs_network], with_network=False)
    lines = table(["fault", "alert", "fires after", "resolves after", "with it fire"], rows)
    sys.stdout.write("\n".join(lines) + "\n")
    if arguments.write is not None:
        page = arguments.write.read_text(encoding="utf-8")
        begin, end = (page.index(mark) for mark in MARKS)
        page = page[: begin + len(MARKS[0])] + "\n\n" + "\n".join(lines) + "\n\n" + page[end:]
        arguments.write.write_text(page, encoding="utf-8")
    return int(any("NO" in row or "fires without" in str(row[2]) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
