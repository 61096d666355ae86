"""What ``kvbelt doctor`` says first of each of the seven faults in faults.py.

    python -m tests.e2e.diagnoses                                   # all of them, a table on standard output
    python -m tests.e2e.diagnoses --only slow-link,dead-worker
    python -m tests.e2e.diagnoses --write docs/troubleshooting.md   # the table between the marks in that page

A 2p2d of the tiny model on this machine under some traffic; the slow link needs root and iproute2.
"""

import argparse
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import httpx

from kvbelt.ops.tables import table
from tests.e2e.asking import until
from tests.e2e.faults import FAULTS, Fault, Patient, patient

MARKS = "<!-- diagnoses: written by python -m tests.e2e.diagnoses -->", "<!-- end of diagnoses -->"

#: The finding that each must be called by.
NAMES = {
    "slow-link": "slow_link",
    "tcp-only": "ucx_tls",
    "full-buffer": "buffer_full",
    "overloaded-prefill": "prefill_overloaded",
    "overloaded-decode": "decode_overloaded",
    "mixed-models": "mixed_models",
    "dead-worker": "dead_worker",
}

#: What a fault gets to show, before the doctor looks once.
SETTLE_SECONDS = 10.0


def diagnose(url: str) -> list[dict[str, Any]]:
    """What ``kvbelt doctor`` finds there."""
    command = [sys.executable, "-m", "kvbelt", "doctor", "--json", "--url", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return found


def _well(hurt: Patient) -> bool:
    """Whether every worker is ready and has few waiting requests."""
    try:
        said = httpx.get(f"{hurt.deployment.url}/health", timeout=10).json()
    except httpx.HTTPError:
        return False
    return all(
        worker["state"] == "ready" and not worker["warming"] and worker["load"]["waiting"] < 3
        for worker in said["workers"]
    )


def _row(hurt: Patient, fault: Fault, reports: Path | None) -> tuple[bool, list[str]]:
    """Inject a fault, run the doctor, heal it. Returns whether the doctor named it, and its row of the table."""
    until(lambda: _well(hurt), within=90, what="a deployment that is well")
    with fault.hurts(hurt):
        Event().wait(SETTLE_SECONDS)
        if reports is not None:
            reports.mkdir(parents=True, exist_ok=True)
            with (reports / f"{fault.name}.txt").open("wb") as report:
                command = [sys.executable, "-m", "kvbelt", "doctor", "--url", hurt.deployment.url]
                subprocess.run(command, stdout=report, check=False)
        found = diagnose(hurt.deployment.url)
    first = found[0]
    right = first["name"] == NAMES[fault.name]
    if not right:
        sys.stderr.write(json.dumps(found, indent=1) + "\n")
    others = ", ".join(f"`{one['name']}`" for one in found[1:] if one["severity"] != "note")
    # Addresses of a run on free ports mean nothing to a reader.
    seen = re.sub(r"\b\d+\.\d+\.\d+\.\d+:\d+", "…", first["evidence"][0] if first["evidence"] else "")
    shown = textwrap.shorten(seen, 110, placeholder=" …").replace("|", "\\|")
    return right, [fault.what, f"`{first['name']}` ({first['severity']})", shown, others]


def main() -> int:
    """Each fault in turn. Status 1 if one was called by another name first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--reports", type=Path, metavar="DIR", help="write the whole report of each there")
    arguments = parser.parse_args()
    wanted = [fault for fault in FAULTS if fault.name in arguments.only.split(",")]
    rows, right = {}, True
    for with_network in (True, False):
        mine = [fault for fault in wanted if fault.needs_network is with_network]
        if not mine:
            continue
        with TemporaryDirectory() as folder, patient(Path(folder), with_network=with_network) as hurt, hurt.traffic():
            for fault in mine:
                sys.stderr.write(f"{fault.name}: {fault.what}\n")
                named, rows[fault.name] = _row(hurt, fault, arguments.reports)
                right = right and named
    head = ["fault", "doctor's first finding", "the first thing that it saw", "then"]
    lines = table(head, [rows[fault.name] for fault in wanted])
    sys.stdout.write("\n".join(lines) + "\n")
    if arguments.write is not None:
        page = arguments.write.read_text(encoding="utf-8")
        begin, end = (page.index(mark) for mark in MARKS)
        page = page[: begin + len(MARKS[0])] + "\n" + "\n".join(lines) + "\n" + page[end:]
        arguments.write.write_text(page, encoding="utf-8")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
