"""Writes a random Llama whose heads two tensor-parallel ranks can share, with the tokenizer of a real model.

    python tests/vllm/random_model.py SOURCE FOLDER

Its weights are spread widely enough that an answer depends on every block of KV, and that no two tokens are nearly as
likely.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def write(source: Path, folder: Path) -> None:
    """Whole or not at all."""
    if folder.is_dir():
        return
    torch.manual_seed(11)
    vocabulary = len(AutoTokenizer.from_pretrained(source))
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    config = LlamaConfig(vocab_size=vocabulary, **sizes, **heads, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for file in source.iterdir():
        if "token" in file.name or "chat" in file.name or file.name == "generation_config.json":
            shutil.copy(file, partial)
    partial.rename(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
