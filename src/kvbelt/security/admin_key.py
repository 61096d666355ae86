"""The key of whoever may add and remove workers: a secret word in a file of its owner's alone."""

import os
import re
import secrets
from pathlib import Path

from kvbelt.errors import SettingsError
from kvbelt.security.secret_files import others_may_read

#: What goes into a header as it is, and is too long to guess.
_KEY = re.compile(r"[!-~]{16,256}")


def load_admin_key(path: Path) -> str:
    """Read a key.

    Raises:
        SettingsError: it cannot be read, is not a key, or others may read it.
    """
    try:
        status = path.stat()
        text = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise SettingsError(f"cannot read the admin key {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        text = ""
    if others_may_read(status):
        raise SettingsError(f"{path} holds the admin key and others may read it; run: chmod 600 {path}")
    if not _KEY.fullmatch(text):
        raise SettingsError(
            f"{path} does not hold an admin key: one line of 16 to 256 visible ASCII characters "
            f"(openssl rand -hex 32 > {path})"
        )
    return text


def write_admin_key(path: Path) -> Path:
    """Make a new key, in a file that only its owner can read. Returns the file.

    Raises:
        SettingsError: it cannot be written there, or is there already.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise SettingsError(f"cannot write the admin key {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    return path
