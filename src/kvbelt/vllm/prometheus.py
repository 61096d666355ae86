"""Our figures in vLLM's own ``/metrics``: what it carries from its workers to its HTTP process, and does there."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvbelt.vllm.figures import Figure


class BeltStats(KVConnectorStats):
    """The newest figures of each source; ``data`` is ``{source: [figure, ...]}``, ready to be serialised."""

    @classmethod
    def of(cls, source: str, figures: Sequence[Figure]) -> "BeltStats":
        """One source's."""
        return cls(data={source: msgspec.to_builtins(figures)})

    def reset(self) -> None:
        """Forget."""
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        """Whether no source has reported."""
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> "BeltStats":
        """Both; of a source that is in both, the other's."""
        self.data = {**self.data, **other.data}
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log, which has a line for it: what has moved since the start."""
        totals: dict[str, int | float] = {}
        for figures in self.data.values():
            for figure in msgspec.convert(figures, list[Figure]):
                if figure.counter and figure.value:
                    labels = ",".join(figure.labels.values())
                    name = figure.name.removeprefix("kvbelt_") + (f"{{{labels}}}" if labels else "")
                    totals[name] = totals.get(name, 0) + figure.value
        return totals


class BeltProm(KVConnectorPromMetrics):
    """Makes a metric for each figure when it is first seen."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._metrics: dict[str, Any] = {}
        self._seen: dict[tuple[int, str, str, tuple[str, ...]], float] = {}

    def observe(self, transfer_stats_data: Mapping[str, Any], engine_idx: int = 0) -> None:
        """A step's report has come."""
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
        # A gauge is the sum over the sources, of which perhaps only some have reported now.
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
