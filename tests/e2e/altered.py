"""Stands before ``kvbelt`` in a deployment's commands: a worker that is started again may be started differently.

The file that ``KVBELT_TEST_ALTERATIONS`` names says how, by the worker's port: further variables of its environment,
and other values of its options. Without an entry it is started as it was meant to be.
"""

import json
import os
import sys
from pathlib import Path

VARIABLE = "KVBELT_TEST_ALTERATIONS"


def main() -> None:
    """Become kvbelt."""
    arguments = sys.argv[1:]
    port = arguments[arguments.index("--port") + 1]
    file = Path(os.environ[VARIABLE])
    altered = json.loads(file.read_text(encoding="utf-8")).get(port, {}) if file.exists() else {}
    for option, value in altered.get("options", {}).items():
        arguments[arguments.index(option) + 1] = value
    os.environ.update(altered.get("env", {}))
    os.execv(sys.executable, [sys.executable, "-m", "kvbelt", *arguments])  # noqa: S606 -- pids stay true


if __name__ == "__main__":
    main()
