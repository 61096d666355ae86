"""Checks for packages that a command needs beyond the base installation.

If one is missing, the command reports the extra to install before it starts anything.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from kvbelt.errors import StartError

#: Every worker with the embedded engine imports these. NIXL is only needed where it is the channel.
_EMBEDDED = ("torch", "transformers", "jinja2", "starlette", "uvicorn")


def require(what: str, extra: str, *modules: str) -> None:
    """Raise StartError if one of the modules is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise StartError(
            f"{what} needs packages that are missing ({', '.join(missing)}): pip install 'kvbelt[{extra}]'"
        )


def require_engine(what: str, engine: str) -> None:
    """Raise StartError if workers with this engine, ``embedded`` or ``vllm``, cannot run here."""
    if engine == "embedded":
        require(what, "embedded", *_EMBEDDED)
        return
    if importlib.util.find_spec("vllm") is None:
        raise StartError(
            f"{what} needs vLLM, which {sys.executable} does not have; docs/vllm.md says how to install it"
        )
    require(what, "vllm", "nixl")


#: Prints which of the modules that a vLLM server needs are missing, and torch's version. Run by another Python.
_LOOK = """
import importlib.metadata, importlib.util, json
missing = [name for name in ("vllm", "kvbelt", "nixl") if importlib.util.find_spec(name) is None]
print(json.dumps([missing, "" if missing else importlib.metadata.version("torch")]))
"""


def require_vllm_of(python: Path) -> str:
    """The version of torch in another Python's environment, which has what vLLM servers need.

    Raises:
        StartError: it is no Python, or one without vLLM or kvbelt.
    """
    try:
        # Not from the working directory (-P): a folder there may be called vllm.
        ran = subprocess.run([python, "-P", "-c", _LOOK], capture_output=True, text=True, check=False)
        missing, torch = json.loads(ran.stdout)
    except OSError as error:
        raise StartError(f"--vllm-python {python} cannot be run: {error.strerror}; {_NAME_IT}") from None
    except ValueError:
        said = (ran.stderr or ran.stdout).strip().rpartition("\n")[2] or "nothing"
        raise StartError(f"--vllm-python {python} says {said!r} instead of what it has; {_NAME_IT}") from None
    if missing:
        what = "'kvbelt[vllm]'" + (" in an environment with vLLM" if "vllm" in missing else "")
        raise StartError(
            f"--vllm-python {python} has not what vLLM servers need ({', '.join(missing)}): "
            f"{python} -m pip install {what}"
        )
    return str(torch)


_NAME_IT = "name the interpreter of vLLM's environment, such as /opt/vllm/bin/python"
