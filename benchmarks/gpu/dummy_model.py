"""Writes the folder of a Llama-3.1-8B without weights, for ``--load-format dummy``, where only speed matters.

    python benchmarks/gpu/dummy_model.py FOLDER
    python benchmarks/gpu/dummy_model.py FOLDER --small    # 8 layers of 1024, with random weights

vLLM's dummy weights are so small that an answer hardly depends on its prompt. The small model's does: wrong KV shows.
The tokenizer is one word a token (``t17``), so that a random text of n words is n tokens.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 128_256

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "use_cache": True,
}


#: What the small model changes. Attention over thousands of tokens is an average; a wider spread keeps it sharp.
SMALL = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "initializer_range": 0.05,
}


def write_weights(folder: Path) -> None:
    """Write the small model's weights, the same at every call."""
    import torch  # noqa: PLC0415 -- seconds
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 -- seconds

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16).save_pretrained(folder)


def write_model(folder: Path, *, small: bool = False) -> None:
    """Write configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))  # noqa: S106 -- a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131_072,
        "bos_token": "t1",
        "eos_token": "t2",
        "unk_token": "t0",
        "pad_token": "t2",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "config.json").write_text(json.dumps(CONFIG | SMALL if small else CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))


if __name__ == "__main__":
    write_model(Path(sys.argv[1]), small="--small" in sys.argv)
    if "--small" in sys.argv:
        write_weights(Path(sys.argv[1]))
