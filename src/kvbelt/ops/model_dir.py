"""Finds the folder of ``--model``."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kvbelt.errors import SettingsError
from kvbelt.ops.demo_model import demo_model_dir
from kvbelt.ops.tiny_model import tiny_model_dir

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")

#: Prints the folder of a model, or why there is none.
_FETCH = """
import sys
from huggingface_hub import snapshot_download
name = sys.argv[1]
try:
    print(snapshot_download(name, local_files_only=True))
except Exception:
    try:
        print(snapshot_download(name, ignore_patterns=["original/*", "*.gguf", "*.pth", "*.onnx"]))
    except Exception as error:
        print(f"{type(error).__name__}: {error}".partition("\\n")[0])
        sys.exit(1)
"""

#: Models that kvbelt makes on first use.
_OWN = {"demo": demo_model_dir, "tiny": tiny_model_dir}

#: Their parameters, which are known before they are made.
PARAMETERS = {"demo": 134_515_008, "tiny": 185_664}


def find_model(name: str, progress: Callable[[str], None] = lambda _: None) -> Path:
    """The Hugging Face folder that ``--model`` names; ``demo`` and ``tiny`` are made on first use.

    A name on the hub (``org/model``) is taken from Hugging Face's cache, or fetched into it.

    Raises:
        SettingsError: the folder does not exist, or is not a model's, or the hub does not give it.
    """
    if name in _OWN:
        return _OWN[name](progress)
    folder = Path(name).expanduser()
    if not folder.is_dir() and _HUB_NAME.fullmatch(name):
        folder = _from_hub(name, progress)
    if not folder.is_dir():
        raise SettingsError(
            f"--model {name!r} is not a folder; give a local Hugging Face folder of a causal language model, a name on "
            "its hub, 'demo' or 'tiny'"
        )
    config = folder / "config.json"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"--model {name!r} has no config.json; give a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"--model {name!r}: config.json cannot be read: {error}") from None
    return folder.resolve()


def _from_hub(name: str, progress: Callable[[str], None]) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise SettingsError(f"--model {name!r} is no folder, and its hub needs: pip install huggingface_hub")
    progress(f"looking for {name} in Hugging Face's cache, then on its hub")
    # A child, so that the launcher stays small. Its progress bars go to standard error.
    child = subprocess.run([sys.executable, "-c", _FETCH, name], stdout=subprocess.PIPE, text=True, check=False)
    said = child.stdout.strip()
    if child.returncode != 0:
        raise SettingsError(
            f"--model {name!r} is no folder, and the hub does not give it: {said or 'no reason'}; a gated model needs "
            "HF_TOKEN"
        )
    return Path(said)
