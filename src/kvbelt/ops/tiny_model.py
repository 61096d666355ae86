"""The tiny model: random weights of some hundred kilobytes, one token per character, a chat template.

``kvbelt chaos`` serves it by default: a prompt of a thousand tokens takes one core some tens of ms, so that a short
run on a laptop has thousands of requests. Its weights are wide enough that every answer depends on every token of its
prompt: one wrong byte of KV changes the text.
"""

import string
import sys
from collections.abc import Callable
from pathlib import Path

from kvbelt.ops.extras import require
from kvbelt.ops.model_cache import cache_dir, make_once

#: Raise it with every change to the output.
VERSION = 1

CONTEXT = 4096

#: Standard deviation of each weight matrix. With much less, answers repeat one token; with much more, attention sees
#: only one token.
_SPREAD = 0.25

_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_model_dir(progress: Callable[[str], None]) -> Path:
    """The tiny model's folder, made on first use (some seconds).

    Raises:
        StartError: it could not be made.
    """
    target = cache_dir() / f"tiny-v{VERSION}"
    if not target.is_dir():
        require("the tiny model", "embedded", "torch", "transformers", "tokenizers")
    command = [sys.executable, "-m", "kvbelt.ops.tiny_model"]
    return make_once(target, command, "the tiny random model (once, some seconds)", progress, needed_bytes=5_000_000)


def _write(folder: Path) -> None:
    """Write the folder. Runs in a child process."""
    import torch  # noqa: PLC0415 -- only the child pays for it
    from tokenizers import Tokenizer, decoders, models  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast  # noqa: PLC0415

    # Printable characters only: a token that is half a character would keep answers off the fast path.
    vocabulary = {character: number for number, character in enumerate(string.printable)}
    end, unknown = len(vocabulary), len(vocabulary) + 1
    vocabulary |= {"<end>": end, "<unknown>": unknown}
    characters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unknown>"))  # noqa: S106
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token="<end>",  # noqa: S106
        pad_token="<end>",  # noqa: S106
        unk_token="<unknown>",  # noqa: S106
        chat_template=_CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        eos_token_id=end,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, _SPREAD)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
