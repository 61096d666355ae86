"""A random Llama of a few megabytes with the tokenizer of a real model, made once and kept in the user's cache.

    python -m tests.random_model SOURCE FOLDER [windows|states]

Its weights are spread widely enough that an answer depends on every block of KV, and that no two tokens are nearly as
likely. Two tensor-parallel ranks can share its heads. KV takes 4 KiB a token. It never chooses a token that is a part
of a character, so that answers can take the first-token path.

With ``windows`` it is a Gemma 3: of each three layers two see ``WINDOW`` tokens only, for which vLLM makes two groups
of layers beside the one that sees all. With ``states`` it is an LFM2, where convolutions keep a state and no KV.
"""

import shutil
import sys
from pathlib import Path

from kvbelt.ops.model_cache import cache_dir, make_once

#: Raised with every change to what is written.
VERSION = 1

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 64}
WINDOW = 80
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}


def random_model_dir(source: Path) -> Path:
    """The folder of the random model with ``source``'s tokenizer."""
    command = [sys.executable, "-m", "tests.random_model", str(source)]
    return make_once(
        cache_dir() / f"random-v{VERSION}", command, "the random model of the tests", print, needed_bytes=0
    )


def write(source: Path, folder: Path, kind: str = "") -> None:
    """Write weights, tokenizer and settings into an existing folder."""
    import torch  # noqa: PLC0415 -- only the child pays for it
    from transformers import (  # noqa: PLC0415
        AutoTokenizer,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        Lfm2Config,
        Lfm2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(11)
    tokenizer = AutoTokenizer.from_pretrained(source)
    vocabulary = len(tokenizer)
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    settings = {"vocab_size": vocabulary, **SIZES, **HEADS, **special, "tie_word_embeddings": False}
    if kind == "windows":
        kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
        more = {"num_hidden_layers": len(kinds), "layer_types": kinds, "sliding_window": WINDOW}
        model = Gemma3ForCausalLM(Gemma3TextConfig(**settings | more, query_pre_attn_scalar=64))
    elif kind == "states":
        # ``conv_dim`` and ``block_dim`` are what vLLM calls the sizes.
        sizes = {"head_dim": 32, "conv_dim": SIZES["hidden_size"], "block_dim": SIZES["hidden_size"]}
        more = {"layer_types": ["conv", "full_attention"] * 2, **sizes}
        model = Lfm2ForCausalLM(Lfm2Config(**settings | more))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    parts = [number for number in range(vocabulary) if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([number])]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
        model.lm_head.weight[parts] = 0
    model.save_pretrained(folder)
    for file in source.iterdir():
        if "token" in file.name or "chat" in file.name:
            shutil.copy(file, folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
