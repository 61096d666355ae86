"""The admin key, which allows to add and remove workers: one line in a file that only its owner can read."""

import os
import re
import secrets
from pathlib import Path

from kvbelt.errors import SettingsError
from kvbelt.security.keys import read_secret

_KEY = re.compile(r"[!-~]{16,256}")  #: valid in a header, and too long to guess


def load_admin_key(path: Path) -> str:
    """Raises SettingsError: it cannot be read, is not a key, or others may read it."""
    how = f"one line of 16 to 256 visible ASCII characters (openssl rand -hex 32 > {path})"
    return read_secret(path, "the admin key", _KEY, how)


def write_admin_key(path: Path) -> Path:
    """Write a new key. Raises SettingsError: it cannot be written there, or is there already."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise SettingsError(f"cannot write the admin key {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    return path
