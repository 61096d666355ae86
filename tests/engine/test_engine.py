"""The engine as its callers see it: tokens, ends, refusals, failures."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvbelt.engine.api import FinishReason, InvalidRequestError, Output, SamplingParams
from kvbelt.engine.engine import Engine
from tests.engine.support import (
    EOS,
    GREEDY,
    VOCAB,
    Client,
    abort_while_computed,
    between_steps,
    engine_of,
    eventually,
    prefix_of,
    reference_greedy,
)

PROMPTS = [list(b"hello"), list(b"a much longer prompt than the others, over several chunks"), [1], list(b"xyz" * 9)]


def test_greedy_tokens_are_transformers_own(tiny_llama: Path) -> None:
    """Several requests at once, in small chunks, answer as transformers' generate does one by one."""
    with engine_of(tiny_llama, num_blocks=200, max_batch_tokens=16, max_running=8) as engine:
        clients = [Client(engine, prompt) for prompt in PROMPTS]
        answers = [client.token_ids for client in clients]
    assert answers == [reference_greedy(tiny_llama, prompt, 24) for prompt in PROMPTS]


def test_chunked_equals_unchunked(tiny_llama: Path) -> None:
    """The size of the chunks changes no token."""
    answers = []
    for max_batch_tokens in (5, 512):
        with engine_of(tiny_llama, max_batch_tokens=max_batch_tokens, max_running=4) as engine:
            answers.append(Client(engine, PROMPTS[1]).token_ids)
    assert answers[0] == answers[1]


def test_preempted_requests_answer_the_same(tiny_llama: Path) -> None:
    """With too little memory for all, some are preempted, and all answers stay what they were."""
    with engine_of(tiny_llama, num_blocks=200) as engine:
        expected = [Client(engine, prompt).token_ids for prompt in PROMPTS]
    with engine_of(tiny_llama, num_blocks=24) as engine:
        with between_steps(engine):
            clients = [Client(engine, prompt) for prompt in PROMPTS]
        assert [client.token_ids for client in clients] == expected
        assert engine.load().preemptions_total > 0
        assert sum(client.last.timing.preemptions for client in clients) == engine.load().preemptions_total


def test_seeded_preempted_requests_answer_the_same(tiny_llama: Path) -> None:
    """Preemption does not disturb a seeded draw."""
    params = SamplingParams(seed=11, max_tokens=24, ignore_eos=True)
    with engine_of(tiny_llama, num_blocks=200) as engine:
        expected = [Client(engine, prompt, params).token_ids for prompt in PROMPTS]
    with engine_of(tiny_llama, num_blocks=24) as engine:
        with between_steps(engine):
            clients = [Client(engine, prompt, params) for prompt in PROMPTS]
        assert [client.token_ids for client in clients] == expected
        assert engine.load().preemptions_total > 0


def test_the_seed_decides_in_any_batch(tiny_llama: Path) -> None:
    """A seeded request draws the same tokens alone and among others, and another seed draws others."""
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=5, max_tokens=24, ignore_eos=True)
    with engine_of(tiny_llama, num_blocks=200) as engine:
        alone = Client(engine, PROMPTS[0], params).token_ids
        crowd = [Client(engine, prompt, replace(params, seed=i)) for i, prompt in enumerate(PROMPTS)]
        again = Client(engine, PROMPTS[0], params)
        assert again.token_ids == alone
        assert crowd[0].token_ids != alone


def test_no_seed_draws_anew(tiny_llama: Path) -> None:
    """Without a seed two runs differ."""
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    with engine_of(tiny_llama) as engine:
        assert Client(engine, PROMPTS[0], params).token_ids != Client(engine, PROMPTS[0], params).token_ids


def test_ends_at_max_tokens(tiny_llama: Path) -> None:
    """The length ends an answer, and the outputs' tokens are exactly so many."""
    with engine_of(tiny_llama) as engine:
        client = Client(engine, PROMPTS[0], replace(GREEDY, max_tokens=7))
        assert client.finish is FinishReason.LENGTH
        assert len(client.token_ids) == 7


def test_ends_at_the_models_context(tiny_llama: Path) -> None:
    """Without max_tokens an answer goes on up to max_model_len."""
    with engine_of(tiny_llama, max_model_len=32) as engine:
        client = Client(engine, PROMPTS[0], replace(GREEDY, max_tokens=None))
        assert client.finish is FinishReason.LENGTH
        assert len(client.token_ids) == 32 - len(PROMPTS[0])


def test_stop_token_ends_and_is_named(tiny_llama: Path) -> None:
    """A stop token id ends the answer; its text is not given out, its id is the reason."""
    with engine_of(tiny_llama) as engine:
        full = Client(engine, PROMPTS[0]).token_ids
        at = next(i for i in range(4, 24) if full[i] not in full[:i])
        client = Client(engine, PROMPTS[0], replace(GREEDY, stop_token_ids=(full[at],)))
        assert client.token_ids == full[: at + 1]
        assert (client.finish, client.last.stop_reason) == (FinishReason.STOP, full[at])


def test_eos_ends_unless_ignored(tiny_llama: Path) -> None:
    """EOS, made certain by a bias, ends with no reason named; ignore_eos goes on; min_tokens postpones it."""
    biased = SamplingParams(temperature=0.0, max_tokens=6, logit_bias={EOS: 1000.0})
    with engine_of(tiny_llama) as engine:
        client = Client(engine, PROMPTS[0], biased)
        assert client.token_ids == [EOS]
        assert (client.finish, client.last.stop_reason, client.text) == (FinishReason.STOP, None, "")
        ignored = Client(engine, PROMPTS[0], replace(biased, ignore_eos=True))
        assert ignored.token_ids == [EOS] * 6
        assert ignored.finish is FinishReason.LENGTH
        postponed = Client(engine, PROMPTS[0], replace(biased, min_tokens=3))
        assert len(postponed.token_ids) == 4
        assert EOS not in postponed.token_ids[:3]


def test_stop_string_ends_and_is_cut(tiny_llama: Path) -> None:
    """A stop string ends the answer before it, or after it if it is to be included."""
    # Bytes of printable ASCII only, so that the text is one character a token.
    letters = replace(GREEDY, temperature=1.0, seed=3, logit_bias=dict.fromkeys(range(97, 123), 1000.0))
    with engine_of(tiny_llama) as engine:
        text = Client(engine, PROMPTS[0], letters).text
        stop = text[5:8]
        end = text.index(stop)
        cut = Client(engine, PROMPTS[0], replace(letters, stop=("never", stop)))
        assert cut.text == text[:end]
        assert (cut.finish, cut.last.stop_reason) == (FinishReason.STOP, stop)
        assert len(cut.token_ids) == end + len(stop)
        included = Client(engine, PROMPTS[0], replace(letters, stop=(stop,), include_stop_str_in_output=True))
        assert included.text == text[: end + len(stop)]


def test_streamed_text_is_the_decoded_answer(tiny_llama: Path) -> None:
    """The pieces of text, joined, are the answer's bytes decoded."""
    params = SamplingParams(seed=1, max_tokens=60, ignore_eos=True, logit_bias={EOS: -1000, EOS + 1: -1000})
    with engine_of(tiny_llama) as engine:
        client = Client(engine, list(b"plain"), params)
        ids = [i for i in client.token_ids if i < 256]
        assert client.text == bytes(ids).decode(errors="replace")


def test_logprobs_are_of_the_raw_distribution(tiny_llama: Path) -> None:
    """Log probabilities are reported for each token, best first, whatever temperature and bias did."""
    params = SamplingParams(temperature=0.3, seed=1, max_tokens=5, logprobs=3, ignore_eos=True)
    with engine_of(tiny_llama) as engine:
        plain = Client(engine, PROMPTS[0], replace(params, max_tokens=1)).wait()
        biased = Client(engine, PROMPTS[0], replace(params, max_tokens=1, logit_bias={65: 1000.0})).wait()
        assert biased.token_ids == [65]
        assert [t.token_id for t in biased.outputs[0].logprobs[0].top] == [
            t.token_id for t in plain.outputs[0].logprobs[0].top
        ]
        outputs = Client(engine, PROMPTS[0], params).wait().outputs
        assert len(outputs) == 5
        for output in outputs:
            (report,) = output.logprobs
            assert report.token_id == output.token_ids[0]
            values = [one.logprob for one in report.top]
            assert len(values) == 3
            assert values == sorted(values, reverse=True)
            assert values[0] < 0


@pytest.mark.parametrize("batch", [4, 64])
def test_a_prompts_logprobs_are_those_of_the_model(tiny_llama: Path, batch: int) -> None:
    """Chunks, other requests in the step, and cached blocks change nothing."""
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=2, prompt_logprobs=2)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPTS[0]])).logits[0].log_softmax(-1)
    with engine_of(tiny_llama, max_batch_tokens=batch, max_running=4) as engine:
        prefix = prefix_of(PROMPTS[0], 4)
        Client(engine, PROMPTS[0], replace(GREEDY, max_tokens=1), prefix=prefix).wait()
        beside = Client(engine, PROMPTS[1], replace(GREEDY, max_tokens=20))
        first = Client(engine, PROMPTS[0], params, prefix=prefix).wait().outputs[0]
        beside.wait()
    entries = first.prompt_logprobs
    assert [entry.token_id for entry in entries] == list(PROMPTS[0])
    assert (entries[0].logprob, entries[0].top) == (None, ())
    for position, entry in enumerate(entries[1:]):
        assert entry.logprob == pytest.approx(expected[position, entry.token_id].item(), abs=1e-4)
        best = expected[position].topk(2)
        assert [one.logprob for one in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_prompts_logprobs_survive_a_preemption(tiny_llama: Path) -> None:
    """Each token is reported once."""
    params = replace(GREEDY, prompt_logprobs=0)
    with engine_of(tiny_llama, num_blocks=24) as engine:
        clients = [Client(engine, prompt, params) for prompt in PROMPTS]
        told = [[len(output.prompt_logprobs) for output in client.wait().outputs] for client in clients]
        assert engine.load().preemptions_total > 0
    assert told == [[len(prompt), *([0] * 23)] for prompt in PROMPTS]


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decoding"])
def test_abort_in_every_phase(tiny_llama: Path, phase: str) -> None:
    """An abort ends the request with ABORT, frees what it had, and leaves the others alone."""
    with engine_of(tiny_llama, num_blocks=40, max_batch_tokens=4, max_running=1) as engine:
        if phase == "prefill":
            abort_while_computed(engine, "victim")
        with between_steps(engine):
            if phase == "waiting":
                Client(engine, [1], GREEDY)
            abort_at = 2 if phase == "decoding" else None
            victim = Client(engine, PROMPTS[1], replace(GREEDY, max_tokens=80), name="victim", abort_at=abort_at)
            if phase == "waiting":
                engine.abort("victim")
        assert victim.finish is FinishReason.ABORT
        assert sum(output.finish_reason is not None for output in victim.outputs) == 1
        assert len(victim.token_ids) == (2 if phase == "decoding" else 0)
        assert len(Client(engine, PROMPTS[0]).token_ids) == 24


def test_a_request_of_many_sequences_lets_others_go_first(tiny_llama: Path) -> None:
    """Its first turn is served as it came, and its later ones behind a request that came after all of them."""
    ended: list[str] = []

    def submit(engine: Engine, name: str, turn: int) -> Client:
        client = Client(engine, PROMPTS[0], replace(GREEDY, max_tokens=1), name=name, submit=False)

        def on_output(output: Output) -> None:
            ended.append(name)
            client._on_output(output)

        engine.submit(replace(client.request, on_output=on_output, turn=turn))
        return client

    with engine_of(tiny_llama, max_running=1) as engine:
        with between_steps(engine):
            clients = [submit(engine, f"{turn}", turn) for turn in range(4)]
            clients += [submit(engine, "later", 0)]
        for client in clients:
            client.wait()
    assert ended == ["0", "later", "1", "2", "3"]


def test_abort_of_unknown_and_finished_requests_is_ignored(tiny_llama: Path) -> None:
    """An abort that comes too late does nothing."""
    with engine_of(tiny_llama) as engine:
        client = Client(engine, PROMPTS[0], name="done").wait()
        engine.abort("done")
        engine.abort("never seen")
        Client(engine, PROMPTS[0]).wait()
        assert len(client.outputs) == 24


def test_a_failing_step_fails_its_requests_only(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the forward pass ends that step's requests with ERROR; the next request is served."""
    with engine_of(tiny_llama) as engine:
        forward = engine._model.forward

        def failing(*args, **kwargs):
            monkeypatch.setattr(engine._model, "forward", forward)
            raise RuntimeError("out of luck")

        monkeypatch.setattr(engine._model, "forward", failing)
        failed = Client(engine, PROMPTS[0])
        assert failed.finish is FinishReason.ERROR
        assert "out of luck" in failed.last.error
        assert len(Client(engine, PROMPTS[0]).token_ids) == 24


def test_ids_that_the_tokenizer_does_not_know_have_no_text(tiny_llama: Path) -> None:
    """A model padded to more ids than its tokenizer has may draw them; they add nothing to the text."""
    with engine_of(tiny_llama) as engine:
        biased = replace(GREEDY, max_tokens=3, logit_bias={VOCAB - 1: 1000.0})
        client = Client(engine, [*b"half a character", 0xE4], biased)
        assert client.token_ids == [VOCAB - 1] * 3
        assert client.text == "\ufffd"


def test_an_undeliverable_token_fails_its_request_only(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure while the text is made ends that request with ERROR; the next one is served."""
    with engine_of(tiny_llama) as engine:

        def failing(*_: object) -> bool:
            raise RuntimeError("unreadable")

        with monkeypatch.context() as patch:
            patch.setattr(engine._decoder, "incomplete", failing)
            victim = Client(engine, PROMPTS[0], submit=False)
            with pytest.raises(RuntimeError):
                engine.submit(victim.request)
        client = Client(engine, PROMPTS[0], submit=False)
        engine.submit(client.request)
        monkeypatch.setattr(engine._decoder, "incomplete", failing)
        assert client.finish is FinishReason.ERROR
        monkeypatch.undo()
        assert len(Client(engine, PROMPTS[0]).token_ids) == 24


def test_a_failing_callback_drops_its_request_only(tiny_llama: Path) -> None:
    """A client whose callback raises loses its request; others go on, and its blocks come back."""
    with engine_of(tiny_llama) as engine:

        def broken(_: Output) -> None:
            raise ValueError("client bug")

        victim = Client(engine, PROMPTS[0], submit=False)
        engine.submit(replace(victim.request, on_output=broken))
        assert len(Client(engine, PROMPTS[0]).token_ids) == 24


def test_close_ends_what_is_under_way(tiny_llama: Path) -> None:
    """Closing aborts running and waiting requests, once each."""
    with engine_of(tiny_llama, max_running=1) as engine:
        running = Client(engine, PROMPTS[0], submit=False)

        def wait_for_the_end(output: Output) -> None:
            running._on_output(output)
            eventually(lambda: engine._closing)

        engine.submit(replace(running.request, on_output=wait_for_the_end))
        clients = [running, *(Client(engine, PROMPTS[0]) for _ in range(2))]
        running.wait_tokens(1)
        engine.close()
        assert [client.finish for client in clients] == [FinishReason.ABORT] * 3
        with pytest.raises(RuntimeError, match="closed"):
            Client(engine, PROMPTS[0])


def test_close_before_start(tiny_llama: Path) -> None:
    """An engine that never started still ends what was queued."""
    with engine_of(tiny_llama) as running:
        engine = Engine(running.settings)
    client = Client(engine, PROMPTS[0])
    engine.close()
    assert client.finish is FinishReason.ABORT


@pytest.mark.parametrize(
    ("prompt", "changes", "param"),
    [
        ([], {}, "prompt"),
        ([VOCAB], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1] * 32, {}, "prompt"),
        ([1], {"temperature": -0.1}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_p": 1.1}, "top_p"),
        ([1], {"top_k": -2}, "top_k"),
        ([1], {"min_p": 1.5}, "min_p"),
        ([1], {"presence_penalty": 2.5}, "presence_penalty"),
        ([1], {"frequency_penalty": -2.5}, "frequency_penalty"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([1], {"seed": 1 << 64}, "seed"),
        ([1], {"logprobs": 21}, "logprobs"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ([1], {"stop": ("",)}, "stop"),
        ([1], {"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1], {"logit_bias": {1: float("inf")}}, "logit_bias"),
    ],
)
def test_what_can_never_be_served_is_refused(shared_engine: Engine, prompt, changes, param) -> None:
    """A refusal names the field at fault, and nothing is queued."""
    with pytest.raises(InvalidRequestError) as refused:
        Client(shared_engine, prompt, replace(SamplingParams(), **changes))
    assert refused.value.param == param
    assert shared_engine.load().waiting == 0


def test_a_prompt_that_just_fits_is_served(shared_engine: Engine) -> None:
    """One token of room is enough."""
    assert len(Client(shared_engine, [1] * 31, GREEDY).token_ids) == 1


def test_request_ids_are_unique(tiny_llama: Path) -> None:
    """A second request with an id in use is refused."""
    with engine_of(tiny_llama) as engine:
        with between_steps(engine):
            first = Client(engine, PROMPTS[0], name="twin")
            with pytest.raises(InvalidRequestError, match="twin"):
                Client(engine, PROMPTS[0], name="twin")
        first.wait()
        Client(engine, PROMPTS[0], name="twin").wait()


def test_load_counts(tiny_llama: Path) -> None:
    """The counters tell what was computed; idle, nothing is used."""
    with engine_of(tiny_llama) as engine:
        Client(engine, PROMPTS[3]).wait()
        load = engine.load()
        assert (load.running, load.waiting) == (0, 0)
        assert load.blocks_free == load.blocks_total == 64
        assert load.prompt_tokens_total == len(PROMPTS[3])
        assert load.generated_tokens_total == 24


def test_timing_comes_with_the_first_and_the_last_output(tiny_llama: Path) -> None:
    """A waterfall can be drawn from the first output on."""
    with engine_of(tiny_llama) as engine:
        outputs = Client(engine, PROMPTS[0]).wait().outputs
        assert [output.timing is not None for output in outputs] == [True] + [False] * 22 + [True]
        assert outputs[0].timing.computed_tokens == len(PROMPTS[0])
        assert outputs[0].timing.prefill > 0
