"""Small models made on the fly, and a client that collects what an engine says."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from kvbelt.engine.api import (
    BlockHold,
    FinishReason,
    GenerationRequest,
    IncomingKV,
    IncomingKVLostError,
    OutgoingKV,
    Output,
    PrefixHashes,
    SamplingParams,
)
from kvbelt.engine.engine import Engine
from kvbelt.engine.settings import EngineSettings
from kvbelt.wire.block_hash import block_hashes, chained, root

EOS = 256
VOCAB = 260
DEADLINE = 60.0

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, whose id is the byte; then the special tokens <eos> and <pad>."""
    # The byte-level alphabet maps printable Latin-1 to itself and the other bytes, in order, to U+0100 and up.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
    vocab |= {"<eos>": EOS, "<pad>": EOS + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")  # noqa: S106


def save_model(folder: Path, config: PretrainedConfig, seed: int = 0, spread: float = 0.25) -> Path:
    """A random model whose answers vary, with its tokenizer. A wide one needs weights of small spread."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, spread)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def small(**more: object) -> dict[str, object]:
    """The size of a small model."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    } | more


@contextmanager
def engine_of(
    folder: Path,
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    clock: Callable[[], float] = time.monotonic,
    **more: object,
) -> Iterator[Engine]:
    """A started engine with this many blocks; afterwards all blocks must be free."""
    # 3 layers x 2 (K, V) x 2 heads x 8 elements x 4 bytes
    kv_bytes = num_blocks * block_size * 384
    settings = EngineSettings(folder, device="cpu", kv_bytes=kv_bytes, block_size=block_size, threads=1, **more)
    engine = Engine(settings, clock=clock)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()
        engine.validate()


@contextmanager
def between_steps(engine: Engine) -> Iterator[None]:
    """The engine begins no step meanwhile, so what is asked of it comes at one moment, however slow this thread is."""
    with engine._wake:
        yield


def abort_while_computed(engine: Engine, name: str) -> None:
    """Abort a request in the middle of each step of its engine."""
    forward = engine._model.forward

    def aborting(*given: object) -> object:
        engine.abort(name)
        return forward(*given)

    engine._model.forward = aborting


def eventually(condition: Callable[[], bool]) -> None:
    """Poll until the condition is true."""
    waited = threading.Event()
    for _ in range(int(DEADLINE / 0.005)):
        if condition():
            return
        waited.wait(0.005)
    raise AssertionError("it did not come to that")


def prefix_of(tokens: Sequence[int], block_size: int, salt: str = "") -> PrefixHashes:
    """A worker's hashes of a prompt's blocks."""
    return PrefixHashes(root(salt), block_hashes(tokens, block_size, salt), chained)


class Client:
    """One request and its outputs."""

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        params: SamplingParams = GREEDY,
        *,
        name: str | None = None,
        incoming: IncomingKV | None = None,
        outgoing: OutgoingKV | None = None,
        prefix: PrefixHashes | None = None,
        submit: bool = True,
        abort_at: int | None = None,
    ) -> None:
        """``abort_at``: the token with which it is aborted."""
        self.engine = engine
        self.abort_at = abort_at
        self.outputs: list[Output] = []
        self.changed = threading.Condition()
        self.request = GenerationRequest(
            name or f"request-{id(self)}", tuple(prompt), params, self._on_output, incoming, outgoing, prefix
        )
        if submit:
            engine.submit(self.request)

    def _on_output(self, output: Output) -> None:
        with self.changed:
            self.outputs.append(output)
            self.changed.notify_all()
            if self.abort_at == len(self._ids()):
                self.engine.abort(self.request.request_id)

    def wait_tokens(self, count: int) -> None:
        """Wait for so many tokens, or for the end."""
        with self.changed:
            assert self.changed.wait_for(lambda: self._ended() or len(self._ids()) >= count, DEADLINE)

    def wait(self) -> "Client":
        """Wait for the end."""
        with self.changed:
            assert self.changed.wait_for(self._ended, DEADLINE), "the request did not end"
        return self

    def _ended(self) -> bool:
        return bool(self.outputs) and self.outputs[-1].finish_reason is not None

    def _ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def token_ids(self) -> list[int]:
        """All tokens of the answer."""
        self.wait()
        return self._ids()

    @property
    def text(self) -> str:
        """All text of the answer."""
        self.wait()
        return "".join(output.text for output in self.outputs)

    @property
    def last(self) -> Output:
        """The output with the finish reason."""
        self.wait()
        return self.outputs[-1]

    @property
    def finish(self) -> FinishReason | None:
        """The reason why it ended."""
        return self.last.finish_reason


def reference_greedy(folder: Path, prompt: Sequence[int], count: int) -> list[int]:
    """The answer of transformers' own attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


PROMPT = list(b"thirty-three tokens in the prompt")


class Carrier:
    """An OutgoingKV that copies each announced block at once, and records its calls."""

    def __init__(self, engine: Engine, *, fail_in_layer: int | None = None) -> None:
        self.engine = engine
        self.calls: list[tuple[int, int, tuple[int, ...]]] = []
        self.copied: dict[tuple[int, int], torch.Tensor] = {}
        self.hold: BlockHold | None = None
        self.ends: list[bool] = []
        self.fail_in_layer = fail_in_layer

    def blocks_written(self, layer: int, first: int, block_ids: Sequence[int], ready: object) -> None:
        """Copy, and note the call."""
        if layer == self.fail_in_layer:
            raise OSError("the belt is torn")
        assert ready is None
        self.calls.append((layer, first, tuple(block_ids)))
        for i, block in enumerate(block_ids):
            assert (layer, first + i) not in self.copied, "a block was announced twice"
            self.copied[layer, first + i] = self.engine.pool.layers[layer][block].clone()

    def finished(self, hold: BlockHold, *, complete: bool) -> None:
        """Keep the hold."""
        self.hold = hold
        self.ends.append(complete)


class Delivery:
    """An IncomingKV of what a Carrier copied."""

    def __init__(self, engine: Engine, carrier: Carrier, num_tokens: int, *, lost: bool = False) -> None:
        self.engine = engine
        self.carrier = carrier
        self.num_tokens = num_tokens
        self.first_block = 0
        self.lost = lost
        self.loads = 0
        self.releases = 0

    def load(self, block_ids: Sequence[int], first: int) -> None:
        """Copy into the engine's blocks."""
        self.loads += 1
        if self.lost:
            raise IncomingKVLostError("slot expired")
        for layer in range(self.engine.layout.num_layers):
            for i, block in enumerate(block_ids):
                self.engine.pool.layers[layer][block].copy_(self.carrier.copied[layer, first + i])

    def release(self) -> None:
        """Count."""
        self.releases += 1
