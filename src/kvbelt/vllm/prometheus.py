"""Our figures in vLLM's ``/metrics``: vLLM carries ``BeltStats`` to its HTTP process, which feeds ``BeltProm``."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvbelt.vllm.figures import Figure


class BeltStats(KVConnectorStats):
    """The newest figures of each source; ``data`` is ``{source: [figure, ...]}`` in plain types."""

    @classmethod
    def of(cls, source: str, figures: Sequence[Figure]) -> "BeltStats":
        return cls(data={source: msgspec.to_builtins(figures)})

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> "BeltStats":
        """Add the other's sources, whose figures are newer."""
        self.data = {**self.data, **other.data}
        return self

    def reduce(self) -> dict[str, int | float]:
        """The totals that are not zero, for a line of vLLM's log."""
        totals: dict[str, int | float] = {}
        for figures in self.data.values():
            for figure in msgspec.convert(figures, list[Figure]):
                if figure.counter and figure.value:
                    labels = ",".join(figure.labels.values())
                    name = figure.name.removeprefix("kvbelt_") + (f"{{{labels}}}" if labels else "")
                    totals[name] = totals.get(name, 0) + figure.value
        return totals


class BeltProm(KVConnectorPromMetrics):
    """Creates a metric for each figure when it is first seen."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._metrics: dict[str, Any] = {}
        self._seen: dict[tuple[int, str, str, tuple[str, ...]], float] = {}

    def observe(self, transfer_stats_data: Mapping[str, Any], engine_idx: int = 0) -> None:
        gauges: set[tuple[str, tuple[str, ...]]] = set()
        for source, raw in transfer_stats_data.items():
            for figure in msgspec.convert(raw, list[Figure]):
                labels = tuple(figure.labels.values())
                key = (engine_idx, source, figure.name, labels)
                before, self._seen[key] = self._seen.get(key, 0.0), figure.value
                metric = self._metric(figure).labels(*self.per_engine_labelvalues[engine_idx], *labels)
                if figure.counter:
                    metric.inc(max(figure.value - before, 0.0))
                else:
                    gauges.add((figure.name, labels))
        # A gauge is the sum over all sources, and not every source reports with every step.
        for name, labels in gauges:
            total = sum(
                value
                for (engine, _, seen, theirs), value in self._seen.items()
                if (engine, seen, theirs) == (engine_idx, name, labels)
            )
            self._metrics[name].labels(*self.per_engine_labelvalues[engine_idx], *labels).set(total)

    def _metric(self, figure: Figure) -> Any:
        if figure.name not in self._metrics:
            kind = self._counter_cls if figure.counter else self._gauge_cls
            names = [*self._labelnames, *figure.labels]
            self._metrics[figure.name] = kind(name=figure.name, documentation=figure.help, labelnames=names)
        return self._metrics[figure.name]
