"""From logits to tokens.

The order of the steps is vLLM's. A grammar excludes tokens first. The reported log probabilities are taken from what is
left of the raw logits. Then come allowed tokens and bad words, bias, minimum length (end tokens are excluded) and
penalties. Then the best token is taken, or temperature, min-p, top-k and top-p are applied and a token is drawn.

The draw is stateless. Output token *i* of a request with seed *s* uses one uniform number, a hash of (s, i), and
inverts the distribution's cumulative sum in the order of token ids. It depends on no generator, device or batch, so a
request that is preempted, or continued on another worker, draws the same tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvbelt.engine.api import AnswerGrammar, SamplingParams

#: Below this a temperature means greedy, as in vLLM: dividing by less overflows.
GREEDY_TEMPERATURE = 1e-5
#: top-p tries this many best tokens before it sorts the whole vocabulary.
_TOP_P_FIRST_LOOK = 512
_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class SampleInput:
    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]  #: so far
    end_token_ids: Sequence[int]  #: excluded until min_tokens is reached, unless nothing else may come
    grammar: AnswerGrammar | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's result. ``token_id`` is None if the logits were NaN, or no token was left."""

    token_id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  #: alternatives, best first


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that decides output token ``index``: 53 bits of a BLAKE2b hash of both arguments."""
    data = seed.to_bytes(9, "little", signed=True) + index.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, rows: Sequence[SampleInput]) -> list[Sampled]:
    """Choose one token a row. ``logits``, ``[len(rows), vocab_size]`` in fp32, may be overwritten."""
    for i, row in enumerate(rows):
        if row.grammar is not None:
            row.grammar.restrict(logits[i])
    reports = _Reports(logits, rows)
    for i, row in enumerate(rows):
        _adjust(logits[i], row)
    best, choice = logits.max(dim=-1)
    chosen = choice.tolist()
    # A NaN anywhere in a row makes its maximum NaN.
    broken = (best.isnan() | (best == _NEVER)).tolist()
    drawing = [i for i, row in enumerate(rows) if not broken[i] and row.params.temperature >= GREEDY_TEMPERATURE]
    if drawing:
        drawn = _draw(logits if len(drawing) == len(rows) else logits[drawing], [rows[i] for i in drawing])
        for i, token in zip(drawing, drawn, strict=True):
            # Parameters at the limits of a float can turn all of a row's weights into NaN.
            broken[i] = not token < logits.shape[-1]
            chosen[i] = token
    return [Sampled(None) if broken[i] else reports.of(i, chosen[i]) for i in range(len(rows))]


def reports_of(logits: torch.Tensor, token_ids: Sequence[int], count: int) -> list[Sampled]:
    """Of each row: the log probability of the token that followed in a prompt, and ``count`` alternatives."""
    logprobs = torch.log_softmax(logits, dim=-1)
    own = logprobs[torch.arange(len(token_ids)), torch.tensor(token_ids, device=logits.device)].tolist()
    values, ids = (found.tolist() for found in logprobs.topk(count, dim=-1))
    alternatives = (tuple(zip(i, v, strict=True)) for i, v in zip(ids, values, strict=True))
    return [Sampled(*one) for one in zip(token_ids, own, alternatives, strict=True)]


class _Reports:
    """Raw log probabilities of the rows whose requests ask for them."""

    def __init__(self, logits: torch.Tensor, rows: Sequence[SampleInput]) -> None:
        asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        self._place = {row: at for at, row in enumerate(asking)}
        if not asking:
            return
        self._counts = [rows[i].params.logprobs or 0 for i in asking]
        self._logprobs = torch.log_softmax(logits[asking], dim=-1)
        most = max(self._counts)
        values, ids = self._logprobs.topk(most, dim=-1) if most else (self._logprobs[:, :0],) * 2
        self._top = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]

    def of(self, row: int, token: int) -> Sampled:
        at = self._place.get(row)
        if at is None:
            return Sampled(token)
        top = tuple((int(i), v) for i, v in self._top[at][: self._counts[at]])
        return Sampled(token, float(self._logprobs[at, token]), top)


def _adjust(logits: torch.Tensor, row: SampleInput) -> None:
    """Allowed tokens, bad words, bias, minimum length and penalties, in place on one row."""
    params = row.params
    if params.allowed_token_ids is not None:
        allowed = torch.tensor(params.allowed_token_ids, device=logits.device)
        kept = logits[allowed]
        logits.fill_(_NEVER)
        logits[allowed] = kept
    ending = [word[-1] for word in params.bad_words if _ends_with(row.output_token_ids, word[:-1])]
    if ending:
        logits[torch.tensor(ending, device=logits.device)] = _NEVER
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits.index_add_(0, ids, torch.tensor(list(params.logit_bias.values()), device=logits.device))
    if len(row.output_token_ids) < params.min_tokens and row.end_token_ids:
        ends = torch.tensor(list(row.end_token_ids), device=logits.device)
        kept = logits[ends]
        logits[ends] = _NEVER
        if logits.max() == _NEVER:
            logits[ends] = kept
    if params.repetition_penalty != 1.0:
        tokens = [*row.prompt_token_ids, *row.output_token_ids]
        seen = torch.tensor(tokens, dtype=torch.long, device=logits.device).unique()  # type: ignore[no-untyped-call]
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.frequency_penalty or params.presence_penalty) and row.output_token_ids:
        ids, counts = torch.tensor(list(row.output_token_ids), device=logits.device).unique(return_counts=True)  # type: ignore[no-untyped-call]
        logits[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return not end or tuple(tokens[-len(end) :]) == tuple(end)


def _draw(logits: torch.Tensor, rows: Sequence[SampleInput]) -> list[int]:
    params = [row.params for row in rows]
    device = logits.device

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=device).unsqueeze(1)

    # Temperature. Subtracting the maximum first keeps small temperatures from overflowing.
    logits = logits - logits.max(dim=-1, keepdim=True).values
    logits /= column([p.temperature for p in params])
    # min-p: relative to the best token, whose shifted logit is 0.
    if any(p.min_p > 0 for p in params):
        floor = column([p.min_p for p in params]).log()
        logits.masked_fill_(logits < floor, _NEVER)
    for i, p in enumerate(params):
        _keep_top(logits[i], p)
    cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)
    # The uniform number is computed on the CPU, so it is the same on every device.
    total = cumulative[:, -1:]
    target = total * torch.tensor(
        [[uniform(row.seed, len(row.output_token_ids))] for row in rows], dtype=torch.float64, device=device
    )
    # The first token whose cumulative sum exceeds the target; rounding must not carry it past the last one.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return [int(i) for i in torch.searchsorted(cumulative, target, right=True).squeeze(1).tolist()]


def _keep_top(logits: torch.Tensor, params: SamplingParams) -> None:
    """top-k, then top-p of the rest, in place on one row."""
    vocab = logits.shape[0]
    if 0 < params.top_k < vocab:
        # Tokens that tie with the k-th are kept, as in vLLM.
        threshold = logits.topk(params.top_k).values[-1]
        logits.masked_fill_(logits < threshold, _NEVER)
    if params.top_p >= 1.0:
        return
    # A token is kept if the more probable ones before it do not reach top_p. Usually few are, so few are tried first.
    log_total = logits.logsumexp(0)
    for look in (_TOP_P_FIRST_LOOK, vocab):
        if look < vocab:
            values, ids = logits.topk(look)
        else:
            values, ids = logits.sort(descending=True, stable=True)
        cumulative = (values - log_total).exp().cumsum(0)
        if look >= vocab or cumulative[-1] >= params.top_p:
            break
    keep = torch.zeros_like(logits, dtype=torch.bool)
    before = cumulative - (values - log_total).exp()
    kept = before < params.top_p
    kept[0] = True
    keep[ids[kept]] = True
    logits.masked_fill_(~keep, _NEVER)
