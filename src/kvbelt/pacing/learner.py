"""Learns a worker's step costs from its steps: non-negative least squares with forgetting.

Steps are summed into the normal equations, each weighted by the inverse square of its seconds, so that short steps and
long ones are fitted equally well in relative terms. The larger of the seconds seen and expected counts, so that neither
a paused step nor one whose end was seen early counts for much. The equations are solved on demand
by coordinate descent (Franc, Hlaváč and Navara, "Sequential coordinate-wise algorithm for non-negative least squares",
2005). A default keeps costs in place that the steps seen so far say nothing about.
"""

from math import sqrt

from kvbelt.pacing.costs import DEFAULT_COSTS, StepCosts

#: Share of the past that each step keeps: about the last thousand steps count, some seconds of a busy worker.
FORGETTING = 0.999

#: The default counts as so many steps whose costs are wrong by their own amount. A CPU's costs are wrong by a hundred
#: times that, and must show within some ten steps.
_WEIGHT_OF_DEFAULT = 1e-4

#: Of ``token_context``, for its weight: its default is zero.
_USUAL_TOKEN_CONTEXT = 1e-9

_SWEEPS = 60
_N = 6


class StepLearner:
    def __init__(self, prior: StepCosts = DEFAULT_COSTS) -> None:
        self._prior = (prior.base, prior.prefill, prior.token, prior.token_context, prior.decode, prior.kv_token)
        self._ridge = [_WEIGHT_OF_DEFAULT / (cost or _USUAL_TOKEN_CONTEXT) ** 2 for cost in self._prior]
        self._products = [[0.0] * _N for _ in range(_N)]
        self._answers = [0.0] * _N
        self._weight = 0.0  # the number of steps, forgetting applied
        self._squares = 0.0  # of seconds, each times its weight
        self._samples = 0
        self._solved = prior

    def observe(self, seconds: float, prompt_tokens: int, context: int, decodes: int, kv_tokens: int) -> None:
        """One step took ``seconds``, more than 0. The amounts are ``StepCosts.step_seconds``'s."""
        x = (
            1.0,
            1.0 if prompt_tokens else 0.0,
            float(prompt_tokens),
            prompt_tokens * (context + prompt_tokens / 2),
            float(decodes),
            float(kv_tokens),
        )
        usual = max(seconds, self._solved.step_seconds(prompt_tokens, context, decodes, kv_tokens))
        weight = 1.0 / (usual * usual)
        for i in range(_N):
            row, xi = self._products[i], x[i] * weight
            for j in range(i, _N):
                row[j] = FORGETTING * row[j] + xi * x[j]
            self._answers[i] = FORGETTING * self._answers[i] + xi * seconds
        self._weight = FORGETTING * self._weight + 1.0
        self._squares = FORGETTING * self._squares + weight * seconds * seconds
        self._samples += 1

    @property
    def costs(self) -> StepCosts:
        """As of the steps observed so far; ``sigma`` is relative to a step's seconds."""
        if self._solved.samples == self._samples:
            return self._solved
        a = [[self._products[min(i, j)][max(i, j)] for j in range(_N)] for i in range(_N)]
        b = list(self._answers)
        for i in range(_N):
            a[i][i] += self._ridge[i]
            b[i] += self._ridge[i] * self._prior[i]
        before = self._solved
        w = [before.base, before.prefill, before.token, before.token_context, before.decode, before.kv_token]
        for _ in range(_SWEEPS):
            for i in range(_N):
                row = a[i]
                w[i] = max(0.0, w[i] + (b[i] - sum(row[j] * w[j] for j in range(_N))) / row[i])
        fitted = sum(w[i] * sum(a[i][j] * w[j] for j in range(_N)) - 2 * w[i] * b[i] for i in range(_N))
        fitted += sum(self._ridge[i] * self._prior[i] ** 2 for i in range(_N))
        sigma = sqrt(max(0.0, self._squares + fitted) / self._weight)
        base, prefill, token, context, decode, kv = w
        self._solved = StepCosts(base, prefill, token, context, decode, kv, sigma, self._samples)
        return self._solved
