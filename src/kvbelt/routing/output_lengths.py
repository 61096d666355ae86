"""How long answers are, learnt from those that ended by themselves. Pure."""

#: Tokens of an answer of which nothing is known.
UNKNOWN = 256

#: Models whose answers are told apart: names come from clients.
_MOST_MODELS = 64

#: How far an answer moves the median at least. So it follows the traffic.
_LEAST_WEIGHT = 0.02

#: An answer that is shorter than this share of its limit has ended by itself: tokens are counted by pieces, roughly.
_BY_ITSELF = 0.95


class OutputLengths:
    """A running median for each model."""

    def __init__(self) -> None:
        self._medians: dict[str, tuple[float, int]] = {}  # and from how many answers

    def expected(self, model: str, limit: int | None) -> int:
        """Tokens of the next answer. At least two: one is known beforehand."""
        known = self._medians.get(model)
        likely = UNKNOWN if known is None and limit is None else known[0] if known is not None else float("inf")
        return max(2, int(likely if limit is None else min(limit, likely)))

    def learn(self, model: str, tokens: int, limit: int | None) -> None:
        """An answer is complete. One that was cut by its limit would have been longer."""
        known = self._medians.get(model)
        cut = limit is not None and tokens >= _BY_ITSELF * limit
        if known is None:
            if not cut and len(self._medians) < _MOST_MODELS:
                self._medians[model] = max(1.0, tokens), 1
            return
        median, count = known
        if cut and tokens <= median:
            return  # it says nothing
        step = 1.0 + max(_LEAST_WEIGHT, 1.0 / (count + 1))
        self._medians[model] = (median * step if tokens > median else max(1.0, median / step)), count + 1
