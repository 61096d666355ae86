"""CURVE keys: their files, and which process a key proves.

The files are ZeroMQ certificates (ZPL), as ``zmq.auth`` and czmq write and read them: ``NAME.key_secret`` holds a
process's own pair, ``NAME.key`` a public key. A deployment is a folder of public keys; these are trusted.

An engine id begins with a fingerprint of its process's key. So a receiver can check a message's sender without
remembering anything.
"""

import hashlib
import os
import re
import stat
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from kvbelt.errors import SettingsError, StartError
from kvbelt.wire.ids import EngineId

#: The name of the proxy's public key in the folder of trusted keys. Workers need it to notify the proxy.
PROXY = "proxy"

SECRET_SUFFIX = ".key_secret"  # noqa: S105 -- how such files are named
PUBLIC_SUFFIX = ".key"

#: A key in ZeroMQ's printable form: 32 bytes in Z85 (https://rfc.zeromq.org/spec/32/).
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_LINE = re.compile(r"^\s*(public-key|secret-key)\s*=\s*(\S+)\s*$")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BANNER = '#   A ZeroMQ CURVE {kind} key of kvbelt.{advice}\n\nmetadata\n    name = "{name}"\ncurve\n'


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A pair in Z85."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Keys:
    own: KeyPair
    trusted: Mapping[str, str]  #: public key to name

    def public_key_of(self, name: str) -> str | None:
        return next((key for key, trusted in self.trusted.items() if trusted == name), None)

    def trusts(self, public: str) -> bool:
        return public in self.trusted


def new_engine_id(keys: Keys | None, incarnation: str = "") -> EngineId:
    """An engine id for this process, with its key's fingerprint. ``incarnation``: instead of a random one."""
    incarnation = incarnation or uuid.uuid4().hex
    return EngineId(incarnation if keys is None else f"{fingerprint(keys.own.public)}-{incarnation}")


def fingerprint(public: str) -> str:
    """16 hexadecimal digits that name a key."""
    return hashlib.sha256(public.encode("ascii")).hexdigest()[:16]


def speaks_for(public: str, engine: str) -> bool:
    """Whether an engine id belongs to a key."""
    return engine.startswith(fingerprint(public) + "-")


def require_curve() -> None:
    """Raises StartError if this libzmq has no CURVE."""
    if not zmq.has("curve"):
        raise StartError(
            f"keys are given, but this libzmq ({zmq.zmq_version()}) was built without CURVE; "
            "install pyzmq's own wheel (pip install --force-reinstall pyzmq)"
        )


def load_keys(key_file: str | Path, trusted_dir: str | Path) -> Keys:
    """Raises SettingsError: a file cannot be read, is not a key, or other users may read or change it."""
    own = _load_pair(Path(key_file))
    trusted: dict[str, str] = {}
    folder = Path(trusted_dir)
    files = sorted(folder.glob(f"*{PUBLIC_SUFFIX}")) if folder.is_dir() else []
    if not files:
        raise SettingsError(
            f"there is no NAME{PUBLIC_SUFFIX} in {folder}; it must be a folder of the deployment's public keys "
            "(kvbelt keys new DIR makes DIR/trusted)"
        )
    if _mode(folder) & stat.S_IWOTH and not _mode(folder) & stat.S_ISVTX:
        raise SettingsError(f"{folder} may be changed by others, who could trust themselves; run: chmod o-w {folder}")
    for file in files:
        if _mode(file) & (stat.S_IWGRP | stat.S_IWOTH):
            raise SettingsError(f"{file} may be changed by others; run: chmod go-w {file}")
        trusted[_entry(file, "public-key")] = file.name.removesuffix(PUBLIC_SUFFIX)
    if len({fingerprint(key) for key in trusted}) != len(trusted):
        raise SettingsError(f"two keys in {folder} have one fingerprint; make new ones")
    return Keys(own, trusted)


def new_key_pair() -> KeyPair:
    require_curve()
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode("ascii"), secret.decode("ascii"))


def secret_file(directory: Path, name: str) -> Path:
    return directory / f"{name}{SECRET_SUFFIX}"


def trusted_folder(directory: Path) -> Path:
    return directory / "trusted"


def write_new_keys(directory: Path, names: list[str]) -> list[Path]:
    """Make a pair for each name: ``DIR/NAME.key_secret`` (mode 0600) and ``DIR/trusted/NAME.key``. Returns the files.

    Raises SettingsError: a name is no file name, its key exists, or nothing can be written; StartError: no CURVE.
    """
    trusted = trusted_folder(directory)
    for name in names:
        if not _NAME.fullmatch(name):
            raise SettingsError(f"{name!r} is not a name of a key; use letters, digits, '.', '-' and '_'")
        for file in (secret_file(directory, name), trusted / f"{name}{PUBLIC_SUFFIX}"):
            if file.exists():
                raise SettingsError(f"{file} exists already; remove it, or choose another name or folder")
    written = []
    try:
        for folder in (directory, trusted):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            pair = new_key_pair()
            public = f'    public-key = "{pair.public}"\n'
            advice = " Keep it secret: a reader of this file can act as this process."
            text = _BANNER.format(kind="SECRET", name=name, advice=advice) + public
            written.append(_write(secret_file(directory, name), text + f'    secret-key = "{pair.secret}"\n', 0o600))
            text = _BANNER.format(kind="public", name=name, advice="") + public
            written.append(_write(trusted / f"{name}{PUBLIC_SUFFIX}", text, 0o644))
    except OSError as error:
        raise SettingsError(f"cannot write {error.filename}: {error.strerror}") from None
    return written


def _write(path: Path, text: str, mode: int) -> Path:
    # Created with its mode, so that other users can read it at no moment. Never overwrites a file.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    return path


def _load_pair(path: Path) -> KeyPair:
    public, secret = _entry(path, "public-key"), _entry(path, "secret-key")
    if others_may_read(_status(path)):
        raise SettingsError(f"{path} holds a secret key and others may read it; run: chmod 600 {path}")
    try:
        fits = zmq.curve_public(secret.encode("ascii")).decode("ascii") == public
    except zmq.ZMQError:
        fits = True  # cannot be checked without CURVE, which require_curve refuses
    if not fits:
        raise SettingsError(f"{path}: its public-key does not belong to its secret-key; make a new pair")
    return KeyPair(public, secret)


def _entry(path: Path, name: str) -> str:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise SettingsError(f"cannot read the key file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not a key file: it is not text") from None
    for line in lines:
        found = _LINE.match(line)
        if found and found[1] == name:
            key = found[2].strip("\"'")
            if not _KEY.fullmatch(key):
                raise SettingsError(f"{path}: {name} is not a key; it must be 40 characters of Z85")
            return key
    what = "a public key" if name == "public-key" else f"a secret key (a *{SECRET_SUFFIX} file)"
    raise SettingsError(f"{path} does not hold {what}")


def others_may_read(status: os.stat_result, user: int | None = None) -> bool:
    """Whether users other than the file's owner may read or change it.

    For a process that is not root, a file of root's may be readable by a group: Kubernetes mounts Secrets so
    (``fsGroup``), and PostgreSQL accepts the same for its private keys. ``user``: of the process; None: ask.
    """
    user = os.geteuid() if user is None else user
    by_group = stat.S_IRGRP if status.st_uid == 0 != user else 0
    return bool(stat.S_IMODE(status.st_mode) & (stat.S_IRWXG | stat.S_IRWXO) & ~by_group)


def read_secret(path: Path, what: str, valid: re.Pattern[str], how: str) -> str:
    """The one line of a file that only its owner can read.

    Args:
        path: of the file.
        what: it holds, for people: ``the admin key``.
        valid: what the line must be.
        how: a valid line looks, and where to get one, for people.

    Raises:
        SettingsError: it cannot be read, is no such line, or others may read it.
    """
    try:
        status = path.stat()
        text = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise SettingsError(f"cannot read {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        text = ""
    if others_may_read(status):
        raise SettingsError(f"{path} holds {what} and others may read it; run: chmod 600 {path}")
    if not valid.fullmatch(text):
        raise SettingsError(f"{path} does not hold {what}: {how}")
    return text


def _mode(path: Path) -> int:
    return _status(path).st_mode


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
