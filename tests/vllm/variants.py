"""A model that thinks, and adapters of it: what the demo model has not.

    python -m tests.vllm.variants RANDOM-MODEL FOLDER

``FOLDER/model`` is the random model with ``<think>`` and ``</think>`` in its vocabulary, and with a chat template that
ends the reasoning in the prompt where ``enable_thinking`` is false. ``FOLDER/adapter-a`` and ``-b`` change its answers.
"""

import sys
from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
RANK = 4


def write(source: Path, folder: Path) -> None:
    import torch  # noqa: PLC0415 -- the tests take only the names above
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    torch.manual_seed(5)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(source)
    # A multiple of 64, as vLLM pads it: rows without a token are never chosen.
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] = 0
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name in ("a", "b"):
        _write_adapter(model, folder / f"adapter-{name}")


def _write_adapter(model: "torch.nn.Module", folder: Path) -> None:  # type: ignore[name-defined] # noqa: F821
    import json  # noqa: PLC0415

    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    folder.mkdir(parents=True)
    weights = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            inner = f"base_model.model.{name}"
            weights[f"{inner}.lora_A.weight"] = torch.randn(RANK, module.in_features) * 0.2
            weights[f"{inner}.lora_B.weight"] = torch.randn(module.out_features, RANK) * 0.2
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "v_proj"]}
    config |= {"bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
