"""The embedded engine against transformers' own ``generate``, eight streams against one, and prefix caching on and off.

    python benchmarks/engine.py [--model DIR] [--threads 2] [--dtype float32] [--tokens 64] [--rounds 5]
                               [--clock cpu] [--json FILE]

All run in this process, with the same weights and thread count, greedily, a fixed number of tokens after a prompt of
``--prompt`` tokens; tokens/s include the prompt's computation. The measurements alternate, round by round, so that
other load on the machine affects them alike; ratios are taken within a round. No prompt repeats, and the KV memory is
full of cached blocks after two rounds, so prefix caching has its highest cost. Targets: one stream at 0.95 of
``generate`` or more, eight streams at 3.5 times one or more, useless prefix caching at 0.98 of none or more.

The gain of useful prefix caching is measured with eight prompts of ``--shared`` common tokens, seen before, and eight
different tokens.
"""

import argparse
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvbelt.engine.api import GenerationRequest, Output, PrefixHashes, SamplingParams
from kvbelt.engine.engine import Engine
from kvbelt.engine.settings import EngineSettings
from kvbelt.ops.demo_model import demo_model_dir
from kvbelt.wire.block_hash import block_hashes, chained, root

STREAMS = 8
OWN_TOKENS = 8
TEXT = "The history of the sea is long, and the people who lived by it told many stories. "


#: Seconds of the machine, or of the processor: where the machine does other things too, the latter say more.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Clock = Callable[[], float]


def engine_rate(
    engine: Engine, prompts: list[tuple[int, ...]], tokens: int, clock: Clock
) -> tuple[float, list[list[int]]]:
    """Tokens/s of all prompts at once, and their answers."""
    answers: list[list[int]] = [[] for _ in prompts]
    left = threading.Semaphore(0)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def collect(output: Output) -> None:
        answers[int(output.request_id)].extend(output.token_ids)
        if output.finish_reason is not None:
            left.release()

    begin = clock()
    size = engine.layout.block_size
    for i, prompt in enumerate(prompts):
        prefix = PrefixHashes(root(), block_hashes(prompt, size), chained)
        engine.submit(GenerationRequest(str(i), prompt, params, collect, prefix=prefix))
    for _ in prompts:
        left.acquire()
    return len(prompts) * tokens / (clock() - begin), answers


def generate_rate(model: Any, prompt: tuple[int, ...], tokens: int, clock: Clock) -> tuple[float, list[int]]:
    """Tokens/s of transformers' generate, and its answer."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    begin = clock()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    seconds = clock() - begin
    answer: list[int] = out[0, len(prompt) :].tolist()
    return tokens / seconds, answer


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def make_engine(options: argparse.Namespace, model_dir: Path, *, prefix_caching: bool) -> Engine:
    """An engine with KV memory for twice as much as eight streams need."""
    settings = EngineSettings(
        model_dir,
        device="cpu",
        dtype=options.dtype,
        threads=options.threads,
        max_batch_tokens=options.batch_tokens,
        max_model_len=max(options.prompt, options.shared + OWN_TOKENS) + options.tokens,
        prefix_caching=prefix_caching,
    )
    tokens = 2 * STREAMS * (max(options.prompt, options.shared + OWN_TOKENS) + options.tokens)
    config = AutoConfig.from_pretrained(model_dir)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_a_token = config.num_hidden_layers * 2 * heads * head_dim * getattr(torch, options.dtype).itemsize
    engine = Engine(replace(settings, kv_bytes=tokens * bytes_a_token))
    engine.start()
    return engine


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    clock = CLOCKS[options.clock]
    model_dir = options.model or demo_model_dir(lambda line: print(line, file=sys.stderr))
    reference: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, options.dtype))
    engine = make_engine(options, model_dir, prefix_caching=True)
    plain = make_engine(options, model_dir, prefix_caching=False)
    base = tuple(engine.tokenizer(TEXT * (max(options.prompt, options.shared) // 10 + 2))["input_ids"])
    numbers = itertools.count(100)

    def new_prompts(length: int) -> list[tuple[int, ...]]:
        # They differ in their first token, so nothing of them is shared.
        return [(next(numbers), *base[1:length]) for _ in range(STREAMS)]

    common = (next(numbers), *base[1 : options.shared])
    rates: dict[str, list[float]] = {
        name: [] for name in ("generate", "engine_1", "on", "off", "shared_on", "shared_off")
    }
    same = True
    try:
        for round_ in range(options.rounds + 1):
            prompts = new_prompts(options.prompt)
            generate, expected = generate_rate(reference, prompts[0], options.tokens, clock)
            one, answers = engine_rate(engine, prompts[:1], options.tokens, clock)
            # The first engine warms the machine for the second, so the order alternates.
            order = [("on", engine), ("off", plain)][:: 1 if round_ % 2 else -1]
            measured = {"generate": generate, "engine_1": one}
            for name, which in order:
                measured[name], _ = engine_rate(which, new_prompts(options.prompt), options.tokens, clock)
            engine_rate(engine, [common], 1, clock)
            own = [tail[:OWN_TOKENS] for tail in new_prompts(OWN_TOKENS)]
            for name, which in order:
                measured[f"shared_{name}"], _ = engine_rate(
                    which, [common + tail for tail in own], options.tokens, clock
                )
            if round_ == 0:
                continue  # warm-up
            same = same and answers[0] == expected
            for name, rate in measured.items():
                rates[name].append(rate)
    finally:
        engine.close()
        plain.close()

    def ratio(over: str, under: str) -> dict[str, float]:
        return summary([a / b for a, b in zip(rates[over], rates[under], strict=True)])

    return {
        "benchmark": "engine",
        "model": engine.model_name,
        "dtype": options.dtype,
        "threads": options.threads,
        "prompt_tokens": options.prompt,
        "shared_tokens": options.shared,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "clock": options.clock,
        "max_batch_tokens": options.batch_tokens,
        "same_tokens": same,
        "tokens_per_second": {name: summary(values) for name, values in rates.items()},
        "one_stream_to_generate": ratio("engine_1", "generate"),
        "eight_streams_to_one": ratio("on", "engine_1"),
        "prefix_caching_to_none": ratio("on", "off"),
        "shared_to_computed": ratio("shared_on", "shared_off"),
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['model']} {result['dtype']}, {result['threads']} threads, {result['prompt_tokens']} tokens in, "
        f"{result['tokens']} out, {result['rounds']} rounds, {result['clock']} time, "
        f"tokens the same: {'yes' if result['same_tokens'] else 'NO'}"
    )
    print(f"{'':42}{'median':>9}{'min':>9}{'max':>9}   to reach")
    rows = [
        (f"{label}, tokens/s", result["tokens_per_second"][key], "")
        for label, key in (
            ("transformers generate", "generate"),
            ("engine, 1 stream", "engine_1"),
            (f"engine, {STREAMS} streams", "on"),
            ("  without prefix caching", "off"),
            (f"  {result['shared_tokens']} tokens in common, seen before", "shared_on"),
            ("  without prefix caching", "shared_off"),
        )
    ]
    rows.append(("1 stream / generate", result["one_stream_to_generate"], "0.95"))
    rows.append((f"{STREAMS} streams / 1 stream", result["eight_streams_to_one"], "3.50"))
    rows.append(("prefix caching that finds nothing / none", result["prefix_caching_to_none"], "0.98"))
    rows.append(("what was seen before / computed", result["shared_to_computed"], ""))
    for label, values, goal in rows:
        print(f"{label:42}{values['median']:9.2f}{values['min']:9.2f}{values['max']:9.2f}   {goal}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a local model folder; default: the demo model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--shared", type=int, default=256, help="tokens in common, of prompts that have some")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu where the machine is not idle")
    parser.add_argument("--batch-tokens", type=int, default=512, help="the engine's max_batch_tokens")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    result = measure(options)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
