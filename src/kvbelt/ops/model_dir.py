"""Finds the folder of ``--model``."""

import json
from collections.abc import Callable
from pathlib import Path

from kvbelt.errors import SettingsError
from kvbelt.ops.demo_model import demo_model_dir
from kvbelt.ops.tiny_model import tiny_model_dir

#: Models that kvbelt makes on first use.
_OWN = {"demo": demo_model_dir, "tiny": tiny_model_dir}


def find_model(name: str, progress: Callable[[str], None] = lambda _: None) -> Path:
    """The Hugging Face folder that ``--model`` names; ``demo`` and ``tiny`` are made on first use.

    Raises:
        SettingsError: the folder does not exist, or is not a model's.
    """
    if name in _OWN:
        return _OWN[name](progress)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise SettingsError(
            f"--model {name!r} is not a folder; give a local Hugging Face folder of a causal language model, 'demo' "
            "or 'tiny'"
        )
    config = folder / "config.json"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"--model {name!r} has no config.json; give a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"--model {name!r}: config.json cannot be read: {error}") from None
    return folder.resolve()
