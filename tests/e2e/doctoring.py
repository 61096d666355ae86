"""``kvbelt doctor`` as a command."""

import json
import subprocess
import sys
from typing import Any


def doctor(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status and the findings, in order."""
    command = [sys.executable, "-m", "kvbelt", "doctor", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout, done.stderr
    said = json.loads(done.stdout)
    assert said["status"] == done.returncode
    return done.returncode, said["findings"]


def wrong(findings: list[dict[str, Any]]) -> list[str]:
    """Names of the findings that are no notes, in order."""
    return [one["name"] for one in findings if one["severity"] != "note"]
