"""The embedded engine against transformers' own ``generate``, and eight streams against one.

    python benchmarks/engine.py [--model DIR] [--threads 2] [--dtype float32] [--tokens 64] [--rounds 5] [--json FILE]

Both run in this process, on the same weights and thread count, greedily, a fixed number of tokens after a prompt of
``--prompt`` tokens; tokens/s count the prompt's computation too. The three measurements alternate, round by round, so
that whatever else the machine does meets all of them; ratios are taken within a round. To reach: one stream at 0.95 of
``generate`` or more, eight streams at 3.5 times one or more.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kvbelt.engine.api import GenerationRequest, Output, SamplingParams
from kvbelt.engine.engine import Engine
from kvbelt.engine.settings import EngineSettings
from kvbelt.ops.demo_model import demo_model_dir

STREAMS = 8
TEXT = "The history of the sea is long, and the people who lived by it told many stories. "


def engine_rate(engine: Engine, prompts: list[tuple[int, ...]], tokens: int) -> tuple[float, list[list[int]]]:
    """Tokens/s of all prompts at once, and their answers."""
    answers: list[list[int]] = [[] for _ in prompts]
    left = threading.Semaphore(0)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def collect(output: Output) -> None:
        answers[int(output.request_id)].extend(output.token_ids)
        if output.finish_reason is not None:
            left.release()

    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(str(i), prompt, params, collect))
    for _ in prompts:
        left.acquire()
    return len(prompts) * tokens / (time.perf_counter() - begin), answers


def generate_rate(model: Any, prompt: tuple[int, ...], tokens: int) -> tuple[float, list[int]]:
    """Tokens/s of transformers' generate, and its answer."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    begin = time.perf_counter()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    seconds = time.perf_counter() - begin
    answer: list[int] = out[0, len(prompt) :].tolist()
    return tokens / seconds, answer


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds."""
    torch.set_num_threads(options.threads)
    model_dir = options.model or demo_model_dir(lambda line: print(line, file=sys.stderr))
    reference: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, options.dtype))
    engine = Engine(
        EngineSettings(
            model_dir, device="cpu", dtype=options.dtype, threads=options.threads, max_batch_tokens=options.batch_tokens
        )
    )
    engine.start()
    base = tuple(engine.tokenizer(TEXT * (options.prompt // 10 + 2))["input_ids"])
    # Streams differ in their first token, as requests do.
    prompts = [(base[i], *base[1 : options.prompt]) for i in range(STREAMS)]
    rates: dict[str, list[float]] = {"generate": [], "engine_1": [], f"engine_{STREAMS}": []}
    same = True
    try:
        for round_ in range(options.rounds + 1):
            generate, expected = generate_rate(reference, prompts[0], options.tokens)
            one, answers = engine_rate(engine, prompts[:1], options.tokens)
            many, _ = engine_rate(engine, prompts, options.tokens)
            if round_ == 0:
                continue  # warm-up
            same = same and answers[0] == expected
            for name, rate in zip(rates, (generate, one, many), strict=True):
                rates[name].append(rate)
    finally:
        engine.close()
    return {
        "benchmark": "engine",
        "model": engine.model_name,
        "dtype": options.dtype,
        "threads": options.threads,
        "prompt_tokens": options.prompt,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "max_batch_tokens": options.batch_tokens,
        "same_tokens": same,
        "tokens_per_second": {name: summary(values) for name, values in rates.items()},
        "one_stream_to_generate": summary(
            [one / generate for one, generate in zip(rates["engine_1"], rates["generate"], strict=True)]
        ),
        "eight_streams_to_one": summary(
            [many / one for many, one in zip(rates[f"engine_{STREAMS}"], rates["engine_1"], strict=True)]
        ),
    }


def show(result: dict[str, Any]) -> None:
    """The table."""
    print(
        f"{result['model']} {result['dtype']}, {result['threads']} threads, {result['prompt_tokens']} tokens in, "
        f"{result['tokens']} out, {result['rounds']} rounds, "
        f"tokens the same: {'yes' if result['same_tokens'] else 'NO'}"
    )
    print(f"{'':34}{'median':>9}{'min':>9}{'max':>9}   to reach")
    rows = [
        (f"{label}, tokens/s", result["tokens_per_second"][key], "")
        for label, key in (
            ("transformers generate", "generate"),
            ("engine, 1 stream", "engine_1"),
            (f"engine, {STREAMS} streams", f"engine_{STREAMS}"),
        )
    ]
    rows.append(("1 stream / generate", result["one_stream_to_generate"], "0.95"))
    rows.append((f"{STREAMS} streams / 1 stream", result["eight_streams_to_one"], "3.50"))
    for label, values, goal in rows:
        print(f"{label:34}{values['median']:9.2f}{values['min']:9.2f}{values['max']:9.2f}   {goal}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a local model folder; default: the demo model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=512, help="the engine's max_batch_tokens")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    result = measure(options)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
