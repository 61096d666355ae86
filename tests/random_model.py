"""A random Llama of a few megabytes with the tokenizer of a real model, made once and kept in the user's cache.

    python -m tests.random_model SOURCE FOLDER [windows|states|drafted]

Its weights are spread widely enough that an answer depends on every block of KV, and that no two tokens are nearly as
likely. Two tensor-parallel ranks can share its heads. KV takes 4 KiB a token. It never chooses a token that is a part
of a character, so that answers can take the first-token path.

With ``windows`` it is a Gemma 3: of each three layers two see ``WINDOW`` tokens only, for which vLLM makes two groups
of layers beside the one that sees all. With ``states`` it is an LFM2, where convolutions keep a state and no KV.

With ``drafted`` it has one layer, and ``FOLDER/eagle`` has a drafter for it, of EAGLE's kind: the same layer over the
next token, which has the target's answer but for what the first token adds. Both keep KV.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvbelt.ops.model_cache import cache_dir, make_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        more = {"num_hidden_layers": 1} if kind == "drafted" else {}
        model = LlamaForCausalLM(LlamaConfig(**settings | more))
    parts = [number for number in range(vocabulary) if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([number])]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
        model.lm_head.weight[parts] = 0
        if kind == "drafted":
            # EAGLE has no norm before its layer: these embeddings are what the target's norm makes of them.
            weights = model.model.embed_tokens.weight.normal_(0, 1)
            weights /= weights.pow(2).mean(-1, keepdim=True).sqrt()
            # Beside them attention must weigh more, or the drafter would do without the prompt.
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(model.model.layers[0].self_attn, name).weight.normal_(0, 0.2)
            _write_eagle(model, folder / "eagle")
    model.save_pretrained(folder)
    for file in source.iterdir():
        if "token" in file.name or "chat" in file.name:
            shutil.copy(file, folder)


def _write_eagle(target: "PreTrainedModel", folder: Path) -> None:
    """A drafter that passes the next token's embedding, and nothing of the hidden state, to the target's layer."""
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    layer = "model.layers.0."
    named = target.state_dict().items()
    weights = {
        name.removeprefix("model."): weight
        for name, weight in named
        if name.startswith(layer) and name != f"{layer}input_layernorm.weight"
    }
    size = SIZES["hidden_size"]
    weights["fc.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], 1)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = target.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
