"""A causal language model from a local Hugging Face folder, running on our paged attention.

A model can be served if its attention goes through transformers' ``AttentionInterface`` and keeps ordinary keys and
values. A model with another attention (soft caps, sinks, latent or linear attention, ALiBi) would compute wrong tokens
without any error. So every model is tested at start: a few tokens go through it once with transformers' own attention,
and in two chunks through a small pool of ours, and the logits must agree. They must not change either when a token far
behind, beyond each length at which the model may switch, is in the same step. Otherwise the model is refused with a
ModelError.
"""

import ctypes
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from kvbelt.engine import attention
from kvbelt.engine.api import ModelError
from kvbelt.engine.attention import LayerListener, Segment, Step
from kvbelt.engine.pool import KVPool, PoolLayout
from kvbelt.engine.rope import settle_longrope, switches
from kvbelt.engine.unsupported import unsupported

#: Tokens of the test at start: two chunks, in more than one block.
_PROOF_TOKENS = 12
_PROOF_BLOCK = 4
_PROOF_FARTHEST = 16384  #: a token's position; a farther one would take too much memory
#: Largest difference of the test's logits, relative to their spread. Another order of summation makes a difference of
#: 1e-5 in fp32 and 1e-2 in bf16; a soft cap or a wrong mask makes a far larger one.
_PROOF_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


class PagedModel:
    """The model, its tokenizer, and one packed forward pass.

    Attributes:
        config: the text model's transformers configuration.
        tokenizer: the folder's tokenizer.
        eos_token_ids: tokens that end an answer, the tokenizer's first.
        context: most tokens that the model was trained for.
        variant: tells its KV from that of the same model elsewhere; usually empty.
    """

    def __init__(
        self, model_dir: Path, device: torch.device, dtype: torch.dtype | None, most_tokens: int | None = None
    ) -> None:
        """Load the model, move it to the device, and test it. ``most_tokens``: of a request, if not the context.

        Raises:
            ModelError: the folder is missing or unreadable, or holds a model that this engine cannot serve.
        """
        _check_folder(model_dir)
        try:
            whole_config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
            _check_config(whole_config)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
            transformers_logging.disable_progress_bar()
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                model_dir,
                local_files_only=True,
                dtype="auto" if dtype is None else dtype,
                attn_implementation="eager",  # every model has it, and only the test uses it
            )
        except ModelError:
            raise
        except Exception as error:  # transformers raises whatever its loaders raise
            raise ModelError(f"the model in {model_dir} cannot be loaded: {error}") from error
        self._model.eval().requires_grad_(False)
        self._model.to(device)
        self.device = device
        self.dtype: torch.dtype = self._model.dtype
        if self.dtype not in _PROOF_TOLERANCE:
            raise ModelError(f"the model's dtype is {self.dtype}; choose float32 or bfloat16")
        self.config: Any = self._model.config.get_text_config(decoder=True)
        self.vocab_size: int = self.config.vocab_size
        self.context: int = getattr(self.config, "max_position_embeddings", None) or 2048
        rope = settle_longrope(self._model, most_tokens or self.context)
        self.variant = f"-{rope}rope" if rope else ""
        self.eos_token_ids = _eos_token_ids(self.tokenizer, self._model)
        if device.type == "cpu" and self.dtype is torch.float32:
            _store_inputs_first(self._model)
        try:
            self._prove_rows(self._prove())
            _return_freed_memory()
        except ModelError as error:
            raise ModelError(f"the model in {model_dir} cannot be served: {error}") from error

    def layout(self, block_size: int) -> PoolLayout:
        """The pool that this model needs."""
        heads: int = self.config.num_attention_heads
        head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        return PoolLayout(
            num_layers=self.config.num_hidden_layers,
            num_kv_heads=getattr(self.config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=str(self.dtype).removeprefix("torch."),
        )

    def forward(
        self,
        pool: KVPool,
        segments: list[Segment],
        token_ids: Sequence[int],
        logits_rows: Sequence[int],
        listener: LayerListener | None = None,
    ) -> torch.Tensor:
        """One packed pass, which writes keys and values into ``pool``.

        ``segments`` are the rows of each request, those of one token first, and ``token_ids`` the tokens of all rows.
        Returns ``[len(logits_rows), vocab_size]`` logits in fp32, of these rows.
        """
        step = Step(pool, segments, listener)
        with attention.running(step):
            output = self._model(
                input_ids=torch.tensor([token_ids], device=self.device),
                position_ids=step.positions,
                use_cache=False,
                logits_to_keep=torch.tensor(logits_rows, dtype=torch.long, device=self.device),
            )
        if step.layers_seen == 0:
            raise ModelError(
                f"model type {self.config.model_type!r} computes attention in its own code, which the embedded engine "
                "cannot page: transformers lets it replace attention only where a model leaves that to a function. "
                "Serve it with --engine vllm"
            )
        if step.layers_seen != pool.layout.num_layers:
            raise ModelError(
                f"{step.layers_seen} of {pool.layout.num_layers} layers went through paged attention; "
                "layers of another kind (linear attention, state space) are not supported"
            )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    @torch.inference_mode()
    def _prove(self) -> torch.Tensor:
        """Returns the test's logits, as transformers' own attention computes them."""
        tokens = _proof_tokens(self.vocab_size)
        half = _PROOF_TOKENS // 2
        pool = KVPool(self.layout(_PROOF_BLOCK), 8, self.device)

        def twice(start: int) -> torch.Tensor:
            # Once with blocks out of order, which tests gathering as well.
            segments = [Segment(blocks, start, half) for blocks in ([5, 2, 4], [0, 1, 3])]
            return self.forward(pool, segments, tokens[start : start + half] * 2, range(2 * half))

        try:
            expected: torch.Tensor = (
                self._model(torch.tensor([tokens], device=self.device), use_cache=False).logits[0].float()
            )
            self._model.set_attn_implementation(attention.NAME)
            actual = torch.cat([twice(0), twice(half)])
        except ModelError:
            raise
        except Exception as error:  # whatever an unknown model raises
            raise ModelError(
                f"{type(self._model).__name__} does not run on the embedded engine's attention: {error}"
            ) from error
        first, second = expected[:half], expected[half:]
        if (found := _deviation(torch.cat([first, first, second, second]), actual, self.dtype)) is not None:
            raise ModelError(
                f"{type(self._model).__name__} computes other logits on the embedded engine's attention than on "
                f"transformers' own ({found}): its attention does something this engine does not know"
            )
        return expected

    @torch.inference_mode()
    def _prove_rows(self, expected: torch.Tensor) -> None:
        """A token far behind must not change what the model computes of another request's first tokens."""
        tokens = _proof_tokens(self.vocab_size)
        pool = KVPool(self.layout(_PROOF_BLOCK), 4, self.device)
        for switch in (*switches(self.config), self.context - 1):
            position = min(switch, self.context - 1, _PROOF_FARTHEST)
            # One block many times over: what the far token sees does not matter.
            far = Segment([3] * pool.layout.blocks(position + 1), position, 1)
            near = Segment([0, 1, 2], 0, _PROOF_TOKENS)
            actual = self.forward(pool, [far, near], tokens[:1] + tokens, range(1, 1 + _PROOF_TOKENS))
            if (found := _deviation(expected, actual, self.dtype)) is not None:
                raise ModelError(
                    f"{type(self._model).__name__} computes other logits of one request when another has a token at "
                    f"position {position} ({found}): something in it follows the longest request of a step"
                )


def _proof_tokens(vocab_size: int) -> list[int]:
    return [(7 + 13 * i) % vocab_size for i in range(_PROOF_TOKENS)]


def _deviation(expected: torch.Tensor, actual: torch.Tensor, dtype: torch.dtype) -> str | None:
    """How far the test's logits are off, in words, if it is too far."""
    spread = (expected.max() - expected.min()).item()
    difference = (expected - actual).abs().max().item()
    if difference <= _PROOF_TOLERANCE[dtype] * max(spread, 1e-6):  # which NaN is not
        return None
    return f"largest difference {difference:.3g}, spread {spread:.3g}"


def _store_inputs_first(model: torch.nn.Module) -> None:
    """Store the matrices of linear layers with the input dimension first; their shape stays.

    MKL then multiplies a few fp32 rows (a decode batch of 8, a chunk of 64) 15 to 25 % faster, and one row or 512 as
    fast as before. An output matrix that is also the embedding keeps its rows contiguous for the look-ups.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in embeddings:
            module.weight.data = module.weight.data.t().contiguous().t()


def _return_freed_memory() -> None:
    """Give the system the memory that loading has freed: 430 MB of the demo model's 1.36 GB.

    transformers converts weights on many threads, each with its own arena of glibc's malloc, which keeps what is freed.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not every C library has it
    if trim is not None:
        trim(0)


def _check_folder(model_dir: Path) -> None:
    if not model_dir.is_dir():
        raise ModelError(f"there is no folder {model_dir}; give the path of a local Hugging Face model folder")
    config = model_dir / "config.json"
    if not config.is_file():
        raise ModelError(f"{model_dir} holds no config.json, so it is not a Hugging Face model folder")
    try:
        content = json.loads(config.read_bytes())
    except ValueError as error:
        raise ModelError(f"{config} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{config} is not a model's configuration: it holds no JSON object")


def _check_config(config: Any) -> None:
    """Refuse, before loading gigabytes, a model whose configuration shows that it cannot be served."""
    text = config.get_text_config(decoder=True)
    problem = unsupported(lambda name: getattr(config, name, None), lambda name: getattr(text, name, None))
    if problem is not None:
        raise ModelError(problem)


def _eos_token_ids(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """The tokenizer's EOS first, then those of the generation settings."""
    found: list[int] = []
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    for source in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None), model.config.eos_token_id):
        for token in source if isinstance(source, list) else [source]:
            if token is not None and token not in found:
                found.append(int(token))
    return tuple(found)
