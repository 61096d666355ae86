"""A model's fingerprint: equal for copies of one folder, different for different weights.

Hashing gigabytes would take longer than loading them, so of each tensor only its name, type, shape and three samples of
1 KiB are hashed. Two fine-tunings of one model differ in practically every such sample. Small files that change answers
(configuration, tokenizer, chat template, generation settings) are hashed whole.
"""

import hashlib
import json
import os
import struct
from pathlib import Path

_SAMPLE_BYTES = 1024
_OPAQUE_SAMPLES = 512  #: samples of a weights file whose structure is not read
#: The place and version of a folder's saving change no answer.
_IRRELEVANT_KEYS = ("_name_or_path", "transformers_version")
_SMALL_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def fingerprint(model_dir: Path) -> str:
    """32 hexadecimal digits, in under a second. Raises OSError; ValueError: a file is malformed."""
    digest = hashlib.sha256()
    config = json.loads((model_dir / "config.json").read_bytes())
    for key in _IRRELEVANT_KEYS:
        config.pop(key, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for name in _SMALL_FILES:
        path = model_dir / name
        if path.is_file():
            digest.update(f"\0{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    for path in sorted(model_dir.glob("*.safetensors")):
        _add_safetensors(digest, path)
    for path in sorted(model_dir.glob("pytorch_model*.bin")):
        _add_opaque(digest, path)
    return digest.hexdigest()[:32]


def adapter_fingerprint(folder: Path) -> str:
    """Of a LoRA adapter's folder, as above."""
    digest = hashlib.sha256((folder / "adapter_config.json").read_bytes())
    for path in sorted(folder.glob("adapter_model*.safetensors")):
        _add_safetensors(digest, path)
    for path in sorted(folder.glob("adapter_model*.bin")):
        _add_opaque(digest, path)
    return digest.hexdigest()[:32]


def _add_safetensors(digest: "hashlib._Hash", path: Path) -> None:
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path.name} is not a safetensors file: it has {len(prefix)} bytes")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > path.stat().st_size:
            raise ValueError(f"{path.name} is not a safetensors file: its header does not fit into it")
        header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        # Neither the file's name nor the offsets. The same tensors in other shards count as another model, unless their
        # order is the same; that is rare.
        for name in sorted(header):
            entry = header[name]
            digest.update(f"\0{name}:{entry['dtype']}:{entry['shape']}".encode())
            first, end = entry["data_offsets"]
            size = end - first
            for at in sorted({0, max(0, size // 2 - _SAMPLE_BYTES), max(0, size - _SAMPLE_BYTES)}):
                length = min(_SAMPLE_BYTES, size - at)
                digest.update(os.pread(file.fileno(), length, 8 + header_bytes + first + at))


def _add_opaque(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"\0{path.name}:{size}".encode())
    stride = max(_SAMPLE_BYTES, size // _OPAQUE_SAMPLES)
    with path.open("rb") as file:
        for at in range(0, size, stride):
            digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, at))
