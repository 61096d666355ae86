"""Sampling against a straightforward reference in plain Python floats."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbelt.engine.api import SamplingParams
from kvbelt.engine.sampling import SampleInput, sample, uniform

VOCAB = 24


def row(params: SamplingParams, *, prompt=(), output=(), ends=(), seed: int = 1) -> SampleInput:
    """The parameters of one row."""
    return SampleInput(params, seed, prompt, output, ends)


def reference_logits(logits: list[float], given_row: SampleInput) -> list[float]:
    """Bias, excluded end tokens and penalties, token by token."""
    p = given_row.params
    adjusted = []
    for token, value in enumerate(logits):
        value += p.logit_bias.get(token, 0.0)  # noqa: PLW2901
        if token in given_row.end_token_ids and len(given_row.output_token_ids) < p.min_tokens:
            value = -math.inf  # noqa: PLW2901
        if token in given_row.prompt_token_ids or token in given_row.output_token_ids:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty  # noqa: PLW2901
        count = list(given_row.output_token_ids).count(token)
        adjusted.append(value - p.frequency_penalty * count - (p.presence_penalty if count else 0.0))
    return adjusted


def reference_probabilities(logits: list[float], given_row: SampleInput) -> list[float]:
    """Temperature, min-p, top-k, top-p in this order, by sorting and summing."""
    p = given_row.params
    scaled = [value / p.temperature for value in reference_logits(logits, given_row)]

    def softmax(values: list[float]) -> list[float]:
        best = max(values)
        exps = [math.exp(value - best) for value in values]
        return [e / sum(exps) for e in exps]

    kept = set(range(len(logits)))
    probabilities = softmax(scaled)
    kept = {t for t in kept if probabilities[t] >= p.min_p * max(probabilities)}
    if p.top_k > 0:
        kth = sorted((scaled[t] for t in kept), reverse=True)[: p.top_k][-1]
        kept = {t for t in kept if scaled[t] >= kth}
    probabilities = softmax([value if t in kept else -math.inf for t, value in enumerate(scaled)])
    if p.top_p < 1:
        total, nucleus = 0.0, set()
        for token in sorted(kept, key=lambda t: -probabilities[t]):
            if total < p.top_p:
                nucleus.add(token)
            total += probabilities[token]
        probabilities = softmax([value if t in nucleus else -math.inf for t, value in enumerate(scaled)])
    return probabilities


def drawn(probabilities: list[float], u: float) -> int:
    """Inverse of the cumulative sum in the order of ids."""
    total = 0.0
    for token, probability in enumerate(probabilities):
        total += probability
        if total > u:
            return token
    return max(t for t, probability in enumerate(probabilities) if probability > 0)


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.8]),
    top_p=st.sampled_from([1.0, 0.97, 0.83, 0.31, 0.01]),
    top_k=st.sampled_from([0, -1, 1, 3, 10, 1000]),
    min_p=st.sampled_from([0.0, 0.013, 0.21, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 2.5]), max_size=3),
    min_tokens=st.sampled_from([0, 4]),
)
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=6)


@settings(deadline=None, max_examples=300)
@given(
    params=params_strategy,
    prompt=tokens,
    output=tokens,
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    logit_seed=st.integers(0, 10**6),
)
def test_every_option_together_is_the_references(params, prompt, output, seed, logit_seed) -> None:
    """With any options, the drawn token is the reference's."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(logit_seed)) * 3
    given_row = row(params, prompt=prompt, output=output, ends=(3, 5), seed=seed)
    expected = reference_probabilities(logits[0].tolist(), given_row)
    u = uniform(seed, len(output))
    (result,) = sample(logits, [given_row])
    # fp32 against fp64: right at a boundary either neighbour will do.
    assert result.token_id in {drawn(expected, max(0.0, u - 1e-5)), drawn(expected, u), drawn(expected, u + 1e-5)}


def test_greedy_takes_the_best_after_penalties() -> None:
    """Penalties count for the greedy choice too, over prompt and answer as in vLLM."""
    logits = torch.tensor([[3.0, 2.9, 2.8, 0.0]])
    greedy = SamplingParams(temperature=0.0)
    cases = [
        (row(greedy), 0),
        (row(replace(greedy, repetition_penalty=1.5), prompt=(0,)), 1),
        (row(replace(greedy, repetition_penalty=1.5), prompt=(0,), output=(1,)), 2),
        (row(replace(greedy, presence_penalty=0.5), prompt=(0,)), 0),
        (row(replace(greedy, presence_penalty=0.5), output=(0,)), 1),
        (row(replace(greedy, frequency_penalty=0.06), output=(0, 0)), 1),
        (row(replace(greedy, frequency_penalty=0.06), output=(0,)), 0),
        (row(replace(greedy, min_tokens=1), ends=(0, 1)), 2),
        (row(replace(greedy, min_tokens=1), ends=(0, 1), output=(3,)), 0),
        (row(replace(greedy, logit_bias={3: 5.0})), 3),
    ]
    assert [sample(logits.clone(), [given_row])[0].token_id for given_row, _ in cases] == [want for _, want in cases]


def test_rows_do_not_disturb_each_other() -> None:
    """A row's token is the same alone and in a batch of rows with other options."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5000, generator=generator) * 2
    rows = [
        row(
            SamplingParams(
                temperature=[0.0, 0.7, 1.0, 1.5][i % 4],
                top_p=[1.0, 0.9, 0.5][i % 3],
                top_k=[0, 40, 7, 3000][i % 4],
                min_p=[0.0, 0.05][i % 2],
                frequency_penalty=[0.0, 0.5][i % 2],
                logprobs=[None, 2][i % 2],
            ),
            output=tuple(range(i)),
            seed=i,
        )
        for i in range(40)
    ]
    together = sample(logits.clone(), rows)
    assert together == [sample(logits[i : i + 1].clone(), rows[i : i + 1])[0] for i in range(40)]


def test_the_distribution_is_the_models() -> None:
    """Over many seeds the draws follow the probabilities (chi-squared, 99.99 %)."""
    probabilities = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    counts = [0] * 5
    draws = 4000
    for start in range(0, draws, 500):
        rows = [row(SamplingParams(), seed=seed) for seed in range(start, start + 500)]
        for result in sample(probabilities.log().repeat(500, 1), rows):
            counts[result.token_id] += 1
    chi_squared = sum((n - draws * p) ** 2 / (draws * p) for n, p in zip(counts, probabilities.tolist(), strict=True))
    assert chi_squared < 23.5


def test_uniform_numbers_are_fixed() -> None:
    """The number of a seed and an index is part of the protocol between workers, and must never change."""
    assert [uniform(42, 0), uniform(42, 1), uniform(-1, 0)] == pytest.approx(UNIFORMS, abs=1e-15)


UNIFORMS = [0.9700529070409016, 0.4987051849732881, 0.781237709053009]


def test_top_p_beyond_the_first_look() -> None:
    """A flat distribution, whose nucleus has thousands of tokens, is cut at the right place."""
    logits = torch.linspace(0, 0.001, 3000).unsqueeze(0)
    tokens_seen = {
        sample(logits.clone(), [row(SamplingParams(top_p=0.5), seed=seed)])[0].token_id for seed in range(200)
    }
    assert min(tokens_seen) >= 1495
    assert max(tokens_seen) > 2900


def test_logprobs() -> None:
    """Raw log softmax, best first; zero alternatives still report the token."""
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    expected = torch.log_softmax(logits[0], 0).tolist()
    base = SamplingParams(temperature=0.0, logit_bias={0: 50.0})
    assert sample(logits.clone(), [row(base)])[0].logprob is None
    zero = sample(logits.clone(), [row(replace(base, logprobs=0))])[0]
    assert (zero.token_id, zero.logprob, zero.top) == (0, pytest.approx(expected[0]), ())
    two = sample(logits.clone(), [row(replace(base, logprobs=2))])[0]
    assert [token for token, _ in two.top] == [1, 2]
    assert [value for _, value in two.top] == pytest.approx([expected[1], expected[2]])


@pytest.mark.parametrize("wild", [{"repetition_penalty": 1e-40}, {"temperature": 1e39, "min_tokens": 1}])
def test_parameters_that_overflow_end_their_own_row_only(wild: dict[str, float]) -> None:
    """No token id outside the vocabulary is drawn, and other rows are served."""
    logits = torch.linspace(0.5, 3.0, VOCAB).repeat(2, 1)
    rows = [row(SamplingParams(**wild), prompt=(3,), ends=(0,)), row(SamplingParams(temperature=0.7))]
    broken, fine = sample(logits, rows)
    assert broken.token_id is None or broken.token_id < VOCAB
    assert fine.token_id is not None


def test_logits_that_are_not_numbers() -> None:
    """A row of NaN has no token; other rows do."""
    logits = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    results = sample(logits, [row(SamplingParams()), row(SamplingParams(temperature=0.0))])
    assert [result.token_id for result in results] == [None, 1]


@pytest.mark.parametrize("temperature", [1e-4, 2e-5])
def test_tiny_temperatures_do_not_overflow(temperature: float) -> None:
    """Just above greedy the best token still wins."""
    logits = torch.tensor([[100.0, 101.0, -1e4]])
    assert sample(logits, [row(SamplingParams(temperature=temperature))])[0].token_id == 1
