"""The key that vLLM servers ask for (``--api-key``), with which the proxy and the doctor ask their own questions."""

import re
from pathlib import Path

from kvbelt.security.keys import read_secret

_KEY = re.compile(r"[!-~]{1,4096}")  #: as its server's operator chose it, but valid in a header


def load_worker_api_key(path: Path) -> str:
    """Raises SettingsError: it cannot be read, is not a key, or others may read it."""
    how = "one line of 1 to 4096 visible ASCII characters, the --api-key of the vLLM servers"
    return read_secret(path, "the workers' API key", _KEY, how)
